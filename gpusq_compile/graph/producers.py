"""Find the linears that make a layer's input channels, where the channels' order is free.

Behind the producers only operators are passed that treat every channel alike: data movement, unary
functions, products of two such values (gated units), and attention, which weighs positions and
not channels. Reordering a producer's rows then reorders the layer's input and nothing else.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.fx

from gpusq_compile.graph.channels import (
    NotTraced,
    Sizes,
    Traced,
    Values,
    channels_of,
    constant_over,
    from_source,
    holds,
    moved,
    moves_data,
    name_of,
    readings,
    same_position,
    size_of,
)
from gpusq_compile.graph.products import FUSED_ATTENTION, SOFTMAX
from gpusq_compile.graph.query import aten, op_of, walk_inputs
from gpusq_compile.graph.roles import ACTIVATIONS, NORMALIZATIONS
from gpusq_compile.plan import TAP_PLAN

UNARY: frozenset[object] = frozenset(ACTIVATIONS) | {
    aten.abs.default,
    aten.clamp.default,
    aten.clamp_min.default,
    aten.erf.default,
    aten.exp.default,
    aten.hardsigmoid.default,
    aten.hardtanh.default,
    aten.mish.default,
    aten.neg.default,
    aten.pow.Tensor_Scalar,
    aten.relu6.default,
    aten.selu.default,
    aten.softplus.default,
    aten.square.default,
}
BINARY: frozenset[object] = frozenset(
    {aten.add.Tensor, aten.sub.Tensor, aten.mul.Tensor, aten.div.Tensor}
)
MATMULS: frozenset[object] = frozenset({aten.matmul.default, aten.bmm.default})


@dataclass(frozen=True)
class Producer:
    """A linear, and the row int64 [in] of its weight behind each input channel of the reader."""

    node: torch.fx.Node
    rows: torch.Tensor


@dataclass(frozen=True)
class InputChannels:
    """The producers of a layer's input, and which of its channels may trade places.

    `blocks` int64 [in]: channels of one number may, such as those of one attention head.
    """

    producers: tuple[Producer, ...]
    blocks: torch.Tensor


def trace_back(reader: torch.fx.Node, sizes: Sizes, residuals: set[torch.fx.Node]) -> InputChannels:
    """The producers of a linear's input channels.

    Raises:
        NotTraced: the order of its channels is not free; says why.
    """
    source = reader.args[0]
    assert isinstance(source, torch.fx.Node)
    region = _Region(sizes, residuals)
    paths = region.of(source)
    found = [(path, channels_of(path)) for path in paths]
    blocks = torch.zeros(found[0][1].shape[0], dtype=torch.int64)
    for path, _ in found:
        both = torch.stack([blocks, same_position(path)])
        blocks = torch.unique(both, dim=1, return_inverse=True)[1].flatten()
    touched: dict[torch.fx.Node, torch.Tensor] = {}
    for path, rows in found:
        mine = touched.setdefault(
            path.source, torch.zeros(sizes[path.source][-1], dtype=torch.bool)
        )
        if bool(mine[rows].any()) or len(torch.unique(rows)) != len(rows):
            raise NotTraced("it reads one channel in several places")
        mine[rows] = True

    def relevant(path: Traced) -> bool:
        return path.source in touched and holds(path, touched[path.source])

    for attention, other in region.weights:
        if other in region.values:
            raise NotTraced(f"{name_of(attention)} weighs by the same channels")
    for reading in readings(region.values, sizes, relevant):
        whole = reader.args[0] is reading.node and reader.args.count(reading.node) == 1
        if reading.user is not reader or not whole:
            raise NotTraced(f"{name_of(reading.user)} reads the same channels")
    return InputChannels(tuple(Producer(path.source, rows) for path, rows in found), blocks)


class _Region:
    """The values between the producers and the reader, found from the reader up."""

    def __init__(self, sizes: Sizes, residuals: set[torch.fx.Node]) -> None:
        self.sizes = sizes
        self.residuals = residuals
        self.values: dict[torch.fx.Node, Values] = {}
        self.weights: list[tuple[torch.fx.Node, torch.fx.Node]] = []

    def of(self, node: torch.fx.Node) -> Values:
        if node not in self.values:
            if TAP_PLAN in node.meta:
                raise NotTraced("a tap shows its input channels to the fine-tune")
            self.values[node] = self._trace(node)
        return self.values[node]

    def _trace(self, node: torch.fx.Node) -> Values:
        if op_of(node) == "linear":
            return (from_source(node, self.sizes),)
        operands = [argument for argument in node.args if isinstance(argument, torch.fx.Node)]
        if node in self.residuals:
            raise NotTraced("it reads the residual stream, as other layers do")
        if moves_data(node):
            return tuple(moved(node, path, self.sizes) for path in self.of(operands[0]))
        if node.target in UNARY:
            return self.of(operands[0])
        if node.target in BINARY:
            return self._binary(node, operands)
        if node.target in FUSED_ATTENTION:
            if node.kwargs.get("enable_gqa"):
                raise NotTraced("several heads of queries share its channels")
            return self._attend(node, operands[2], axis=-1)
        if node.target in MATMULS:
            first, second = operands
            if _is_softmax(first) or _is_softmax(second):
                weighted, axis = (second, -1) if _is_softmax(first) else (first, -2)
                return self._attend(node, weighted, axis=axis)
        raise NotTraced(_obstacle(node))

    def _binary(self, node: torch.fx.Node, operands: list[torch.fx.Node]) -> Values:
        sizes = [(operand, size_of(operand, self.sizes)) for operand in operands]
        wide = [o for o, size in sizes if isinstance(size, torch.Size) and size.numel() > 1]
        if any(self.sizes[operand] != self.sizes[node] for operand in wide):
            raise NotTraced(f"its channels meet another tensor in {name_of(node)}")
        found: list[Traced] = []
        for operand in wide:
            for path in self.of(operand):
                if not any(_same(path, other) for other in found):
                    found.append(path)
        return tuple(found)

    def _attend(self, node: torch.fx.Node, weighted: torch.fx.Node, *, axis: int) -> Values:
        """Attention sums over positions; `axis` of `weighted` and of the result is the channels."""
        reduced = -3 - axis
        paths = self.of(weighted)
        beside = list(node.all_input_nodes)
        beside.remove(weighted)
        if node.args.count(weighted) > 1:
            beside.append(weighted)
        self.weights += [(node, other) for other in beside]
        size = list(size_of(node, self.sizes))
        outer = [1 if dim == len(size) + axis else count for dim, count in enumerate(size)]
        position = torch.arange(torch.Size(outer).numel(), dtype=torch.int32).reshape(outer)
        found = []
        for path in paths:
            channel = constant_over(path.channel, reduced)
            first = path.position.narrow(axis, 0, 1)
            if channel is None or not bool((path.position == first).all()):
                raise NotTraced(f"{name_of(node)} mixes its channels")
            found.append(Traced(path.source, channel.expand(size), position.expand(size)))
        return tuple(found)


def _same(first: Traced, second: Traced) -> bool:
    return (
        first.source is second.source
        and torch.equal(first.channel, second.channel)
        and torch.equal(first.position, second.position)
    )


def _is_softmax(node: torch.fx.Node) -> bool:
    """Whether a value is a softmax's output, possibly moved."""
    upstream = [node, *(walk_inputs(node, moves_data) if moves_data(node) else ())]
    return any(source.target in SOFTMAX for source in upstream)


def _obstacle(node: torch.fx.Node) -> str:
    """Why channels cannot be followed beyond an operator."""
    if node.op == "placeholder":
        return "it reads the model's input"
    if node.op == "get_attr":
        return f"its channels meet the stored tensor {node.target}"
    if node.op == "call_module":
        return "a tap shows its input channels to the fine-tune"
    if node.target in NORMALIZATIONS:
        return f"it reads the output of {name_of(node)}, whose channels others share"
    return f"its input goes through {name_of(node)}, which is not followed"
