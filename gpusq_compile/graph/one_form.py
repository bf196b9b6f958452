"""Rewrites that bring products and attention, however they were written, to one form each.

Every function takes a node and returns whether it rewrote it; each is exact.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.fx

from gpusq_compile.graph.attention import fused_arguments
from gpusq_compile.graph.edit import insert_call
from gpusq_compile.graph.products import FUSED_ATTENTION
from gpusq_compile.graph.query import aten, shape_of, tensor_attribute

TRANSPOSITIONS: frozenset[object] = frozenset(
    {aten.t.default, aten.numpy_T.default, aten.transpose.int, aten.permute.default}
)
MATRIX_PRODUCTS: frozenset[object] = frozenset({aten.matmul.default, aten.mm.default})
ENGINE_AXES = 4
"""Axes of queries, keys and values in fused attention: [batch, heads, tokens, channels]."""


def baddbmm_to_matmul(graph_module: torch.fx.GraphModule, node: torch.fx.Node) -> bool:
    """`baddbmm(bias, a, b)` -> `beta * bias + alpha * (a @ b)`."""
    if node.target is not aten.baddbmm.default:
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
    _replace(node, value)
    return True


def einsum_to_matmul(graph_module: torch.fx.GraphModule, node: torch.fx.Node) -> bool:
    """An `einsum` of two factors that is a batch of matrix products -> permute, matmul, permute.

    That is one summed index, and one index that is each factor's alone; with a matrix for the one
    factor, such as a stored weight, any number of them that are the other's alone.
    """
    if node.target is not aten.einsum.default:
        return False
    equation, operands = node.args[:2]
    assert isinstance(equation, str)
    assert isinstance(operands, (list, tuple))
    if len(operands) != 2 or not all(isinstance(n, torch.fx.Node) for n in operands):
        return False
    labels = _labels(equation, [len(shape_of(n) or ()) for n in operands])  # type: ignore[arg-type]
    if labels is None:
        return False
    first, second, result = labels
    if len(first) == 2 and len(second) > 2:
        operands, first, second = operands[::-1], second, first
    batch = [label for label in result if label in first and label in second]
    summed = [label for label in first if label in second and label not in result]
    rows = [label for label in first if label not in second]
    columns = [label for label in second if label not in first]
    one_product = len(summed) == len(columns) == 1 and (len(rows) == 1 or (rows and not batch))
    if not one_product or set(result) != {*batch, *rows, *columns}:
        return False
    if any(len(set(part)) != len(part) for part in labels):
        return False
    lengths = [
        (shape_of(operand) or ())[part.index(summed[0])]
        for operand, part in zip(operands, (first, second), strict=True)
    ]
    if lengths[0] != lengths[1]:
        return False  # One of them is broadcast, which no matmul does along its sum.
    graph = node.graph

    def ordered(value: Any, have: str, want: list[str]) -> Any:
        order = [have.index(label) for label in want]
        if order == sorted(order):
            return value
        return insert_call(graph, aten.permute.default, (value, order), provenance=node)

    with graph.inserting_before(node):
        left = ordered(operands[0], first, [*batch, *rows, *summed])
        right = ordered(operands[1], second, [*batch, *summed, *columns])
        product = insert_call(graph, aten.matmul.default, (left, right), provenance=node)
        value = ordered(product, "".join([*batch, *rows, *columns]), list(result))
    _replace(node, value)
    return True


def _labels(equation: str, axes: list[int]) -> tuple[str, str, str] | None:
    """The labels of both factors and the result, `...` spelled out; None where that is unclear."""
    sides = equation.replace(" ", "").split("->")
    inputs = sides[0].split(",")
    if len(sides) != 2 or len(inputs) != 2:
        return None
    parts = [*inputs, sides[1]]
    if not any("..." in part for part in parts):
        return parts[0], parts[1], parts[2]
    hidden = {n - len(part) + 3 for part, n in zip(inputs, axes, strict=True) if "..." in part}
    if len(hidden) != 1 or "..." not in sides[1]:
        return None
    free = [label for label in "ABCDEFGHIJ" if label not in equation][: hidden.pop()]
    first, second, result = (part.replace("...", "".join(free)) for part in parts)
    return first, second, result


def product_to_linear(graph_module: torch.fx.GraphModule, node: torch.fx.Node) -> bool:
    """`x @ weight.T` and `addmm(bias, x, weight.T)` -> `linear(x, weight, bias)`.

    A weight stored as [in, out] is transposed in the graph then.
    """
    if node.target in MATRIX_PRODUCTS:
        value, factor, bias = node.args[0], node.args[1], None
    elif node.target is aten.addmm.default and not node.kwargs:
        bias, value, factor = node.args[:3]
        if not isinstance(bias, torch.fx.Node) or len(shape_of(bias) or ()) != 1:
            return False
    else:
        return False
    if not isinstance(factor, torch.fx.Node) or len(shape_of(factor) or ()) != 2:
        return False
    stored = factor.args[0] if factor.target in TRANSPOSITIONS else factor
    assert isinstance(value, torch.fx.Node)
    if not _is_parameter(graph_module, stored) or len(shape_of(value) or ()) < 2:
        return False
    graph = node.graph
    with graph.inserting_before(node):
        if stored is factor:
            weight = insert_call(graph, aten.transpose.int, (factor, 0, 1), provenance=node)
        else:
            weight = stored  # type: ignore[assignment]
        arguments = (value, weight) if bias is None else (value, weight, bias)
        linear = insert_call(graph, aten.linear.default, arguments, provenance=node)
    _replace(node, linear)
    return True


def _is_parameter(graph_module: torch.fx.GraphModule, node: object) -> bool:
    return (
        isinstance(node, torch.fx.Node)
        and node.op == "get_attr"
        and isinstance(tensor_attribute(graph_module, str(node.target)), torch.nn.Parameter)
    )


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
            _replace(node, insert_call(graph, aten.squeeze.dim, (fused, 1), provenance=node))
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
        _replace(node, reshaped(fused, list((shape_of(node) or ())[1:])))
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


def _replace(node: torch.fx.Node, value: torch.fx.Node) -> None:
    node.replace_all_uses_with(value)
    node.graph.erase_node(node)
