"""Runs the passes: order, laws of the IR, numerical checks, time, and dumps."""

from __future__ import annotations

import difflib
import gc
import math
import time
from collections.abc import Sequence
from typing import Any

import onnx
import torch
from torch.utils._pytree import tree_map

from gpusq_compile.accuracy import measure
from gpusq_compile.allocator import give_back
from gpusq_compile.compilation import Compilation, PassRecord
from gpusq_compile.errors import InternalError
from gpusq_compile.graph.state import GraphState
from gpusq_compile.graph.text import graph_text
from gpusq_compile.lowering.half_range import run_measured
from gpusq_compile.lowering.runtime import at_its_line, run_once, tensor_leaves
from gpusq_compile.lowering.text import onnx_text
from gpusq_compile.lowering.validity import check_valid
from gpusq_compile.numerics import is_rounding, largest_difference
from gpusq_compile.pass_base import Pass
from gpusq_compile.randomness import derived_seed, seed_everything
from gpusq_compile.verifier import verify_ir

MEASURED_BEFORE = {"sparsify": "dense", "fold": "quantized"}
MEASURED_AFTER = {"finetune_sparse": "sparse"}
"""The passes around which the model is measured, and the name of the stage in the report.

The dense model is measured once the rules have matched: their errors should not wait for it, and
a dry run needs none.
"""


WITHIN_ROUNDING = 4
"""Times the change that rounding the inputs makes: what a rewrite that only rounds may make."""


def run_passes(compilation: Compilation, passes: Sequence[Pass]) -> None:
    """Run `passes` in order, record each, and measure the model along the way.

    Raises:
        InternalError: a requirement is missing, a law of the IR is broken, or a pass that claims
            to preserve the function changed it.
        Exception: what a pass itself raises.
    """
    for step in passes:
        compilation.running = step.name
        missing = [fact for fact in step.requires if fact not in compilation.facts]
        if missing:
            raise InternalError(
                "pass-order", f"pass '{step.name}' requires {', '.join(missing)}, not yet ensured"
            )
        if step.name in MEASURED_BEFORE:
            measure(compilation, MEASURED_BEFORE[step.name], compilation.cached_ir)
        if compilation.observer is not None:
            compilation.observer.before(compilation, step.name)
            give_back()
        run_pass(compilation, step)
        if step.name in MEASURED_AFTER:
            measure(compilation, MEASURED_AFTER[step.name], compilation.cached_ir)
        compilation.facts -= set(step.removes)
        compilation.facts |= set(step.ensures)
        give_back()
    compilation.running = "report"


def run_pass(compilation: Compilation, step: Pass) -> None:
    console = compilation.console
    before = text_before(compilation, step)
    state = None if compilation.graph is None else GraphState(compilation.graph)
    started = time.monotonic()
    # What a pass draws does not depend on what the passes before drew: a resumed run trains less.
    seed_everything(derived_seed(compilation.options.seed, step.name))
    with console.busy(step.name, said=True):
        result = step.run(compilation)
    seconds = time.monotonic() - started
    # What runs of other shapes left in pieces would be kept beside what the check needs.
    give_back()
    change = None
    if compilation.graph is not None and "onnx" not in compilation.facts | set(step.ensures):
        verify_ir(compilation.graph, step.name)
        held = state is not None and state.holds(compilation.graph)
        checked = result.changed or step.preserves is not None
        change = graph_change(compilation, step) if checked and not held else 0.0
    elif step.rewrites_onnx and result.changed:
        change = onnx_change(compilation, step)
    record = PassRecord(
        step.name, result.matched, result.changed, result.skipped, seconds, change, result.remarks
    )
    compilation.records.append(record)
    console.detail(
        f"{step.name}: {result.changed} of {result.matched} changed, "
        f"{result.skipped} skipped, {seconds:.2f} s"
    )
    for remark in result.remarks:
        console.detail(f"  {remark.kind}: {remark.layer or '-'}: {remark.reason}")
    dump(compilation, step, before)
    if compilation.graph is not None and (result.changed or not compilation.last_good):
        compilation.last_good = ir_text(compilation)


def graph_change(compilation: Compilation, step: Pass) -> float:
    """The largest change of the graph's outputs on the probe since the last pass.

    In standard deviations of the output before. The new outputs become the reference.

    Raises:
        InternalError: it is more than the pass may make, and rounding does not explain it.
    """
    before = compilation.reference
    args, kwargs = compilation.probe
    with torch.no_grad():
        outputs = compilation.cached_ir(*args, **kwargs)
    change = change_to(compilation, tensor_leaves(outputs))
    if (
        step.preserves is None
        or change <= step.preserves
        or only_rounded(before, compilation.reference)
        or (math.isfinite(change) and change <= WITHIN_ROUNDING * own_rounding(compilation))
    ):
        return change
    raise InternalError(
        "not-preserved",
        f"pass '{step.name}' changed the outputs by {change:.3g} standard deviations, "
        f"its limit is {step.preserves:g}",
    )


def only_rounded(before: list[torch.Tensor], after: list[torch.Tensor]) -> bool:
    """Whether rounding explains what changed of the outputs in floats."""
    return all(
        is_rounding(new, old.to(new.device))
        for old, new in zip(before, after, strict=True)
        if old.is_floating_point()
    )


def own_rounding(compilation: Compilation) -> float:
    """How far the graph's outputs move when its inputs in floats move by one rounding each.

    In standard deviations of the output. A deep network makes more of it than a shallow one.
    """

    def moved(value: Any) -> Any:
        if not isinstance(value, torch.Tensor) or not value.is_floating_point():
            return value
        return value * (1 + torch.finfo(value.dtype).eps)

    args, kwargs = tree_map(moved, compilation.probe)
    with torch.no_grad():
        outputs = tensor_leaves(compilation.ir(*args, **kwargs))
    pairs = zip(outputs, compilation.reference, strict=True)
    changes = [largest_difference(new, old) for new, old in pairs if old.is_floating_point()]
    return max(changes, default=0.0)


def change_to(compilation: Compilation, outputs: list[torch.Tensor]) -> float:
    """The largest difference of the outputs to the reference, which they become."""
    changes = [0.0]
    for old, new in zip(compilation.reference, outputs, strict=True):
        if old.is_floating_point():
            changes.append(largest_difference(new, old.to(new.device)))
    compilation.reference = outputs
    return max(changes)


def onnx_change(compilation: Compilation, step: Pass) -> float:
    """Like `graph_change`, of a pass that rewrote the ONNX model, in ONNX Runtime.

    Raises:
        InternalError: the model that the pass left is not valid.
        CheckFailed: ONNX Runtime cannot run it.
    """
    model = compilation.onnx_model
    assert model is not None
    # The graphs that a model is edited in are full of cycles, and hold the model as it was.
    gc.collect()
    give_back()
    try:
        check_valid(model)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise InternalError("onnx-invalid", f"pass '{step.name}' left: {error}") from error
    inputs = tensor_leaves(compilation.probe)
    path = compilation.workdir / f"{step.name}.onnx"
    compilation.measured = None
    with at_its_line(compilation.onnx_places):
        if will_be_half(compilation, step):
            compilation.measured = run_measured(model, inputs, path)
            outputs = compilation.measured.outputs
        else:
            outputs = run_once(model, inputs, path)
    return change_to(compilation, outputs)


def will_be_half(compilation: Compilation, step: Pass) -> bool:
    """Whether a pass after this one turns floats to half, and has to know how large they are."""
    typed = "onnx_typed" in compilation.facts | set(step.ensures)
    return compilation.rules.target.precision == "fp16" and not typed


def ir_text(compilation: Compilation) -> str:
    """The text of what the next pass works on: the graph, and once it is exported the model."""
    if compilation.onnx_model is not None:
        return onnx_text(compilation.onnx_model)
    assert compilation.graph is not None
    return graph_text(compilation.graph)


def text_before(compilation: Compilation, step: Pass) -> str | None:
    """The text to compare with after the pass; None where nobody asked, or there is none yet.

    The export is compared with nothing: the model it makes has no line in common with the graph.
    """
    wanted = compilation.options.dump_after
    if "changed" not in wanted or compilation.graph is None or "onnx" in step.ensures:
        return None
    return ir_text(compilation)


def dump(compilation: Compilation, step: Pass, before: str | None) -> None:
    """Write the graph's text after the pass where `dump_after` names it, and of `changed` what
    differs from the text before."""
    wanted = compilation.options.dump_after
    if compilation.graph is None or not wanted:
        return
    text = ir_text(compilation)
    whole = step.name in wanted or "all" in wanted
    if not whole and ("changed" not in wanted or text == before):
        return
    folder = compilation.workdir / "dumps"
    folder.mkdir(exist_ok=True)
    name = f"{len(compilation.records):02d}-{step.name}"
    if whole or before is None:
        (folder / f"{name}.txt").write_text(text)
    if "changed" in wanted and before is not None and text != before:
        (folder / f"{name}.diff").write_text(difference(before, text, step.name))


def difference(before: str, after: str, step: str) -> str:
    """The lines that a pass changed, as a unified diff."""
    lines = difflib.unified_diff(
        before.splitlines(keepends=True),
        after.splitlines(keepends=True),
        f"before {step}",
        f"after {step}",
        n=1,
    )
    return "".join(lines)
