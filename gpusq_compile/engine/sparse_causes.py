"""Why TensorRT did not take a sparse kernel for a layer that was pruned for one.

The builder says which layers it found eligible and which it picked, never why. The causes here are
what is known to keep a kernel away, each with its source:

- Weights and sizes: "Working with Sparsity" in the TensorRT developer guide. Of every four weights
  along the reduction axis two are zero; sparse INT8 kernels read 32 input channels at a time, FP16
  ones 16.
- Sizes below 256: github.com/NVIDIA/TensorRT, issue 3849.
- Float outputs: TensorRT's kernel names. Those of compute capability 8.x multiply sparse INT8
  weights into INT8 outputs alone, those of 9.0 into FP16 and FP32 too.
- INT4 weights under float activations are dequantized to a dense operand first.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from gpusq_compile.engine.report import Answer
from gpusq_compile.sparsity import PATTERNS, REDUCTION_AXIS

MIN_SIZE = 256
"""Input and output features from which sparse kernels win over dense ones."""

ALIGNMENT = {"int8": 32, "fp16": 16, "fp32": 8}
"""Input and output features are a multiple of this, by the type of the operands."""

FLOAT_OUTPUT_TARGETS = frozenset({"sm90"})
"""GPUs whose sparse INT8 kernels write float outputs as well."""


def sparse_int8_writes_floats(targets: Collection[str]) -> bool:
    """Whether all of these GPUs have sparse INT8 kernels with float outputs; False of none."""
    return bool(targets) and FLOAT_OUTPUT_TARGETS.issuperset(targets)


@dataclass(frozen=True)
class SparseLayer:
    """A pruned layer as the rules treated it, and what the engine made of it.

    `shape` is the weight's, [out, in] or [out, in, kh, kw]. `weight`, `activation` and `output` are
    the integer types that were applied, None for float, which is `precision`. `engine_type` is the
    type in which the engine multiplies ("int8", "fp16", ..., "unknown") and `type_reason` why it is
    not the planned one.
    """

    pattern: str
    op: str
    role: str | None
    shape: tuple[int, ...]
    weight: str | None
    activation: str | None
    output: str | None
    precision: str = "fp16"
    eligible: Answer = "unknown"
    engine_type: str = "unknown"
    type_reason: str | None = None


@dataclass(frozen=True)
class Cause:
    """A stable kebab-case `code` and the sentence for the report."""

    code: str
    text: str


def sparse_causes(
    layer: SparseLayer, targets: Sequence[str] = (), *, sparse_flag: bool | None = None
) -> tuple[Cause, ...]:
    """Every known cause that applies to a layer that was not picked, those that rule it out first.

    `targets` are the GPUs of the engine ("sm86"; none known: any). `sparse_flag` says whether the
    builder was allowed sparse kernels at all, None where that is not known. Where nothing known
    applies, the one cause is `dense-faster`, or `unexplained` for a layer that was not eligible.
    """
    if sparse_flag is False:
        return (
            Cause("flag-off", "the engine was built without sparse kernels (--sparsity=enable)"),
        )
    found = _impossible(layer)
    if not any(cause.code in ("weight-only", "few-channels") for cause in found):
        found += _unlikely(layer, targets)
    if found:
        return tuple(found)
    if layer.eligible == "no":
        text = "the builder found it not eligible, and none of the known causes applies"
        return (Cause("unexplained", text),)
    certain = "" if layer.eligible == "yes" else "no known cause applies: most likely "
    return (Cause("dense-faster", f"{certain}a dense kernel was faster"),)


def _impossible(layer: SparseLayer) -> list[Cause]:
    """What leaves no sparse kernel to choose."""
    found = []
    if layer.eligible != "yes" and not PATTERNS["2:4"].allows(PATTERNS[layer.pattern]):
        text = f"{layer.pattern} masks are not 2:4, and TensorRT has sparse kernels for 2:4 alone"
        found.append(Cause("pattern-not-2:4", text))
    if layer.weight is not None and layer.activation is None:
        text = f"{layer.weight} weights under float activations run on dense kernels"
        return [*found, Cause("weight-only", text)]
    if layer.op == "conv2d" and _inputs(layer) < _alignment(layer):
        text = (
            f"a convolution of {_inputs(layer)} input channels, where sparse {_operands(layer)} "
            f"kernels read {_alignment(layer)} at a time"
        )
        found.append(Cause("few-channels", text))
    elif any(size % _alignment(layer) for size in (_inputs(layer), _outputs(layer))):
        text = (
            f"{_sizes(layer)} is not aligned to {_alignment(layer)}, as sparse "
            f"{_operands(layer)} kernels need"
        )
        found.append(Cause("unaligned", text))
    if _operands(layer) == "int8" and layer.engine_type not in ("int8", "unknown"):
        found.append(_lost_int8(layer))
    return found


def _lost_int8(layer: SparseLayer) -> Cause:
    if _is_fused_qkv(layer):
        text = (
            f"a fused QKV layer that is cut in float loses INT8 (it is {layer.engine_type} in the "
            "engine): quantize its output, or give its block `split: true`"
        )
        return Cause("fused-qkv", text)
    why = f": {layer.type_reason}" if layer.type_reason else ""
    return Cause("not-int8", f"it is {layer.engine_type} in the engine, not int8{why}")


def _unlikely(layer: SparseLayer, targets: Sequence[str]) -> list[Cause]:
    """What leaves no sparse kernel that is fast, or none on these GPUs."""
    found = []
    float_output = layer.output is None and _operands(layer) == "int8"
    if float_output and not sparse_int8_writes_floats(targets):
        text = (
            "its output is not INT8, and only sm90 has sparse INT8 kernels with float outputs: "
            "write `output: int8` or `auto`"
        )
        found.append(Cause("output-not-int8", text))
    if min(_inputs(layer), _outputs(layer)) < MIN_SIZE:
        text = f"{_sizes(layer)} is below {MIN_SIZE}, where sparse kernels rarely win"
        found.append(Cause("small", text))
    return found


def _operands(layer: SparseLayer) -> str:
    return "int8" if layer.weight is not None else layer.precision


def _alignment(layer: SparseLayer) -> int:
    return ALIGNMENT[_operands(layer)]


def _inputs(layer: SparseLayer) -> int:
    return layer.shape[REDUCTION_AXIS]


def _outputs(layer: SparseLayer) -> int:
    return layer.shape[0]


def _sizes(layer: SparseLayer) -> str:
    return f"K x N = {_inputs(layer)} x {_outputs(layer)}"


def _is_fused_qkv(layer: SparseLayer) -> bool:
    """Whether one GEMM computes two or three of Q, K and V, to be cut apart in float."""
    parts = _outputs(layer) // _inputs(layer)
    return layer.role == "attention_qkv" and layer.output is None and parts in (2, 3)
