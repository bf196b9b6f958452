"""What TensorRT does with a layer that was compressed as its plan says.

Types decide which GEMM a layer becomes, and the pattern whether sparse kernels can run it. The
instructions behind them are those of PTX ISA, "mma.sp": FP16 and INT8 take two of four (2:4), TF32
one of two, INT4 pairs; TensorRT has no INT4 GEMM with INT4 activations, and reads INT4 weights only
in blocks, under float activations.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace
from typing import Literal, NamedTuple

from gpusq_compile.engine.sparse_causes import sparse_int8_writes_floats
from gpusq_compile.language.schema import Quantize, Sparsity
from gpusq_compile.plan import LayerPlan, Treatment
from gpusq_compile.sparsity import PATTERNS

Precision = Literal["fp16", "fp32"]
Kind = Literal[
    "sparse int8",
    "dense int8",
    "sparse fp16",
    "dense fp16",
    "dense fp32",
    "weight-only int4",
    "weight-only int8",
]

DENSE: dict[Precision, Kind] = {"fp16": "dense fp16", "fp32": "dense fp32"}
ACCURACY_ONLY = "accuracy and storage only: "


class Execution(NamedTuple):
    """`kind` is "sparse" or "dense" and the type that is multiplied, or "weight-only" and the type
    that is stored; `why` says how the plan leads to it."""

    kind: Kind
    why: str


def execution(plan: LayerPlan, precision: Precision, targets: Collection[str]) -> Execution:
    """What the engine makes of a layer, by what was applied to it.

    "sparse" says that there are sparse kernels for such operands and such a mask. Whether they are
    picked is the builder's choice, by time.

    Args:
        precision: the float type of what is not quantized.
        targets: the GPUs of the engines ("sm86"); what not all of them have is not counted on.
    """
    applied = plan.applied
    if applied == Treatment():
        return Execution(DENSE[precision], "the layer was left as it is")
    if applied.weight and applied.activation:
        return _integer(applied, targets)
    if applied.weight:
        return _weight_only(plan, precision)
    return _float(applied, precision)


def intended(plan: LayerPlan) -> LayerPlan:
    """The plan once what the rules ask and the layer allows has been applied."""
    return replace(plan, applied=treatment(plan.sparsity, plan.quantize))


def treatment(sparsity: Sparsity | None, quantize: Quantize | None) -> Treatment:
    """What two blocks of the rules ask for."""
    return Treatment(
        sparsity=sparsity.pattern if sparsity else None,
        weight=_type(quantize.weight) if quantize else None,
        activation=_type(quantize.activation) if quantize else None,
        output=_type(quantize.output) if quantize else None,
    )


def _type(name: str) -> str | None:
    return None if name == "none" else name


def takes_sparse_kernels(sparsity: str | None) -> bool:
    """Whether the masks of a pattern are 2:4, what the sparse FP16 and INT8 kernels read."""
    return sparsity is not None and PATTERNS["2:4"].allows(PATTERNS[sparsity])


def misses_int4_hardware(applied: Treatment) -> bool:
    """Whether a layer is 4-bit throughout, but its mask not one that sparse INT4 hardware reads."""
    if applied.sparsity is None or (applied.weight, applied.activation) != ("int4", "int4"):
        return False
    return not PATTERNS["pair4:8"].allows(PATTERNS[applied.sparsity])


def _integer(applied: Treatment, targets: Collection[str]) -> Execution:
    operands = {"weights": applied.weight, "activations": applied.activation}
    four = [name for name, type_ in operands.items() if type_ == "int4"]
    values = f"4-bit {' and '.join(four)} in INT8 containers; " if four else ""
    if applied.sparsity is None:
        return Execution("dense int8", f"{values}INT8 operands, and the weight is dense")
    if not takes_sparse_kernels(applied.sparsity):
        return Execution("dense int8", f"{ACCURACY_ONLY}{values}{_for_int4_only(applied)}")
    why = f"{values}sparse INT8 kernels take a {applied.sparsity} mask"
    if applied.output is None:
        if not sparse_int8_writes_floats(targets):
            why = (
                f"{ACCURACY_ONLY}{values}no sparse INT8 kernel of these GPUs writes floats: "
                "`output: auto` or `int8`"
            )
            return Execution("dense int8", why)
        why += ", and those of compute capability 9.0 write floats"
    if misses_int4_hardware(applied):
        why += f"; sparse INT4 tensor cores take pairs, not {applied.sparsity}"
    return Execution("sparse int8", why)


def _weight_only(plan: LayerPlan, precision: Precision) -> Execution:
    mask = plan.applied.sparsity
    four_bits = plan.applied.weight == "int4"
    in_blocks = four_bits and plan.quantize is not None and plan.quantize.block is not None
    stored = "INT4" if in_blocks else "4-bit values in INT8" if four_bits else "INT8"
    why = f"the weight is stored as {stored}, and multiplied as {precision} by dense kernels"
    if mask is not None:
        why = f"{ACCURACY_ONLY}{why}, which skip no zeros"
    return Execution("weight-only int4" if in_blocks else "weight-only int8", why)


def _float(applied: Treatment, precision: Precision) -> Execution:
    operands = "" if applied.activation is None else "the weight stays in float; "
    if applied.sparsity is None:
        return Execution(DENSE[precision], f"{operands}float operands, and the weight is dense")
    if precision == "fp32":
        why = "sparse kernels take two of four in FP16 and INT8, not in FP32"
        return Execution("dense fp32", f"{ACCURACY_ONLY}{operands}{why}")
    if not takes_sparse_kernels(applied.sparsity):
        return Execution("dense fp16", f"{ACCURACY_ONLY}{operands}{_for_int4_only(applied)}")
    why = f"{operands}sparse FP16 kernels take a {applied.sparsity} mask"
    return Execution("sparse fp16", why)


def _for_int4_only(applied: Treatment) -> str:
    return f"{applied.sparsity} is for sparse INT4 tensor cores, and TensorRT has no kernel for it"
