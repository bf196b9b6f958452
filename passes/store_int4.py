"""store_int4: weights with block scales in 4 bits.

Needs `onnx_typed`: nothing that rewires the model may follow, for onnx-graphsurgeon neither reads
nor writes INT4. Guarantees `onnx_final`.
"""

from __future__ import annotations

from gpusq_compile.compilation import Compilation
from gpusq_compile.lowering.int4 import store_as_int4
from gpusq_compile.pass_base import Pass, PassResult
from gpusq_compile.plan import planned
from gpusq_compile.remarks import passed


def run(compilation: Compilation) -> PassResult:
    assert compilation.onnx_model is not None
    weights = [
        plan.weight
        for _, plan in planned(compilation.ir.graph)
        if plan.applied.weight is not None and plan.quantize and plan.quantize.block
    ]
    result = PassResult(matched=len(weights), changed=len(weights))
    if weights:
        store_as_int4(compilation.onnx_model, weights)
        result.remarks.append(passed("int4", f"{len(weights)} weights are stored in 4 bits"))
    compilation.onnx_model.producer_name = "gpusq-compile"
    return result


PASS = Pass(
    name="store_int4",
    summary="store weights with block scales in 4 bits",
    run=run,
    requires=("onnx_typed",),
    ensures=("onnx_final",),
    rewrites_onnx=True,
)
