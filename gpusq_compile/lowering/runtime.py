"""The final ONNX file in ONNX Runtime, compared with the graph it came from."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnxruntime
import torch
import torch.fx
from torch import nn
from torch.utils._pytree import tree_leaves, tree_unflatten

from gpusq_compile.language.schema import Verify
from gpusq_compile.lowering.lift import CallConvention
from gpusq_compile.numerics import cosine_per_sample, largest_difference, per_sample, spread

TIE = 0.25
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


def record(
    graph_module: torch.fx.GraphModule, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Expected:
    """Run the graph on one batch and keep what the final file must reproduce."""
    with torch.no_grad():
        outputs = graph_module(*args, **kwargs)
    return Expected(_tensors((args, kwargs)), [leaf.float().cpu() for leaf in _tensors(outputs)])


def _tensors(tree: Any) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


def open_session(path: Path) -> onnxruntime.InferenceSession:
    """A CPU session that computes Q/DQ as ONNX defines them.

    Fusing them into integer kernels would saturate on processors without VNNI and measure the
    processor, not the file.
    """
    options = onnxruntime.SessionOptions()
    # Memory is given back between operators: verifying a model should not need more than
    # compiling it.
    options.enable_cpu_mem_arena = False
    options.enable_mem_pattern = False
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
            cosine = min(cosine, float(cosine_per_sample(ours, theirs).min()))
            largest = largest_difference(ours, theirs)
            if largest > difference:
                difference, worst = largest, index
        ours, theirs = per_sample(actual[0]), per_sample(record.outputs[0])
        chosen = theirs.gather(1, ours.argmax(dim=1, keepdim=True)).squeeze(1)
        right += int((theirs.amax(dim=1) - chosen <= TIE * spread(theirs)).sum())
        samples += len(ours)
    return Numerics(samples, cosine, right / samples, difference, worst)


class SessionModule(nn.Module):
    """The runtime in the place of the compiled module, for the user's model around it.

    It returns what the module returned: tensors from the runtime, anything else as recorded.
    """

    def __init__(
        self,
        session: onnxruntime.InferenceSession,
        convention: CallConvention,
        device: torch.device,
    ) -> None:
        super().__init__()
        self.session = session
        self.convention = convention
        self.device = device

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        results = iter(run_session(self.session, _tensors((args, kwargs))))
        leaves = [
            next(results).to(self.device) if constant is None else constant[0]
            for constant in self.convention.out_leaves
        ]
        return tree_unflatten(leaves, self.convention.out_spec)
