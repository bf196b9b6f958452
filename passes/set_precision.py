"""set_precision: what is not quantized in the target's float type.

Needs `onnx_wired`. Float32 becomes FP16 where the rules' target says so, without a Cast beside a
quantizer; inputs and outputs stay float32, and so does what half has no room for: squares that are
summed, and whatever comes near to 65504 on a batch of the calibration data, where that is measured.
Guarantees `onnx_typed`.

Raises CheckFailed where a quantized GEMM's output is beyond half.
"""

from __future__ import annotations

from collections.abc import Mapping

import onnx

from gpusq_compile.compilation import Compilation
from gpusq_compile.errors import CheckFailed
from gpusq_compile.lowering.half_range import HALF_MAX, around, beyond, run_measured
from gpusq_compile.lowering.precision import to_half
from gpusq_compile.lowering.runtime import at_its_line
from gpusq_compile.output_cache import same
from gpusq_compile.pass_base import Pass, PassResult
from gpusq_compile.remarks import analysis, passed


def run(compilation: Compilation) -> PassResult:
    model = compilation.onnx_model
    assert model is not None
    result = PassResult()
    if compilation.rules.target.precision != "fp16":
        return result
    result.matched = result.changed = len(model.graph.node)
    with at_its_line(compilation.onnx_places):
        wide = wide_tensors(compilation, model)
        refuse_overflow(model, wide)
    kept = around(model, wide)
    compilation.onnx_model = to_half(model, kept)
    result.remarks.append(passed("fp16", "float tensors are FP16, inputs and outputs FP32"))
    if kept:
        places = dict.fromkeys(str(compilation.onnx_places.get(name, name)) for name in kept)
        text = (
            f"values up to {max(wide.values()):.3g}, of the {HALF_MAX:.0f} that FP16 has room for: "
            f"{len(kept)} operators stay FP32 ({', '.join(list(places)[:3])}"
            f"{', ...' if len(places) > 3 else ''})"
        )
        result.remarks.append(analysis("kept-fp32", text))
    return result


def wide_tensors(compilation: Compilation, model: onnx.ModelProto) -> dict[str, float]:
    """What half has no room for on the first batch that the file is verified with.

    Where that is the batch of the checks, the run after the surgery has shown it.
    """
    inputs, known = compilation.expected[0].inputs, compilation.measured
    if known is None or not same(known.inputs, inputs):
        known = run_measured(model, inputs, compilation.workdir / "ranges.onnx")
    return known.wide


def refuse_overflow(model: onnx.ModelProto, wide: Mapping[str, float]) -> None:
    """Raise CheckFailed for a quantized GEMM whose output half has no room for."""
    for node, largest in beyond(model, wide):
        raise CheckFailed(
            "half-overflow",
            f"the output of {node.name or node.op_type} reaches {largest:.3g}, beyond the "
            f"{HALF_MAX:.0f} of FP16",
            hint="target: {precision: fp32} in the rules keeps such a model in float32, and a rule "
            "with quantize: none this layer",
        )


PASS = Pass(
    name="set_precision",
    summary="FP16 around the quantized operators, where the target wants it",
    run=run,
    requires=("onnx_wired",),
    ensures=("onnx_typed",),
    rewrites_onnx=True,
)
