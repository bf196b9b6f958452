"""Scatters that combine what meets at one place, in terms that ONNX has."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.fx

from gpusq_compile.errors import InputError
from gpusq_compile.graph.edit import insert_call, replace
from gpusq_compile.graph.query import aten, place_of, static_shape

NEUTRAL = {"sum": 0.0, "prod": 1.0, "amax": -math.inf, "amin": math.inf}
"""What a place starts from that does not count itself."""


SCATTERS = frozenset({aten.scatter.src, aten.scatter_add.default, aten.scatter_reduce.two})
"""Each takes (base, dim, index, source, ...)."""


def cut_to_index(graph_module: torch.fx.GraphModule, node: torch.fx.Node) -> bool:
    """A scatter whose index is smaller than its source -> one of the part that the index reaches.

    ONNX has no other: its indices and updates are of one shape.
    Source: torch.Tensor.scatter_; ONNX ScatterElements.
    """
    if node.target not in SCATTERS:
        return False
    place: Any = node.args
    _, _, index, source, *_ = place
    wholes, parts = static_shape(source) or (), static_shape(index) or ()
    smaller = [
        (axis, part)
        for axis, (whole, part) in enumerate(zip(wholes, parts, strict=False))
        if whole is not None and part is not None and part < whole
    ]
    with node.graph.inserting_before(node):
        for axis, part in smaller:
            cut = (source, axis, 0, part)
            source = insert_call(node.graph, aten.slice.Tensor, cut, provenance=node)
    node.update_arg(3, source)
    return bool(smaller)


def spell_out_scatter(graph_module: torch.fx.GraphModule, node: torch.fx.Node) -> bool:
    """`scatter_reduce` of a mean, or without what is there -> scatters that add, and `where`.

    ONNX's ScatterElements adds, multiplies, or takes the largest or smallest, always together with
    what is there, and has no mean. Of floats, `amax` and `amin` without what is there start from
    the infinity that loses against any; integers are left to the exporter.

    Raises:
        InputError: a mean of integers, which rounds as nothing in ONNX does.

    Source: torch.Tensor.scatter_reduce_; ONNX ScatterElements, opset 18.
    """
    if node.target is not aten.scatter_reduce.two:
        return False
    place: Any = node.args
    base, dim, index, source, reduce = place
    includes_self = bool(node.kwargs.get("include_self", True))
    value = node.meta["val"]
    if not value.is_floating_point() and reduce == "mean":
        raise InputError(
            "operator-unsupported",
            f"ONNX has no mean of {value.dtype} values that meet at one place",
            location=place_of(node),
            hint="take the mean of floats: `.float()` before the scatter",
        )
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
            shares = (
                call(aten.add.Tensor, count, 1.0)
                if includes_self
                else call(aten.clamp_min.default, count, 1.0)
            )
            # Divided before they are added, since half has no room for the sum of many.
            start = call(aten.div.Tensor, base, shares) if includes_self else zeros
            share_of_each = call(aten.gather.default, shares, dim, index)
            parts = call(aten.div.Tensor, source, share_of_each)
            result = call(aten.scatter_add.default, start, dim, index, parts)
        else:
            start = call(aten.full_like.default, base, NEUTRAL[reduce])
            result = call(aten.scatter_reduce.two, start, dim, index, source, reduce)
        if not includes_self:
            hit = call(aten.gt.Scalar, count, 0.0)
            result = call(aten.where.self, hit, result, base)
    replace(node, result)
    return True
