"""The final ONNX file in ONNX Runtime, compared with the graph it came from."""

from __future__ import annotations

import contextlib
import inspect
import re
import statistics
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx
import onnxruntime
import onnxruntime.capi.onnxruntime_pybind11_state as ort_state
import torch
import torch.fx
from torch import nn
from torch.utils._pytree import tree_leaves, tree_map_only, tree_unflatten

from gpusq_compile.allocator import give_back
from gpusq_compile.batch_inputs import size_of
from gpusq_compile.errors import CheckFailed, Location
from gpusq_compile.language.schema import Verify
from gpusq_compile.lowering.lift import CallConvention
from gpusq_compile.lowering.to_onnx import WAY_OUT
from gpusq_compile.numerics import cosine_per_sample, largest_difference, spread

TIE = 0.05
"""Classes whose reference logits differ by less than this share of the logits' standard deviation
are a tie: either may win under rounding, and no disagreement is counted."""

RUNTIME_ERRORS = tuple(
    kind
    for _, kind in inspect.getmembers(ort_state, inspect.isclass)
    if issubclass(kind, Exception)
)


@dataclass(frozen=True)
class Expected:
    """One batch of the graph's flat inputs, and the flat outputs it must give."""

    inputs: list[torch.Tensor]
    outputs: list[torch.Tensor]


@dataclass(frozen=True)
class Numerics:
    """How far the runtime's outputs are from the graph's, over all floating-point outputs.

    `max_difference` is in `spread`s of the reference output (numerics.py), `worst_output` the index
    of the output it was found in. `disagreements` counts the samples whose top-1 differs by more
    than a tie, and `median_lead` is what the best class leads the next one by in the reference, in
    `spread`s; both None where the compiled module's outputs are not logits. `equal_answers` is the
    share of equal elements of the outputs that are no floats, None where there are none, and
    `floats` whether any output holds floats.
    """

    samples: int
    min_cosine: float
    max_difference: float
    worst_output: int
    disagreements: int | None
    median_lead: float | None = None
    equal_answers: float | None = None
    floats: bool = True

    @property
    def top1_agreement(self) -> float | None:
        if self.disagreements is None or not self.samples:
            return None
        return 1.0 - self.disagreements / self.samples

    @property
    def undecided(self) -> bool:
        """Whether half of the samples have a lead that the differences can turn around."""
        return self.median_lead is not None and self.median_lead < 2 * self.max_difference

    def shortfalls(self, limits: Verify) -> list[str]:
        """The limits that were not kept, each as a sentence."""
        found = []
        if not self.min_cosine >= limits.min_cosine:
            found.append(
                f"ONNX Runtime's cosine to the graph is {self.min_cosine:.4f}, "
                f"limit min_cosine {limits.min_cosine}"
            )
        agreement = self.top1_agreement
        # Of few samples one may differ: a limit of 97 % would otherwise mean none of 30.
        few = agreement is None or self.disagreements == 1
        if agreement is not None and not few and agreement < limits.min_top1_agreement:
            found.append(
                f"ONNX Runtime agrees with the graph's top-1 on {agreement:.1%} of "
                f"{self.samples} samples, "
                f"limit min_top1_agreement {limits.min_top1_agreement:.1%}"
            )
        if not self.floats and (self.equal_answers or 0.0) < limits.min_top1_agreement:
            found.append(
                f"ONNX Runtime gives {self.equal_answers or 0.0:.1%} of the graph's answers, and "
                "the model has no output in floats to compare, "
                f"limit min_top1_agreement {limits.min_top1_agreement:.1%}"
            )
        if not self.max_difference <= limits.max_difference:
            found.append(
                f"output {self.worst_output} differs by {self.max_difference:.4f} standard "
                f"deviations, limit max_difference {limits.max_difference}"
            )
        return found


def record(graph_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Expected:
    """Run the graph on one batch and keep what the final file must reproduce.

    Of the batch a copy: a user's model may write into its inputs when it is evaluated later on.
    """
    with torch.no_grad():
        args, kwargs = tree_map_only(torch.Tensor, torch.clone, (args, kwargs))
        outputs = graph_module(*args, **kwargs)
    return Expected(tensor_leaves((args, kwargs)), [leaf.cpu() for leaf in tensor_leaves(outputs)])


def tensor_leaves(tree: Any) -> list[torch.Tensor]:
    """The tensors of nested arguments or outputs, in order."""
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


def open_session(model: Path | bytes, *, runs: int | None = None) -> onnxruntime.InferenceSession:
    """A CPU session, of a file or a serialized model, that computes Q/DQ as ONNX says.

    Fused into integer kernels, they would saturate on processors without VNNI and measure the
    processor, not the file. The graph of a single run is taken as it is. From the second of `runs`
    on, None standing for many, ONNX Runtime's basic rewrites are worth their time: they fold
    constants, dequantized weights among them, and fuse such as Conv with BatchNormalization. Its
    further fusions round elsewhere than the file says, and take three times the session's memory.

    Source: ONNX Runtime, "Graph Optimizations in ONNX Runtime".

    Raises:
        CheckFailed: ONNX Runtime cannot take the model.
    """
    levels = onnxruntime.GraphOptimizationLevel
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = (
        levels.ORT_DISABLE_ALL if runs == 1 else levels.ORT_ENABLE_BASIC
    )
    # Memory is given back between operators: verifying a model should not need more than
    # compiling it.
    options.enable_cpu_mem_arena = False
    options.enable_mem_pattern = False
    # In the order of the file; by default what ends in an output waits until the last one is made.
    options.execution_order = onnxruntime.ExecutionOrder.PRIORITY_BASED
    options.add_session_config_entry("session.disable_quant_qdq", "1")
    # Of its errors only the fatal ones: the others are raised, and say the same.
    options.log_severity_level = 4
    # What the session takes should not come on top of what writing the file, or one before, took.
    give_back()
    with runtime_failures():
        return onnxruntime.InferenceSession(
            model if isinstance(model, bytes) else str(model),
            sess_options=options,
            providers=["CPUExecutionProvider"],
        )


def run_session(
    session: onnxruntime.InferenceSession, inputs: Sequence[torch.Tensor]
) -> list[torch.Tensor]:
    """The runtime's flat outputs for one batch.

    Raises:
        CheckFailed: ONNX Runtime cannot run one of the operators.
    """
    names = [value.name for value in session.get_inputs()]
    feeds = {name: value.detach().cpu().numpy() for name, value in zip(names, inputs, strict=True)}
    with runtime_failures():
        found = session.run(None, feeds)
    return [torch.as_tensor(value) for value in found]


def run_once(
    model: onnx.ModelProto, inputs: Sequence[torch.Tensor], path: Path
) -> list[torch.Tensor]:
    """The runtime's flat outputs of a model for one batch.

    It is kept in `path` meanwhile: a session keeps the bytes that it is given beside what it makes
    of them.

    Raises:
        CheckFailed: ONNX Runtime cannot take the model, or run one of its operators.
    """
    try:
        onnx.save(model, path)
        return run_session(open_session(path, runs=1), inputs)
    finally:
        path.unlink(missing_ok=True)


@contextlib.contextmanager
def runtime_failures() -> Iterator[None]:
    """ONNX Runtime's own errors as `CheckFailed`, in a line."""
    try:
        yield
    except RUNTIME_ERRORS as error:
        text = " ".join(str(error).split()).rpartition("[ONNXRuntimeError] : ")[2]
        raise CheckFailed(
            "onnxruntime",
            f"ONNX Runtime, which checks the model, cannot run it: {text}",
            hint=WAY_OUT,
        ) from error


@contextlib.contextmanager
def at_its_line(places: Mapping[str, Location], hint: str | None = None) -> Iterator[None]:
    """What a runtime or a builder cannot do with a node, at the line that the node is from.

    Args:
        places: the lines by the names of the ONNX nodes.
        hint: the way out where there is a line, for an error that has none of its own.
    """
    try:
        yield
    except CheckFailed as error:
        if (found := placed(error, places, hint)) is error:
            raise
        raise found from error


def placed(
    error: CheckFailed, places: Mapping[str, Location], hint: str | None = None
) -> CheckFailed:
    """The error with the line of the model that the ONNX node it names is from."""
    # In its own words a builder adds numbers to a node's name.
    named = [name for name in places if re.search(rf"\b{re.escape(name)}(\b|_)", error.message)]
    place = places[max(named, key=len)] if named else None
    if error.location is not None or place is None:
        return error
    return CheckFailed(error.code, error.message, location=place, hint=error.hint or hint)


def compare(
    expected: list[Expected],
    found: Iterable[list[torch.Tensor]],
    find_logits: Callable[[list[torch.Tensor]], torch.Tensor] | None,
) -> Numerics:
    """Compare every recorded batch with the flat outputs that the runtime gave for it.

    `find_logits` maps the flat outputs to logits [batch, classes], for top-1; None where there are
    none.
    """
    samples = 0
    disagreements = None if find_logits is None else 0
    cosine, difference, worst = 1.0, 0.0, 0
    leads: list[float] = []
    floats, equal, answers = False, 0, 0
    for batch, actual in zip(expected, found, strict=True):
        for index, (ours, theirs) in enumerate(zip(actual, batch.outputs, strict=True)):
            if not theirs.is_floating_point():
                equal += int((ours == theirs).sum())
                answers += theirs.numel()
                continue
            floats = True
            cosine = min(cosine, float(cosine_per_sample(ours, theirs).min()))
            largest = largest_difference(ours, theirs)
            if largest > difference:
                difference, worst = largest, index
        samples += size_of(tuple(batch.inputs)) or 0
        if find_logits is not None and disagreements is not None:
            ours, theirs = find_logits(actual).float(), find_logits(batch.outputs).float()
            chosen = theirs.gather(1, ours.argmax(dim=1, keepdim=True)).squeeze(1)
            disagreements += int((theirs.amax(dim=1) - chosen > TIE * spread(theirs)).sum())
            best = theirs.topk(min(2, theirs.shape[1]), dim=1).values
            leads += ((best[:, 0] - best[:, -1]) / spread(theirs)).tolist()
    lead = statistics.median(leads) if leads else None
    share = equal / answers if answers else None
    return Numerics(samples, cosine, difference, worst, disagreements, lead, share, floats)


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
        return self.restored(run_session(self.session, tensor_leaves((args, kwargs))))

    def restored(self, results: list[torch.Tensor]) -> Any:
        """The module's outputs from the runtime's."""
        return structured([result.to(self.device) for result in results], self.convention)


def structured(tensors: list[torch.Tensor], convention: CallConvention) -> Any:
    """The module's outputs from its flat output tensors, with what is no tensor as recorded."""
    rest = iter(tensors)
    leaves = [next(rest) if kept is None else kept[0] for kept in convention.out_leaves]
    return tree_unflatten(leaves, convention.out_spec)
