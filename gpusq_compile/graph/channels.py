"""Follow channels through a graph: which channel of which producer does a layer's input hold?

Operators that move data are run on tensors of indices instead of values, so that any chain of
views, windows, rolls and splits is followed exactly, whichever library wrote it. Each element
carries two indices: its channel in the producer (the last axis there) and its position, i.e. the
flat index over the producer's other axes.
"""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.fx
from torch.utils._pytree import tree_leaves, tree_map

from gpusq_compile.graph.query import aten, tensor_attribute
from gpusq_compile.plan import PLAN

FILL = -1
"""The index of what no producer computed: zeros that pad."""

MOVES: frozenset[object] = frozenset(
    {
        aten.chunk.default,
        aten.clone.default,
        aten.contiguous.default,
        aten.expand.default,
        aten.flatten.using_ints,
        aten.flip.default,
        aten.movedim.int,
        aten.movedim.intlist,
        aten.narrow.default,
        aten.permute.default,
        aten.reshape.default,
        aten.roll.default,
        aten.select.int,
        aten.slice.Tensor,
        aten.split.Tensor,
        aten.split.sizes,
        aten.split_with_sizes.default,
        aten.squeeze.default,
        aten.squeeze.dim,
        aten.squeeze.dims,
        aten.t.default,
        aten.transpose.int,
        aten.unbind.int,
        aten.unflatten.int,
        aten.unsqueeze.default,
        operator.getitem,
    }
)
CASTS: frozenset[object] = frozenset(
    {
        aten._to_copy.default,
        aten.to.device,
        aten.to.dtype,
        aten.to.dtype_layout,
        aten.to.other,
        aten.type_as.default,
    }
)
"""To another float type or device: moves as well, and each element stays in its place."""

SHAPE_READERS: frozenset[object] = frozenset(
    {
        aten.empty_like.default,
        aten.full_like.default,
        aten.new_empty.default,
        aten.new_full.default,
        aten.new_ones.default,
        aten.new_zeros.default,
        aten.ones_like.default,
        aten.zeros_like.default,
    }
)
"""Operators that make a tensor like their input and read none of its values."""

PADS: frozenset[object] = frozenset({aten.pad.default, aten.constant_pad_nd.default})

Sizes = dict[torch.fx.Node, Any]
"""For each node the size of its tensor (or of each of its tensors) or its number, as integers.

None where that depends on values.
"""


class NotTraced(Exception):
    """Channels cannot be followed; the text is the reason, for a remark."""


@dataclass(frozen=True)
class Traced:
    """Where a node's values come from.

    `channel` and `position` are int32 tensors of the node's shape (lists of them for an operator
    that returns several): the channel of `source` that an element holds, and the flat index over
    the source's other axes. Both are `FILL` where there is padding.
    """

    source: torch.fx.Node
    channel: Any
    position: Any


Values = tuple[Traced, ...]
"""What is known of a node: one entry per producer and way that lead to each of its elements."""


def concrete_sizes(graph: torch.fx.Graph) -> Sizes:
    """The sizes of all values with the batch that the graph was traced on."""

    def concrete(value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            size = [concrete(axis) for axis in value.shape]
            return None if None in size else torch.Size(size)
        return value.node.hint if isinstance(value, torch.SymInt) else value

    return {node: tree_map(concrete, node.meta.get("val")) for node in graph.nodes}


def size_of(node: torch.fx.Node, sizes: Sizes) -> Any:
    """What `sizes` has of a node; NotTraced where that depends on values."""
    if sizes[node] is None:
        raise NotTraced(f"the size of {name_of(node)} depends on values")
    return sizes[node]


def from_source(node: torch.fx.Node, sizes: Sizes) -> Traced:
    """The channels of a producer's own output [..., channels]."""
    *outer, channels = size_of(node, sizes)
    places = torch.Size(outer).numel()
    channel = torch.arange(channels, dtype=torch.int32).expand(*outer, channels)
    position = torch.arange(places, dtype=torch.int32).reshape(*outer, 1)
    return Traced(node, channel, position.expand(*outer, channels))


def moves_data(node: torch.fx.Node) -> bool:
    """Whether the operator's elements are elements of its first input, or zeros that pad."""
    if node.op != "call_function":
        return False
    if node.target in PADS:
        return _pads_zeros(node)
    if node.target in CASTS:
        return bool(node.meta["val"].dtype.is_floating_point)
    return node.target in MOVES


def moved(node: torch.fx.Node, value: Traced, sizes: Sizes) -> Traced:
    """What a node for which `moves_data` holds does to its first input's channels."""
    if node.target in CASTS:
        return value

    def run(indices: Any) -> Any:
        args, kwargs = torch.fx.node.map_arg(
            (node.args[1:], dict(node.kwargs)), lambda argument: size_of(argument, sizes)
        )
        if node.target in PADS:
            return aten.constant_pad_nd(indices, args[0], FILL)
        return node.target(indices, *args, **kwargs)  # type: ignore[operator]

    return Traced(value.source, run(value.channel), run(value.position))


def _pads_zeros(node: torch.fx.Node) -> bool:
    if node.target is aten.constant_pad_nd.default:
        return len(node.args) < 3 or node.args[2] in (None, 0)
    mode = node.args[2] if len(node.args) > 2 else "constant"
    value = node.args[3] if len(node.args) > 3 else None
    return bool(mode == "constant" and value in (None, 0))


def constant_over(indices: torch.Tensor, axis: int) -> torch.Tensor | None:
    """The indices without `axis` (kept, of size 1) if they are alike along it, padding aside."""
    found = indices.amax(dim=axis, keepdim=True)
    alike = (indices == found) | (indices == FILL)
    return found if bool(alike.all()) else None


def channels_of(value: Traced) -> torch.Tensor:
    """The producer's channel int64 [in] that each channel of a layer's input [..., in] holds.

    Raises:
        NotTraced: a channel holds different ones at different positions, or none.
    """
    channels = constant_over(value.channel.reshape(-1, value.channel.shape[-1]), 0)
    if channels is None or bool((channels == FILL).any()):
        raise NotTraced("an input channel of it holds different channels at different positions")
    return channels.flatten().long()


def same_position(value: Traced) -> torch.Tensor:
    """A number int64 [in] per input channel: channels of one number are at one position always.

    Channels that the graph shifts, cuts or weighs in different ways get different numbers.
    """
    positions = value.position.reshape(-1, value.position.shape[-1])
    if bool((positions == positions[:, :1]).all()):
        return torch.zeros(positions.shape[1], dtype=torch.int64)
    numbers: torch.Tensor = positions.unique(dim=1, return_inverse=True)[1]
    return numbers.flatten()


def reads_values(user: torch.fx.Node, node: torch.fx.Node) -> bool:
    """Whether a user reads a node's values, or its size or type alone."""
    if user.op == "output":
        return True
    if user.target in SHAPE_READERS or (user.target in CASTS and user.args[0] is not node):
        return False
    values = tree_leaves(user.meta.get("val"))
    return any(isinstance(value, torch.Tensor) for value in values)


def holds(value: Traced, channels: torch.Tensor) -> bool:
    """Whether any of a source's channels, bool [channels], is in the value."""
    # `FILL` as an index is the last.
    channels = torch.cat([channels, channels.new_zeros(1)])
    return any(bool(channels[part.long()].any()) for part in tree_leaves(value.channel))


@dataclass(frozen=True)
class Reading:
    """`user` reads the traced `value` of `node`, and does more with it than to move it."""

    user: torch.fx.Node
    node: torch.fx.Node
    value: Values


def readings(
    known: Mapping[torch.fx.Node, Values],
    sizes: Sizes,
    relevant: Callable[[Traced], bool] = lambda value: True,
) -> list[Reading]:
    """Everything that reads the `known` values beside how they follow from each other.

    Seen through what moves data.
    A value for which `relevant` holds on no path is of no interest, nor are its users.
    """
    values = dict(known)
    queue = list(values)
    found = []
    for node in queue:
        if not any(relevant(path) for path in values[node]):
            continue
        for user in node.users:
            if (node in known and user in known) or not reads_values(user, node):
                continue
            if user not in known and moves_data(user) and user.args[0] is node:
                values[user] = tuple(moved(user, path, sizes) for path in values[node])
                queue.append(user)
            else:
                found.append(Reading(user, node, values[node]))
    return found


class Stored:
    """The tensors that a graph stores, and how many operators read each, under whatever name.

    Looked up once: a layer at a time, a graph of many layers would be walked as many times.
    """

    def __init__(self, graph_module: torch.fx.GraphModule) -> None:
        self._tensors: dict[torch.fx.Node, torch.Tensor] = {}
        self._readers: Counter[int] = Counter()
        for node in graph_module.graph.find_nodes(op="get_attr"):
            tensor = tensor_attribute(graph_module, str(node.target))
            self._tensors[node] = tensor
            self._readers[tensor.data_ptr()] += len(node.users)

    def own(self, node: torch.fx.Node) -> torch.Tensor:
        """The stored tensor that a `get_attr` node reads.

        Raises:
            NotTraced: the graph computes it, or other operators read it too.
        """
        if node.op != "get_attr":
            raise NotTraced(f"the graph computes {node.name}, which should be a stored tensor")
        tensor = self._tensors[node]
        if self._readers[tensor.data_ptr()] > 1:
            raise NotTraced(f"several operators read {node.target}")
        return tensor.detach()


def name_of(node: torch.fx.Node) -> str:
    """What a person calls a node: the layer's name, or else the operator's, e.g. `layer_norm`."""
    if node.op == "output":
        return "the graph's output"
    plan = node.meta.get(PLAN)
    if plan is not None:
        return str(plan.name)
    packet = getattr(node.target, "overloadpacket", None)
    return str(packet).removeprefix("aten.") if packet is not None else str(node.target)
