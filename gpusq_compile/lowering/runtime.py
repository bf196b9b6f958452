"""The final ONNX file in ONNX Runtime, compared with the graph it came from."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import onnxruntime
import torch
from torch import nn
from torch.utils._pytree import tree_leaves, tree_unflatten

from gpusq_compile.data import batches, logits_of
from gpusq_compile.language.schema import Verify

if TYPE_CHECKING:
    from gpusq_compile.compilation import Compilation

BATCHES = 2
"""Batches that the comparison runs on."""
TIE = 0.05
"""Classes whose reference logits differ by less than this share of the logits' standard deviation
are a tie: either may win under rounding, and no disagreement is counted."""


@dataclass(frozen=True)
class Expected:
    """One batch of the graph's flat inputs, and the flat outputs it must give."""

    inputs: list[torch.Tensor]
    outputs: list[torch.Tensor]


@dataclass(frozen=True)
class Numerics:
    """How far the runtime's outputs are from the graph's.

    `max_difference` is in standard deviations of the reference output. `worst_output` is the
    index of the output it was found in.
    """

    samples: int
    min_cosine: float
    top1_agreement: float
    max_difference: float
    worst_output: int

    def shortfalls(self, limits: Verify) -> list[str]:
        """The limits that were not kept, each as a sentence."""
        found = []
        if not self.min_cosine >= limits.min_cosine:
            found.append(
                f"ONNX Runtime's cosine to the graph is {self.min_cosine:.4f}, "
                f"limit min_cosine {limits.min_cosine}"
            )
        if not self.top1_agreement >= limits.min_top1_agreement:
            found.append(
                f"ONNX Runtime agrees with the graph's top-1 on {self.top1_agreement:.1%}, "
                f"limit min_top1_agreement {limits.min_top1_agreement:.1%}"
            )
        if not self.max_difference <= limits.max_difference:
            found.append(
                f"output {self.worst_output} differs by {self.max_difference:.4f} standard "
                f"deviations, limit max_difference {limits.max_difference}"
            )
        return found


def record_expected(compilation: Compilation) -> list[Expected]:
    """The fake-quantized graph's outputs on real batches, before anything is folded."""
    source = compilation.source
    factory = source.eval_data or source.calibration_data or source.train_data
    recorded = []
    with torch.no_grad():
        if factory is None:
            args, kwargs = compilation.probe
            recorded.append(_record(compilation, args, kwargs))
        else:
            for batch in batches(factory, "eval_data", compilation.device, BATCHES):
                args, kwargs = compilation.network.scoped_inputs(batch.inputs)
                recorded.append(_record(compilation, args, kwargs))
    return recorded


def _record(compilation: Compilation, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Expected:
    outputs = compilation.ir(*args, **kwargs)
    return Expected(_tensors((args, kwargs)), [leaf.float().cpu() for leaf in _tensors(outputs)])


def _tensors(tree: Any) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


def open_session(path: Path) -> onnxruntime.InferenceSession:
    """A CPU session that computes Q/DQ as ONNX defines them.

    Fusing them into integer kernels would saturate on processors without VNNI and measure the
    processor, not the file.
    """
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
    options.add_session_config_entry("session.disable_quant_qdq", "1")
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(
        str(path), sess_options=options, providers=["CPUExecutionProvider"]
    )


def run_session(
    session: onnxruntime.InferenceSession, inputs: list[torch.Tensor]
) -> list[torch.Tensor]:
    names = [value.name for value in session.get_inputs()]
    feeds = {name: value.detach().cpu().numpy() for name, value in zip(names, inputs, strict=True)}
    return [torch.from_numpy(value) for value in session.run(None, feeds)]


def compare(expected: list[Expected], session: onnxruntime.InferenceSession) -> Numerics:
    """Run every recorded batch and compare all outputs; top-1 is judged on the first output."""
    samples = right = 0
    cosine, difference, worst = 1.0, 0.0, 0
    for record in expected:
        actual = run_session(session, record.inputs)
        for index, (ours, theirs) in enumerate(zip(actual, record.outputs, strict=True)):
            ours = ours.float()
            flat = nn.functional.cosine_similarity(ours.flatten(1), theirs.flatten(1), dim=1)
            cosine = min(cosine, float(flat.min()))
            deviation = float((ours - theirs).abs().max() / theirs.std().clamp_min(1e-12))
            if not deviation <= difference:
                difference, worst = deviation, index
        ours, theirs = actual[0].float().flatten(1), record.outputs[0].flatten(1)
        chosen = theirs.gather(1, ours.argmax(dim=1, keepdim=True)).squeeze(1)
        right += int((theirs.amax(dim=1) - chosen <= TIE * theirs.std()).sum())
        samples += len(ours)
    return Numerics(samples, cosine, right / samples, difference, worst)


class _Session(nn.Module):
    """The runtime in the place of the graph, for the user's model around it."""

    def __init__(self, session: onnxruntime.InferenceSession, out_spec: Any) -> None:
        super().__init__()
        self.session = session
        self.out_spec = out_spec

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return tree_unflatten(run_session(self.session, _tensors((args, kwargs))), self.out_spec)


@contextmanager
def session_graph(
    session: onnxruntime.InferenceSession, compilation: Compilation
) -> Iterator[Callable[[tuple[Any, ...]], torch.Tensor]]:
    """A function from the model's inputs to logits, with the runtime at the compiled scope."""
    assert compilation.program is not None
    stand_in = _Session(session, compilation.program.call_spec.out_spec)

    def predict(inputs: tuple[Any, ...]) -> torch.Tensor:
        with torch.no_grad():
            outputs = compilation.network.run(stand_in, inputs)
        return logits_of(outputs, compilation.source.logits)

    yield predict
