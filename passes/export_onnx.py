"""export_onnx: the folded graph -> an ONNX model, opset 21, standard domains only.

Needs `folded` and `split`. Lifts the graph into an `ExportedProgram` by hand, so that nothing is
traced a second time, and gives it to `torch.onnx.export` with one translation for each of the two
integer operators. Operators that the exporter does not know are decomposed one by one; a graph in
which it then cannot translate one's use is decomposed as a whole.
Guarantees `onnx`: float32 around int8 weights, dynamic batch.
"""

from __future__ import annotations

import torch

from gpusq_compile.compilation import Compilation
from gpusq_compile.errors import CheckFailed
from gpusq_compile.lowering.exporter_table import OPSET
from gpusq_compile.lowering.lift import UndecomposedProgram, lift
from gpusq_compile.lowering.to_onnx import to_onnx
from gpusq_compile.pass_base import Pass, PassResult
from gpusq_compile.remarks import analysis


def run(compilation: Compilation) -> PassResult:
    assert compilation.convention is not None
    result = PassResult(matched=1, changed=1)
    with torch.no_grad():
        try:
            program = lift(compilation.ir, compilation.convention, UndecomposedProgram)
            compilation.onnx_model = to_onnx(program, compilation.onnx_places)
        except CheckFailed as error:
            result.remarks.append(analysis("decomposed", f"not translated whole: {error.message}"))
            program = lift(compilation.ir, compilation.convention)
            try:
                compilation.onnx_model = to_onnx(program, compilation.onnx_places)
            except CheckFailed:
                raise error from None  # It names the operator that a person knows.
    nodes = len(compilation.onnx_model.graph.node)
    result.remarks.append(analysis("exported", f"{nodes} ONNX nodes, opset {OPSET}"))
    return result


PASS = Pass(
    name="export_onnx",
    summary="lower the graph to ONNX opset 21 with int8 weights",
    run=run,
    requires=("folded", "split"),
    ensures=("onnx",),
)
