"""The rewriting passes, one a file, and the order in which the compiler runs them."""

from __future__ import annotations

from collections.abc import Sequence

from gpusq_compile.errors import InputError, Location
from gpusq_compile.pass_base import Pass
from gpusq_compile.passes import (
    build_engine,
    canonicalize,
    export_onnx,
    finetune_quantized,
    finetune_sparse,
    fold,
    mark,
    pack,
    permute,
    quantize,
    reconstruct,
    set_precision,
    smooth,
    sparsify,
    split_attention,
    split_outputs,
    store_int4,
    surgery,
    tap,
    trace,
    verify_onnx,
)

ANALYSIS: tuple[Pass, ...] = (trace.PASS, canonicalize.PASS, mark.PASS, split_attention.PASS)
"""What a dry run runs: the graph, and what the rules decide for it."""

COMPRESSION: dict[str, Pass] = {
    step.name: step
    for step in (
        permute.PASS,
        tap.PASS,
        sparsify.PASS,
        finetune_sparse.PASS,
        smooth.PASS,
        quantize.PASS,
        reconstruct.PASS,
        finetune_quantized.PASS,
    )
}
"""The passes whose order the rules' `passes` may change, by name, in their default order."""

LOWERING: tuple[Pass, ...] = (
    fold.PASS,
    split_outputs.PASS,
    export_onnx.PASS,
    surgery.PASS,
    set_precision.PASS,
    store_int4.PASS,
    verify_onnx.PASS,
    pack.PASS,
    build_engine.PASS,
)

PIPELINE: tuple[Pass, ...] = (*ANALYSIS, *COMPRESSION.values(), *LOWERING)


def ordered(names: Sequence[str], place: Location | None = None) -> tuple[Pass, ...]:
    """The whole pipeline with the compressing passes in the order of the rules' `passes`.

    Raises:
        InputError: a pass is missing or named twice, or cannot run at its place; says why.
    """
    twice = [name for name in COMPRESSION if names.count(name) > 1]
    if twice:
        raise InputError(
            "pass-twice", f"passes: '{twice[0]}' stands in the list twice", location=place
        )
    missing = [name for name in COMPRESSION if name not in names]
    if missing:
        raise InputError(
            "pass-missing",
            f"passes: '{missing[0]}' is not in the list",
            location=place,
            hint="a pass that no rule asks for does nothing; list all of them, in any legal order: "
            + ", ".join(COMPRESSION),
        )
    pipeline = (*ANALYSIS, *(COMPRESSION[name] for name in names), *LOWERING)
    hint = f"the default order is {', '.join(COMPRESSION)}"
    facts: set[str] = set()
    for step in pipeline:
        for fact, reason in step.forbids.items():
            if fact in facts:
                raise InputError(
                    "pass-order",
                    f"passes: '{step.name}' comes too late: {reason}",
                    location=place,
                    hint=hint,
                )
        for fact in step.requires:
            if fact not in facts:
                makers = [other.name for other in pipeline if fact in other.ensures]
                raise InputError(
                    "pass-order",
                    f"passes: '{step.name}' comes too early: it needs what "
                    f"'{makers[0]}' makes ('{fact}')",
                    location=place,
                    hint=hint,
                )
        facts -= set(step.removes)
        facts |= set(step.ensures)
    return pipeline
