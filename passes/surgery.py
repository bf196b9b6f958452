"""surgery: give the exported graph the form that TensorRT runs fast.

Needs `onnx`. For each planned layer: stores the weight as [K, N] in place of a Transpose at run
time, its scales turned with it, and names the GEMM and its Q/DQ nodes after the layer, so that an
engine's layer list speaks the user's names; likewise the two products of each quantized attention.
Guarantees `onnx_wired`.
"""

from __future__ import annotations

import onnx_graphsurgeon as gs

from gpusq_compile.attention_plan import planned_attentions
from gpusq_compile.compilation import Compilation
from gpusq_compile.errors import InternalError
from gpusq_compile.graph.edit import NAMESPACE
from gpusq_compile.lowering.attention_wiring import name_attention, softmax_scale
from gpusq_compile.lowering.wiring import (
    GEMM_OPS,
    consumers,
    name_batch,
    name_quantizers,
    untranspose,
)
from gpusq_compile.pass_base import Pass, PassResult
from gpusq_compile.plan import LayerPlan, Treatment, planned
from gpusq_compile.remarks import passed


def run(compilation: Compilation) -> PassResult:
    assert compilation.onnx_model is not None
    graph = gs.import_onnx(compilation.onnx_model)
    result = PassResult()
    tensors = graph.tensors()
    readers: dict[str, list[LayerPlan]] = {}
    for _, plan in planned(compilation.ir.graph):
        readers.setdefault(plan.weight, []).append(plan)
    order = {id(node): index for index, node in enumerate(graph.nodes)}
    for path, plans in readers.items():
        weight = tensors.get(path)
        if not isinstance(weight, gs.Constant):
            continue
        result.matched += len(plans)
        moved = untranspose(weight)
        gemms = [node for node in consumers(weight) if node.op in GEMM_OPS]
        if len(gemms) < len(plans):
            name = plans[len(gemms)].name
            raise InternalError("gemm-lost", f"no GEMM reads the weight of {name} any more")
        # The exporter keeps the order of the graph, so of those that share a weight the first
        # GEMM is the first layer's.
        for index, gemm in enumerate(sorted(gemms, key=lambda node: order[id(node)])):
            gemm.name = plans[index].name if index < len(plans) else f"{plans[0].name}#{index + 1}"
            name_quantizers(gemm)
        result.changed += len(plans)
        if moved:
            text = "weight stored as [K, N]"
            result.remarks += [passed("untransposed", text, plan.name) for plan in plans]
    for node, attention in planned_attentions(compilation.ir.graph):
        if attention.applied != Treatment():
            result.matched += 1
            result.changed += 1
            own = f"{NAMESPACE}.attention_scale."
            name_attention(tensors.get(softmax_scale(node)), attention.name, own)
    if compilation.source.dynamic_shapes is None:
        name_batch(graph)
    # No order but the exporter's, in which a weight is dequantized where it is read: by levels, all
    # of them would be first, and a runtime that keeps to the order would hold them all.
    graph.cleanup(remove_unused_graph_inputs=False)
    compilation.onnx_model = gs.export_onnx(graph, do_type_check=False)
    return result


PASS = Pass(
    name="surgery",
    summary="place Q/DQ and int8 weights as TensorRT wants them, and name GEMMs",
    run=run,
    requires=("onnx",),
    ensures=("onnx_wired",),
    rewrites_onnx=True,
)
