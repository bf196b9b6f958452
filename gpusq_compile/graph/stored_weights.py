"""Weights that the model turns before it multiplies with them, stored as a GEMM reads them.

`x @ weight` and an `einsum` with a weight of several axes read a parameter whose axes lie otherwise
than [out, in]. Masks and scales are along those two, so the parameter is turned once, here, and
back where the user gets his weights (user_state.py).
"""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.fx

from gpusq_compile.graph.cuts import CUTS
from gpusq_compile.graph.edit import insert_get_attr, set_tensor
from gpusq_compile.graph.query import aten, is_parameter, shape_of, tensor_attribute

REVERSALS: frozenset[object] = frozenset({aten.t.default, aten.numpy_T.default})
TRANSPOSITIONS: frozenset[object] = frozenset(
    {*REVERSALS, aten.mT.default, aten.transpose.int, aten.permute.default}
)
FLATTENINGS: frozenset[object] = frozenset({aten.reshape.default, aten.flatten.using_ints})
"""Where they flatten neighbouring axes: `after_axes` tells."""

EXPANSIONS: frozenset[object] = frozenset(
    {aten.expand.default, aten.expand_as.default, aten.unsqueeze.default, aten.squeeze.dim}
)

AxisGroups = list[tuple[int, ...]]
"""For each axis of a tensor the axes of the parameter that were flattened into it."""


@dataclass(frozen=True)
class Turned:
    """How the graph holds a parameter: with its `axes` in this order, the first `rows` of them
    flattened into the output features and the others into the input features."""

    axes: tuple[int, ...]
    rows: int

    def graph_shape(self, shape: Sequence[int]) -> tuple[int, int]:
        """[out, in] of a parameter of this shape."""
        sizes = [shape[axis] for axis in self.axes]
        return math.prod(sizes[: self.rows]), math.prod(sizes[self.rows :])

    def to_graph(self, value: torch.Tensor) -> torch.Tensor:
        """The user's tensor as the graph holds it, [out, in]."""
        turned = value.permute(self.axes)
        return turned.reshape(self.graph_shape(value.shape)).contiguous()

    def to_user(self, value: torch.Tensor, shape: Sequence[int]) -> torch.Tensor:
        """The graph's tensor [out, in] in the user's `shape`."""
        turned = value.reshape([shape[axis] for axis in self.axes])
        return turned.permute(sorted(range(len(self.axes)), key=self.axes.__getitem__)).contiguous()


def store_as_read(
    graph_module: torch.fx.GraphModule, linear: torch.fx.Node
) -> tuple[str, Turned] | None:
    """Store the weight of a linear as [out, in], where operators that move data alone make it.

    Returns:
        The parameter's name and how it is held from now on; None where it is left as it is: it is
        stored so, or computed otherwise, or something else reads it too.
    """
    steps: list[torch.fx.Node] = []
    weight = linear.args[1]
    assert isinstance(weight, torch.fx.Node)
    while weight.target in TRANSPOSITIONS | FLATTENINGS and len(weight.users) == 1:
        steps.append(weight)
        weight = weight.all_input_nodes[0]
    if not steps or not is_parameter(graph_module, weight) or len(weight.users) != 1:
        return None
    path = str(weight.target)
    graph = graph_module.graph
    if sum(n.op == "get_attr" and n.target == path for n in graph.nodes) > 1:
        return None
    groups: AxisGroups | None = [(axis,) for axis in range(len(shape_of(weight) or ()))]
    for step in reversed(steps):
        groups = after_axes(groups, step) if groups is not None else None
    if groups is None or len(groups) != 2:
        return None
    turned = Turned((*groups[0], *groups[1]), rows=len(groups[0]))
    value = tensor_attribute(graph_module, path).detach()
    set_tensor(graph_module, path, turned.to_graph(value), trainable=True)
    with graph.inserting_before(linear):
        linear.update_arg(1, insert_get_attr(graph_module, path, provenance=weight))
    for node in (*steps, weight):
        graph.erase_node(node)
    return path, turned


def is_moved_parameter(graph_module: torch.fx.GraphModule, node: torch.fx.Node) -> bool:
    """Whether a node is a parameter, or one whose axes were turned or reshaped alone."""
    while node.target in TRANSPOSITIONS | FLATTENINGS:
        node = node.all_input_nodes[0]
    return is_parameter(graph_module, node)


def parameter_behind(
    graph_module: torch.fx.GraphModule, node: torch.fx.Node
) -> torch.fx.Node | None:
    """The parameter whose values, or a part of them, a node has in another shape; else None."""
    while node.target in TRANSPOSITIONS | FLATTENINGS | EXPANSIONS | CUTS | {operator.getitem}:
        node = node.all_input_nodes[0]
    return node if is_parameter(graph_module, node) else None


def after_axes(groups: AxisGroups, node: torch.fx.Node) -> AxisGroups | None:
    """The axes behind an operator that turns axes or flattens neighbours; None behind any other."""
    if node.target in TRANSPOSITIONS:
        return [groups[axis] for axis in order_of(node, len(groups))]
    if node.target not in FLATTENINGS:
        return None
    source = node.all_input_nodes[0]
    before = [int(size) for size in shape_of(source) or ()]
    rest = list(zip(groups, before, strict=True))
    found: AxisGroups = []
    for size in (int(size) for size in shape_of(node) or ()):
        joined: tuple[int, ...] = ()
        product = 1
        while rest and (not joined or product < size):
            group, length = rest.pop(0)
            joined, product = (*joined, *group), product * length
        if not joined or product != size:
            return None
        found.append(joined)
    return found if not rest else None


def order_of(node: torch.fx.Node, axes: int) -> list[int]:
    """The order that one of `TRANSPOSITIONS` brings the axes of a tensor into."""
    order = list(range(axes))
    arguments: tuple[Any, ...] = node.args[1:]
    if node.target in REVERSALS:
        return order[::-1]
    if node.target is aten.permute.default:
        return [axis % axes for axis in arguments[0]]
    first, second = arguments or (-2, -1)
    order[first], order[second] = order[second], order[first]
    return order
