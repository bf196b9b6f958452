"""Normalizations in terms that every ONNX runtime knows."""

from __future__ import annotations

from typing import Any

import torch
import torch.fx

from gpusq_compile.graph.edit import insert_call
from gpusq_compile.graph.query import aten


def spell_out_rms_norm(graph_module: torch.fx.GraphModule, node: torch.fx.Node) -> bool:
    """`rms_norm(x, shape, weight, eps)` -> `x * rsqrt(mean(x * x) + eps) * weight`.

    Source: torch.nn.RMSNorm; ONNX has RMSNormalization from opset 23 on.
    """
    if node.target is not aten.rms_norm.default:
        return False
    arguments: Any = (*node.args, *(None, None)[len(node.args) - 2 :])
    x, normalized, weight, eps = arguments
    weight, eps = node.kwargs.get("weight", weight), node.kwargs.get("eps", eps)
    if eps is None:
        eps = torch.finfo(node.meta["val"].dtype).eps
    axes = [-axis for axis in range(len(normalized), 0, -1)]
    graph = node.graph
    with graph.inserting_before(node):
        squares = insert_call(graph, aten.mul.Tensor, (x, x), provenance=node)
        mean = insert_call(graph, aten.mean.dim, (squares, axes, True), provenance=node)
        shifted = insert_call(graph, aten.add.Tensor, (mean, eps), provenance=node)
        factor = insert_call(graph, aten.rsqrt.default, (shifted,), provenance=node)
        result = insert_call(graph, aten.mul.Tensor, (x, factor), provenance=node)
        if weight is not None:
            result = insert_call(graph, aten.mul.Tensor, (result, weight), provenance=node)
    node.replace_all_uses_with(result)
    graph.erase_node(node)
    return True
