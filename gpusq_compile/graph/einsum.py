"""`einsum` of two factors in the terms that GEMMs and attention have: `linear`, or `matmul`.

A `tensordot` is an `einsum` first.

Each rewrite takes a node and returns whether it rewrote it; each is exact.
"""

from __future__ import annotations

import math
from string import ascii_letters
from typing import Any

import torch
import torch.fx

from gpusq_compile.graph.edit import insert_call, replace
from gpusq_compile.graph.query import aten, is_parameter, shape_of

Factors = tuple[list[tuple[torch.fx.Node, str]], str]
"""Two factors with the labels of their axes, and those of the result."""


def tensordot_to_einsum(graph_module: torch.fx.GraphModule, node: torch.fx.Node) -> bool:
    """`tensordot(a, b, axes of a, axes of b)` -> `einsum`."""
    if node.target is not aten.tensordot.default:
        return False
    arguments: Any = node.args
    first, second, axes, others = arguments
    counts = (len(_shape(first)), len(_shape(second)))
    if sum(counts) > len(ascii_letters):
        return False
    left, right = ascii_letters[: counts[0]], list(ascii_letters[counts[0] : sum(counts)])
    for axis, other in zip(axes, others, strict=True):
        right[other] = left[axis]
    summed = {left[axis] for axis in axes}
    result = "".join(label for label in (*left, *right) if label not in summed)
    equation = f"{left},{''.join(right)}->{result}"
    graph = node.graph
    with graph.inserting_before(node):
        product = insert_call(
            graph, aten.einsum.default, (equation, [first, second]), provenance=node
        )
    replace(node, product)
    return True


def einsum_to_linear(graph_module: torch.fx.GraphModule, node: torch.fx.Node) -> bool:
    """An `einsum` of an activation and a stored weight -> `linear`.

    Any number of axes may be summed (the heads and channels of a projection), or come from the
    weight alone (those of queries). An axis that both have and the result too is a product per
    head or per sample, which is no linear.
    """
    factors = _factors(node)
    if factors is None:
        return False
    [(data, first), (weight, second)], result = factors
    if is_parameter(graph_module, data):
        data, first, weight, second = weight, second, data, first
    if not is_parameter(graph_module, weight) or is_parameter(graph_module, data):
        return False
    summed = [label for label in second if label in first]
    columns = [label for label in second if label not in first]
    rows = [label for label in first if label not in second]
    sizes = dict(zip([*second, *first], [*_shape(weight), *_shape(data)], strict=True))
    exact = all(sizes[label] == size for label, size in zip(second, _shape(weight), strict=True))
    dynamic = [label for label in rows if not isinstance(sizes[label], int)]
    if not (rows and columns and summed and exact) or set(result) != {*rows, *columns}:
        return False
    reshapes = len(summed) > 1 or len(columns) > 1
    if reshapes and len(dynamic) > 1:
        return False
    kept = [-1 if label in dynamic else sizes[label] for label in rows]
    graph = node.graph

    def joined(value: torch.fx.Node, shape: list[Any]) -> torch.fx.Node:
        return insert_call(graph, aten.reshape.default, (value, shape), provenance=node)

    with graph.inserting_before(node):
        data = _ordered(data, first, [*rows, *summed], node)
        if len(summed) > 1:
            data = joined(data, [*kept, math.prod(sizes[label] for label in summed)])
        weight = _ordered(weight, second, [*columns, *summed], node)
        if len(second) > 2:
            parts = (columns, summed)
            weight = joined(weight, [math.prod(sizes[n] for n in part) for part in parts])
        value = insert_call(graph, aten.linear.default, (data, weight), provenance=node)
        if len(columns) > 1:
            value = joined(value, [*kept, *(sizes[label] for label in columns)])
        value = _ordered(value, "".join([*rows, *columns]), list(result), node)
    replace(node, value)
    return True


def einsum_to_matmul(graph_module: torch.fx.GraphModule, node: torch.fx.Node) -> bool:
    """An `einsum` of two factors that is a batch of matrix products -> permute, matmul, permute.

    That is one summed index, and one index that is each factor's alone; with a matrix for the one
    factor, any number of them that are the other's alone.
    """
    factors = _factors(node)
    if factors is None:
        return False
    [(left, first), (right, second)], result = factors
    if len(first) == 2 and len(second) > 2:
        left, first, right, second = right, second, left, first
    batch = [label for label in result if label in first and label in second]
    summed = [label for label in first if label in second and label not in result]
    rows = [label for label in first if label not in second]
    columns = [label for label in second if label not in first]
    one_product = len(summed) == len(columns) == 1 and (len(rows) == 1 or (rows and not batch))
    if not one_product or set(result) != {*batch, *rows, *columns}:
        return False
    if _shape(left)[first.index(summed[0])] != _shape(right)[second.index(summed[0])]:
        return False  # One of them is broadcast, which no matmul does along its sum.
    graph = node.graph
    with graph.inserting_before(node):
        left = _ordered(left, first, [*batch, *rows, *summed], node)
        right = _ordered(right, second, [*batch, *summed, *columns], node)
        product = insert_call(graph, aten.matmul.default, (left, right), provenance=node)
        value = _ordered(product, "".join([*batch, *rows, *columns]), list(result), node)
    replace(node, value)
    return True


def _ordered(
    value: torch.fx.Node, have: str, want: list[str], provenance: torch.fx.Node
) -> torch.fx.Node:
    """The axes `have` of a value in the order that is wanted."""
    order = [have.index(label) for label in want]
    if order == sorted(order):
        return value
    graph = provenance.graph
    return insert_call(graph, aten.permute.default, (value, order), provenance=provenance)


def _shape(node: torch.fx.Node) -> tuple[int | torch.SymInt, ...]:
    return shape_of(node) or ()


def _factors(node: torch.fx.Node) -> Factors | None:
    """Both factors of an `einsum` with their labels, and those of the result, `...` spelled out.

    None where there are not two, a label comes twice in one of them, or they are unclear.
    """
    if node.target is not aten.einsum.default:
        return None
    equation, operands = node.args[:2]
    assert isinstance(equation, str)
    assert isinstance(operands, (list, tuple))
    factors = [n for n in operands if isinstance(n, torch.fx.Node)]
    if len(operands) != 2 or len(factors) != 2:
        return None
    labels = _labels(equation, [len(_shape(n)) for n in factors])
    if labels is None or any(len(set(part)) != len(part) for part in labels):
        return None
    *parts, result = labels
    return list(zip(factors, parts, strict=True)), result


def _labels(equation: str, axes: list[int]) -> tuple[str, str, str] | None:
    """The labels of both factors and the result, `...` spelled out; None where that is unclear."""
    sides = equation.replace(" ", "").split("->")
    inputs = sides[0].split(",")
    if len(sides) == 1 and "..." not in equation:
        labels = sides[0].replace(",", "")
        sides.append("".join(sorted(label for label in labels if labels.count(label) == 1)))
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
