"""The state of one compilation: what passes read, change and add to."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import onnx
import torch
import torch.fx
from torch import nn

from gpusq_compile.console import Console
from gpusq_compile.engine import BatchRange, EngineReport
from gpusq_compile.errors import Location
from gpusq_compile.finetune.checkpoint import Checkpoints
from gpusq_compile.graph.state import GraphState
from gpusq_compile.language.loader import Rules
from gpusq_compile.lowering.check import StoredLayer
from gpusq_compile.lowering.half_range import MeasuredRun
from gpusq_compile.lowering.lift import CallConvention
from gpusq_compile.lowering.runtime import Expected
from gpusq_compile.model_source import ModelSource
from gpusq_compile.network import Network
from gpusq_compile.options import Options
from gpusq_compile.output_cache import Cached
from gpusq_compile.packed_file import PackedBytes
from gpusq_compile.processes import Processes
from gpusq_compile.remarks import Remark
from gpusq_compile.user_state import UserParameters

if TYPE_CHECKING:
    from gpusq_compile.report.observe import Observer


@dataclass
class PassRecord:
    """What the report says of one pass that ran.

    `change` is the largest absolute change of the graph's outputs on the probe batch that the
    pass caused, divided by the outputs' standard deviation; None where no graph output changed
    hands.
    """

    name: str
    matched: int
    changed: int
    skipped: int
    seconds: float
    change: float | None
    remarks: list[Remark]


@dataclass
class Compilation:
    """One compilation, from the user's model to the engine.

    `graph` is the IR, `dense_teacher` the frozen dense model from pruning on, and `sparse_teacher`
    the frozen sparse one from quantization on, as long as a later pass learns from them. `probe`
    are the (args, kwargs) that every numerical check runs on, of `probe_samples` samples,
    `engine_batch` the batch sizes to build for, and `reference` the outputs before the current
    pass. `expected` are the fake-quantized graph's outputs, which the final file must reproduce,
    and `onnx_places` the lines that the ONNX file's nodes come from, by name. `facts` are what
    passes so far ensure. `parameters` are the user's, with how the graph holds them. `measured` is
    the run by which the ONNX model was checked after its last change, None where no pass needs it.
    `accuracy` is top-1, in [0, 1], and `metrics` what the user's `metrics` gave, by stage.
    `observer` looks at the models for the page, None where there will be none.
    `started` is when it began, by the monotonic clock, `running` the pass that runs and `last_good`
    the text of what the last verified pass left, for whoever looks into a crash.
    """

    source: ModelSource
    rules: Rules
    options: Options
    console: Console
    network: Network
    workdir: Path
    processes: Processes = field(default_factory=Processes)
    checkpoints: Checkpoints | None = None
    graph: torch.fx.GraphModule | None = None
    convention: CallConvention | None = None
    probe: tuple[tuple[Any, ...], dict[str, Any]] = ((), {})
    probe_samples: int = 1
    engine_batch: BatchRange = field(default_factory=BatchRange)
    reference: list[torch.Tensor] = field(default_factory=list)
    facts: set[str] = field(default_factory=set)
    records: list[PassRecord] = field(default_factory=list)
    frozen: frozenset[str] = frozenset()
    parameters: UserParameters = field(default_factory=UserParameters)
    dense_teacher: torch.fx.GraphModule | None = None
    sparse_teacher: torch.fx.GraphModule | None = None
    tap_weights: list[float] | None = None
    expected: list[Expected] = field(default_factory=list)
    onnx_model: onnx.ModelProto | None = None
    onnx_places: dict[str, Location] = field(default_factory=dict)
    stored: dict[str, StoredLayer] = field(default_factory=dict)
    finetune: dict[str, Any] = field(default_factory=dict)
    accuracy: dict[str, float | None] = field(default_factory=dict)
    metrics: dict[str, dict[str, float]] = field(default_factory=dict)
    verify: dict[str, Any] = field(default_factory=dict)
    packed: PackedBytes | None = None
    measured: MeasuredRun | None = None
    engine: EngineReport | None = None
    observer: Observer | None = None
    started: float = field(default_factory=time.monotonic)
    running: str = "loading"
    last_good: str = ""
    _cached: tuple[GraphState, Cached] | None = None

    @property
    def device(self) -> torch.device:
        return torch.device(self.options.device)

    @property
    def targets(self) -> tuple[str, ...]:
        """The GPUs to build for: those of the options, or else those of the rules."""
        return self.options.targets or self.rules.target.compute

    @property
    def ir(self) -> torch.fx.GraphModule:
        """The graph; a pass that uses it requires `graph`."""
        if self.graph is None:
            raise RuntimeError("no graph: the trace pass has not run")
        return self.graph

    @property
    def cached_ir(self) -> Cached:
        """The graph, not run again on what it has been run on since it was last changed."""
        if self._cached is None or not self._cached[0].holds(self.ir):
            self._cached = GraphState(self.ir), Cached(self.ir)
        return self._cached[1]

    def forget_module(self) -> None:
        """Drop the user's module once the graph stands for all of it.

        Its dense weights would otherwise stay in memory beside what passes make of them. With a
        scope the rest of the module is still needed.
        """
        if self.network.scope is None:
            self.network.root = self.network.original = self.source.module = nn.Identity()
