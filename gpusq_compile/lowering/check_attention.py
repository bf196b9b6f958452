"""Structural truth of the quantized attentions in the final ONNX file."""

from __future__ import annotations

import onnx

from gpusq_compile.attention_plan import AttentionPlan
from gpusq_compile.lowering.attention_wiring import MOVES
from gpusq_compile.lowering.check import StoredGraph, activation_faults
from gpusq_compile.quantization.fake_quantize import ACTIVATION_RANGES

FACTORS = (("query", "qk", 0), ("key", "qk", 1), ("softmax", "av", 0), ("value", "av", 1))


def check_attentions(model: onnx.ModelProto, plans: list[AttentionPlan]) -> list[str]:
    """The promises that the file breaks: all four factors are INT8, and so is what reads them."""
    graph = StoredGraph(model)
    return [f"{plan.name}: {fault}" for plan in plans for fault in _faults(graph, plan)]


def _faults(graph: StoredGraph, plan: AttentionPlan) -> list[str]:
    if plan.applied.activation is None:
        return []
    grid = ACTIVATION_RANGES[plan.applied.activation]
    faults: list[str] = []
    for what, product, index in FACTORS:
        node = graph.nodes.get(f"{plan.name}/{product}")
        if node is None:
            return [f"no node {plan.name}/{product} in the file"]
        for source in _sources(graph, node.input[index]):
            faults += activation_faults(graph, source, grid, what)
    readers = _readers(graph, graph.nodes[f"{plan.name}/av"].output[0])
    if not readers or any(node.op_type != "QuantizeLinear" for node in readers):
        faults.append("its output is not quantized")
    return list(dict.fromkeys(faults))


def _sources(graph: StoredGraph, tensor: str) -> list[onnx.NodeProto | None]:
    """What made the elements of a tensor, behind everything that moves data."""
    producer = graph.producers.get(tensor)
    if producer is None or producer.op_type not in MOVES:
        return [producer]
    inputs = producer.input if producer.op_type == "Concat" else producer.input[:1]
    return [source for name in inputs for source in _sources(graph, name)]


def _readers(graph: StoredGraph, tensor: str) -> list[onnx.NodeProto]:
    """What reads the elements of a tensor, behind everything that moves data."""
    found: list[onnx.NodeProto] = []
    for node in graph.users.get(tensor, []):
        moves = node.op_type in MOVES and node.input[0] == tensor
        found += (r for name in node.output for r in _readers(graph, name)) if moves else [node]
    return found
