"""Rewrites that bring products and attention, however they were written, to one form each.

Every function takes a node and returns whether it rewrote it; each is exact.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.fx

from gpusq_compile.graph.attention import fused_arguments
from gpusq_compile.graph.edit import insert_call, replace
from gpusq_compile.graph.products import FUSED_ATTENTION
from gpusq_compile.graph.query import aten, shape_of
from gpusq_compile.graph.stored_weights import TRANSPOSITIONS, is_moved_parameter, order_of

MATRIX_PRODUCTS: frozenset[object] = frozenset({aten.matmul.default, aten.mm.default})
ADDED_PRODUCTS: frozenset[object] = frozenset({aten.baddbmm.default, aten.addmm.default})
ENGINE_AXES = 4
"""Axes of queries, keys and values in fused attention: [batch, heads, tokens, channels]."""


def added_product_to_matmul(graph_module: torch.fx.GraphModule, node: torch.fx.Node) -> bool:
    """`baddbmm(bias, a, b)` and `addmm` -> `beta * bias + alpha * (a @ b)`.

    An `addmm` that adds what a linear does, a bias per output, is left for `product_to_linear`.
    """
    if node.target not in ADDED_PRODUCTS or _adds_as_linear(node):
        return False
    bias, first, second = node.args[:3]
    beta, alpha = node.kwargs.get("beta", 1), node.kwargs.get("alpha", 1)
    graph = node.graph
    with graph.inserting_before(node):
        value = insert_call(graph, aten.matmul.default, (first, second), provenance=node)
        if alpha != 1:
            value = insert_call(graph, aten.mul.Tensor, (value, alpha), provenance=node)
        if beta != 0:  # Of what beta 0 leaves out even NaN is ignored.
            if beta != 1:
                bias = insert_call(graph, aten.mul.Tensor, (bias, beta), provenance=node)
            value = insert_call(graph, aten.add.Tensor, (value, bias), provenance=node)
    replace(node, value)
    return True


def _adds_as_linear(node: torch.fx.Node) -> bool:
    """Whether an `addmm` adds one number to each output, once."""
    bias = node.args[0]
    assert isinstance(bias, torch.fx.Node)
    return node.target is aten.addmm.default and not node.kwargs and len(shape_of(bias) or ()) == 1


def turn_left_product(graph_module: torch.fx.GraphModule, node: torch.fx.Node) -> bool:
    """`weight @ x`, as where tokens are mixed -> `(x.mT @ weight.T).mT`, a product for
    `product_to_linear`."""
    if node.target not in MATRIX_PRODUCTS:
        return False
    factor, value = node.args[:2]
    assert isinstance(value, torch.fx.Node)
    if not _is_stored_matrix(graph_module, factor) or len(shape_of(value) or ()) < 2:
        return False
    if is_moved_parameter(graph_module, value):
        return False
    graph = node.graph

    def call(target: Any, *arguments: Any) -> torch.fx.Node:
        return insert_call(graph, target, arguments, provenance=node)

    with graph.inserting_before(node):
        rows = call(aten.transpose.int, value, -2, -1)
        weight = call(aten.transpose.int, factor, 0, 1)
        product = call(aten.matmul.default, rows, weight)
        replace(node, call(aten.transpose.int, product, -2, -1))
    return True


def product_to_linear(graph_module: torch.fx.GraphModule, node: torch.fx.Node) -> bool:
    """`x @ weight.T` and `addmm(bias, x, weight.T)` -> `linear(x, weight, bias)`.

    A weight of [in, out] is transposed in the graph then, until it is stored so.
    """
    if node.target in MATRIX_PRODUCTS:
        value, factor, bias = node.args[0], node.args[1], None
    elif node.target is aten.addmm.default and _adds_as_linear(node):
        bias, value, factor = node.args[:3]
    else:
        return False
    assert isinstance(value, torch.fx.Node)
    assert isinstance(factor, torch.fx.Node)
    if not _is_stored_matrix(graph_module, factor) or len(shape_of(value) or ()) < 2:
        return False
    graph = node.graph
    with graph.inserting_before(node):
        if factor.target in TRANSPOSITIONS and order_of(factor, 2) == [1, 0]:
            weight = factor.all_input_nodes[0]
        else:
            weight = insert_call(graph, aten.transpose.int, (factor, 0, 1), provenance=node)
        arguments = (value, weight) if bias is None else (value, weight, bias)
        linear = insert_call(graph, aten.linear.default, arguments, provenance=node)
    replace(node, linear)
    return True


def _is_stored_matrix(graph_module: torch.fx.GraphModule, factor: object) -> bool:
    assert isinstance(factor, torch.fx.Node)
    return len(shape_of(factor) or ()) == 2 and is_moved_parameter(graph_module, factor)


def attention_to_four_axes(graph_module: torch.fx.GraphModule, node: torch.fx.Node) -> bool:
    """Fused attention over other than [batch, heads, tokens, channels] -> over these four axes.

    Of a missing axis there is one head; leading axes beyond two become one, where their sizes are
    static and no mask differs along them.
    """
    if node.target not in FUSED_ATTENTION or node.kwargs.get("enable_gqa"):
        return False
    given = fused_arguments(node)
    parts = [given[name] for name in ("query", "key", "value")]
    shapes = [tuple(shape_of(part) or ()) for part in parts]
    mask_axes = len(shape_of(given["attn_mask"]) or ()) if given["attn_mask"] is not None else 0
    graph = node.graph
    if {len(shape) for shape in shapes} == {3} and mask_axes <= 3:

        def widened(value: torch.fx.Node) -> torch.fx.Node:
            return insert_call(graph, aten.unsqueeze.default, (value, 1), provenance=node)

        with graph.inserting_before(node):
            mask = given["attn_mask"]
            mask = widened(mask) if mask_axes == 3 else mask
            wide = {part: widened(part) for part in dict.fromkeys(parts)}
            fused = _attend(node, [wide[part] for part in parts], mask)
            replace(node, insert_call(graph, aten.squeeze.dim, (fused, 1), provenance=node))
        return True
    static = all(isinstance(size, int) for shape in shapes for size in shape[1:])
    same = len({tuple(str(size) for size in shape[:-2]) for shape in shapes}) == 1
    if len(shapes[0]) <= ENGINE_AXES or not static or not same or mask_axes > 2:
        return False

    def reshaped(value: torch.fx.Node, sizes: list[Any]) -> torch.fx.Node:
        return insert_call(graph, aten.reshape.default, (value, [-1, *sizes]), provenance=node)

    with graph.inserting_before(node):
        flat = [reshaped(part, list(shape[-3:])) for part, shape in zip(parts, shapes, strict=True)]
        fused = _attend(node, flat, given["attn_mask"])
        replace(node, reshaped(fused, list((shape_of(node) or ())[1:])))
    return True


def _attend(
    node: torch.fx.Node, parts: list[torch.fx.Node], mask: torch.fx.Node | None
) -> torch.fx.Node:
    """The same fused attention of other queries, keys, values and mask."""
    given = fused_arguments(node)
    arguments = (*parts, mask, given["dropout_p"], given["is_causal"])
    fused = insert_call(node.graph, node.target, arguments, provenance=node)
    if given["scale"] is not None:
        fused.kwargs = {"scale": given["scale"]}
    return fused
