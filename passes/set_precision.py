"""set_precision: what is not quantized in the target's float type.

Needs `onnx_wired`. Float32 becomes FP16 where the rules' target says so, without a Cast beside a
quantizer; inputs and outputs stay float32. Guarantees `onnx_typed`.
"""

from __future__ import annotations

from gpusq_compile.compilation import Compilation
from gpusq_compile.lowering.precision import to_half
from gpusq_compile.pass_base import Pass, PassResult
from gpusq_compile.remarks import passed


def run(compilation: Compilation) -> PassResult:
    assert compilation.onnx_model is not None
    result = PassResult()
    if compilation.rules.target.precision == "fp16":
        result.matched = result.changed = len(compilation.onnx_model.graph.node)
        compilation.onnx_model = to_half(compilation.onnx_model)
        result.remarks.append(passed("fp16", "float tensors are FP16, inputs and outputs FP32"))
    return result


PASS = Pass(
    name="set_precision",
    summary="FP16 around the quantized operators, where the target wants it",
    run=run,
    requires=("onnx_wired",),
    ensures=("onnx_typed",),
    rewrites_onnx=True,
)
