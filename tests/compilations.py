"""Running the real pipeline up to a pass, on a model that a test made."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import onnxruntime
import torch
import torch.fx
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from gpusq_compile.api import CompileResult
from gpusq_compile.compilation import Compilation
from gpusq_compile.console import Console
from gpusq_compile.driver import run_passes
from gpusq_compile.language.loader import load_rules
from gpusq_compile.model_source import ModelSource, check_source
from gpusq_compile.network import Network
from gpusq_compile.options import Options
from gpusq_compile.passes import PIPELINE
from gpusq_compile.plan import LayerPlan, planned
from gpusq_compile.randomness import seed_everything
from gpusq_compile.remarks import Kind, Remark

WORKDIR = tempfile.TemporaryDirectory(prefix="gpusq-tests-")
"""For compilations whose files nobody looks at."""

SPARSE: dict[str, Any] = {"pattern": "2:4"}
INT8: dict[str, Any] = {"weight": "int8"}
EVERYTHING: dict[str, Any] = {
    "id": "all",
    "match": {"op": "linear"},
    "sparsity": SPARSE,
    "quantize": INT8,
}
LINEARS: dict[str, Any] = {
    "id": "linears",
    "match": {"op": "linear"},
    "sparsity": SPARSE,
    "quantize": {"weight": "int8", "activation": "int8"},
}
TAPS: dict[str, Any] = {
    "id": "taps",
    "match": {"role": ["patch_embed", "stage_end", "final_projection"]},
    "distill": {"loss": "mse"},
}


def make_rules(*rules: Mapping[str, Any], precision: str = "fp32", **rest: Any) -> dict[str, Any]:
    """A rules document; without rules one that asks for 2:4 and int8 on every linear."""
    return {
        "version": 1,
        "target": {"precision": precision},
        "rules": [dict(rule) for rule in rules] or [dict(EVERYTHING)],
        **rest,
    }


def begin(
    model: nn.Module,
    inputs: Tensor | tuple[Any, ...],
    rules: Any,
    workdir: Path = Path(WORKDIR.name),
    *,
    data: Any = None,
    eval_data: Any = None,
    train_data: Any = None,
    scope: str | None = None,
    logits: Any = None,
    **options: Any,
) -> Compilation:
    """A compilation before its first pass. `data` calibrates; the inputs do where it is None."""
    args = (inputs,) if isinstance(inputs, Tensor) else inputs
    calibration = [(args, None)] if data is None else data
    source = ModelSource(
        origin=type(model).__name__,
        module=model,
        example_inputs=args,
        train_data=None if train_data is None else lambda: train_data,
        calibration_data=lambda: calibration,
        eval_data=None if eval_data is None else lambda: eval_data,
        logits=logits,
    )
    check_source(source)
    resolved = load_rules(rules)
    chosen = Options(**{"finetune": False, "engine": "none", **options})
    seed_everything(chosen.seed)
    network = Network(model, scope or resolved.scope)
    return Compilation(source, resolved, chosen, Console(verbosity=-1), network, workdir)


def run_until(compilation: Compilation, last: str) -> Compilation:
    """Run the passes that have not run yet, up to and including `last`."""
    names = [step.name for step in PIPELINE]
    done = len(compilation.records)
    run_passes(compilation, PIPELINE[done : names.index(last) + 1])
    return compilation


def fork(compilation: Compilation) -> Compilation:
    """An independent copy, so that tests may share the passes that came before."""
    return replace(
        compilation,
        source=replace(compilation.source),
        graph=copy.deepcopy(compilation.graph),
        facts=set(compilation.facts),
        records=list(compilation.records),
        finetune=dict(compilation.finetune),
        accuracy=dict(compilation.accuracy),
        metrics=dict(compilation.metrics),
        verify=dict(compilation.verify),
    )


def outputs(compilation: Compilation) -> list[Tensor]:
    """The graph's outputs on the probe batch."""
    args, kwargs = compilation.probe
    with torch.no_grad():
        return [leaf for leaf in tree_leaves(compilation.ir(*args, **kwargs))]


def plan_of(compilation: Compilation, name: str) -> LayerPlan:
    return node_and_plan(compilation, name)[1]


def node_and_plan(compilation: Compilation, name: str) -> tuple[torch.fx.Node, LayerPlan]:
    plans = {plan.name: (node, plan) for node, plan in planned(compilation.ir.graph)}
    return plans[name]


def plans_of(compilation: Compilation) -> dict[str, LayerPlan]:
    return {plan.name: plan for _, plan in planned(compilation.ir.graph)}


def remarks_of(compilation: Compilation, step: str, kind: Kind | None = None) -> list[Remark]:
    """The remarks of one pass that ran."""
    record = next(record for record in compilation.records if record.name == step)
    return [remark for remark in record.remarks if kind in (None, remark.kind)]


def targets(compilation: Compilation) -> list[str]:
    """What each node of the graph calls, in order, parameters and inputs left out."""
    return [
        str(node.target)
        for node in compilation.ir.graph.nodes
        if node.op in ("call_function", "call_module")
    ]


def session_of(result: CompileResult) -> onnxruntime.InferenceSession:
    """A session that computes what the file says; by default the runtime rounds weights anew."""
    assert result.onnx_model is not None
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    return onnxruntime.InferenceSession(result.onnx_model.SerializeToString(), options)
