"""Scatters that combine what meets at one place, in terms that ONNX has."""

from __future__ import annotations

from typing import Any

import torch
import torch.fx

from gpusq_compile.graph.edit import insert_call
from gpusq_compile.graph.query import aten

NEUTRAL = {"sum": 0.0, "prod": 1.0}
"""What a place starts from that does not count itself."""


def spell_out_scatter(graph_module: torch.fx.GraphModule, node: torch.fx.Node) -> bool:
    """`scatter_reduce` of a mean, or without what is there -> scatters that add, and `where`.

    ONNX's ScatterElements adds, multiplies, or takes the largest or smallest, always together with
    what is there; the exporter drops what else is asked for. `amax` and `amin` without what is
    there start from the value that loses against any.
    Source: torch.Tensor.scatter_reduce_; ONNX ScatterElements, opset 18.
    """
    if node.target is not aten.scatter_reduce.two:
        return False
    place: Any = node.args
    base, dim, index, source, reduce = place
    includes_self = bool(node.kwargs.get("include_self", True))
    value = node.meta["val"]
    if not value.is_floating_point() or (includes_self and reduce != "mean"):
        return False
    graph = node.graph

    def call(target: Any, *args: Any) -> torch.fx.Node:
        return insert_call(graph, target, args, provenance=node)

    with graph.inserting_before(node):
        ones = call(aten.ones_like.default, source)
        zeros = call(aten.zeros_like.default, base)
        count = call(aten.scatter_add.default, zeros, dim, index, ones)
        if reduce == "mean":
            start = base if includes_self else zeros
            total = call(aten.scatter_add.default, start, dim, index, source)
            shares = (
                call(aten.add.Tensor, count, 1.0)
                if includes_self
                else call(aten.clamp_min.default, count, 1.0)
            )
            result = call(aten.div.Tensor, total, shares)
        else:
            largest = torch.finfo(value.dtype).max
            first = {**NEUTRAL, "amax": -largest, "amin": largest}[reduce]
            start = call(aten.full_like.default, base, first)
            result = call(aten.scatter_reduce.two, start, dim, index, source, reduce)
        if not includes_self:
            hit = call(aten.gt.Scalar, count, 0.0)
            result = call(aten.where.self, hit, result, base)
    node.replace_all_uses_with(result)
    graph.erase_node(node)
    return True
