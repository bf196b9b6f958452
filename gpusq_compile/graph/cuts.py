"""Where a value's last axis is cut into equal parts, and the same steps on one part alone.

A fused QKV linear is followed by a view that names the parts as an axis, moves of that axis, and
its cut by `unbind`, `select`, `chunk`, `split` or slices. Axes are followed by number, so that any
such chain is understood, whichever library wrote it.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any

import torch
import torch.fx

from gpusq_compile.graph.channels import Sizes, concrete_sizes, name_of
from gpusq_compile.graph.edit import insert_call
from gpusq_compile.graph.query import aten

RESHAPES = {aten.reshape.default, aten.view.default}
SPLITS = {
    aten.chunk.default,
    aten.split.Tensor,
    aten.split.sizes,
    aten.split_with_sizes.default,
}
WHOLE_LIST = {aten.unbind.int, *SPLITS}
"""Operators that return every part; `getitem` takes one."""
CUTS = {*WHOLE_LIST, aten.select.int, aten.slice.Tensor, aten.narrow.default}


class NotCut(Exception):
    """A value is not cut into equal parts, or not in a way that is followed; says why."""


@dataclass(frozen=True)
class Step:
    """An operator between the value and its cut; the axes of its input and output, by number."""

    node: torch.fx.Node
    before: tuple[int, ...]
    after: tuple[int, ...]


@dataclass(frozen=True)
class Cut:
    """A value [..., channels] cut into parts.

    `rows` int64 [channels / parts] are the channels of each part, in the part's own order;
    `pieces` the nodes that hold each part where it is cut off; `place` the first of the cutting
    nodes. `axis` is the number of the axis that is cut, and `kept` whether a part still has it.
    """

    rows: tuple[torch.Tensor, ...]
    pieces: tuple[tuple[torch.fx.Node, ...], ...]
    steps: tuple[Step, ...]
    place: torch.fx.Node
    axis: int
    kept: bool


def find_cut(value: torch.fx.Node) -> Cut:
    """How the last axis of a value is cut into equal parts.

    Raises:
        NotCut: it is not, or its parts are also read as a whole.
    """
    sizes = concrete_sizes(value.graph)
    axes = tuple(range(len(sizes[value])))
    channel_axes = axes[-1:]
    factors: tuple[int, ...] = tuple(sizes[value][-1:])
    steps: list[Step] = []
    node = value
    while not _all_cut(node):
        user = _only_user(node)
        after = _axes_after(user, axes, sizes)
        if user.target in RESHAPES or user.target is aten.unflatten.int:
            if len(channel_axes) != 1 or channel_axes[0] != axes[-1]:
                raise NotCut(f"{name_of(user)} joins axes behind it")
            channel_axes = after[len(axes) - 1 :]
            factors = tuple(sizes[user][after.index(axis)] for axis in channel_axes)
        steps.append(Step(user, axes, after))
        axes, node = after, user
    cuts = list(node.users)
    axis_at, kept, pieces = _pieces(cuts, sizes[node])
    axis = axes[axis_at]
    if axis not in channel_axes:
        raise NotCut("it is cut along another axis than its channels")
    channels = torch.arange(sizes[value][-1]).reshape(factors)
    rows = channels.chunk(len(pieces), dim=channel_axes.index(axis))
    place = next(other for other in value.graph.nodes if other in cuts)
    return Cut(
        rows=tuple(part.flatten() for part in rows),
        pieces=pieces,
        steps=tuple(steps),
        place=place,
        axis=axis,
        kept=kept,
    )


def repeat_steps(graph: torch.fx.Graph, cut: Cut, index: int, part: torch.fx.Node) -> None:
    """Do the steps before the cut on one part, and let what read the part read the result.

    New nodes go to the graph's insertion point.
    """
    share = len(cut.rows)
    for step in cut.steps:
        target, args = _on_part(step, cut, share)
        part = insert_call(graph, target, (part, *args), provenance=step.node)
    for piece in cut.pieces[index]:
        piece.replace_all_uses_with(part)


def _only_user(node: torch.fx.Node) -> torch.fx.Node:
    users = list(node.users)
    if len(users) != 1:
        names = ", ".join(dict.fromkeys(name_of(user) for user in users)) or "nothing"
        raise NotCut(f"its output is read as a whole by {names}")
    return users[0]


def _all_cut(node: torch.fx.Node) -> bool:
    return bool(node.users) and all(user.target in CUTS for user in node.users)


def _axes_after(node: torch.fx.Node, axes: tuple[int, ...], sizes: Sizes) -> tuple[int, ...]:
    """The numbers of the output's axes; what a view makes of the last axis gets new ones."""
    count, target, args = len(axes), node.target, node.args
    if target in RESHAPES:
        assert isinstance(args[0], torch.fx.Node)
        outer = count - 1
        old, new = sizes[args[0]], sizes[node]
        if tuple(new[:outer]) != tuple(old[:outer]) or len(new) < count:
            raise NotCut(f"{name_of(node)} joins its channels with other axes")
        return (*axes[:outer], *_new_axes(axes, len(new) - outer))
    if target is aten.unflatten.int:
        if _positive(args[1], count) != count - 1:
            raise NotCut(f"{name_of(node)} divides another axis than its channels")
        return (*axes[:-1], *_new_axes(axes, len(sizes[node]) - count + 1))
    if target is aten.permute.default:
        assert isinstance(args[1], (list, tuple))
        return tuple(axes[_positive(dim, count)] for dim in args[1])
    if target is aten.transpose.int:
        first, second = (_positive(dim, count) for dim in args[1:3])
        swapped = list(axes)
        swapped[first], swapped[second] = swapped[second], swapped[first]
        return tuple(swapped)
    if target is aten.unsqueeze.default:
        at = _positive(args[1], count + 1)
        return (*axes[:at], *_new_axes(axes, 1), *axes[at:])
    if target is aten.squeeze.dim:
        at = _positive(args[1], count)
        return axes if len(sizes[node]) == count else (*axes[:at], *axes[at + 1 :])
    if target is aten.clone.default:
        return axes
    raise NotCut(f"its output goes through {name_of(node)} as a whole")


def _new_axes(axes: tuple[int, ...], count: int) -> range:
    first = max(axes) + 1
    return range(first, first + count)


def _pieces(
    cuts: list[torch.fx.Node], size: torch.Size
) -> tuple[int, bool, tuple[tuple[torch.fx.Node, ...], ...]]:
    """The axis that is cut, whether the parts keep it, and the nodes that hold each part."""
    places: set[tuple[int, bool, int]] = set()
    found: dict[int, list[torch.fx.Node]] = {}
    for cut in cuts:
        for axis, kept, start, length, node in pieces_of(cut, size):
            places.add((axis, kept, length))
            found.setdefault(start // length, []).append(node)
            if start % length or size[axis] % length:
                raise NotCut("it is cut into parts of different sizes")
    if len(places) != 1:
        raise NotCut("it is cut into parts of different sizes")
    axis, kept, length = places.pop()
    count = size[axis] // length
    if count < 2:
        raise NotCut("its output is taken whole")
    return axis, kept, tuple(tuple(found.get(index, ())) for index in range(count))


def pieces_of(
    cut: torch.fx.Node, size: torch.Size
) -> list[tuple[int, bool, int, int, torch.fx.Node]]:
    """(axis, whether it stays, start, length, node) of every part that one of `CUTS` cuts off a
    tensor of this size.

    Raises:
        NotCut: by a stride, at a place that depends on the input, or its parts are read together.
    """
    count, target, args = len(size), cut.target, cut.args
    if target is aten.select.int:
        axis = _positive(args[1], count)
        return [(axis, False, _positive(args[2], size[axis]), 1, cut)]
    if target is aten.narrow.default:
        axis = _positive(args[1], count)
        return [(axis, True, _positive(args[2], size[axis]), _number(args[3]), cut)]
    if target is aten.slice.Tensor:
        axis = _positive(args[1] if len(args) > 1 else 0, count)
        bounds = [None if bound is None else _number(bound) for bound in args[2:5]]
        start, end, step = slice(*bounds, *[None] * (3 - len(bounds))).indices(size[axis])
        if step != 1 or end <= start:
            raise NotCut("it is cut by a strided slice")
        return [(axis, True, start, end - start, cut)]
    if target is aten.unbind.int:
        axis = _positive(args[1] if len(args) > 1 else 0, count)
        lengths, kept = [1] * size[axis], False
    else:
        given = args[2] if len(args) > 2 else cut.kwargs.get("dim", 0)
        axis, kept = _positive(given, count), True
        lengths = [value.shape[axis] for value in cut.meta["val"]]
    found = []
    for user in cut.users:
        if user.target is not operator.getitem:
            raise NotCut(f"its parts are read together by {name_of(user)}")
        which = _positive(user.args[1], len(lengths))
        found.append((axis, kept, int(sum(lengths[:which])), int(lengths[which]), user))
    return found


def _on_part(step: Step, cut: Cut, share: int) -> tuple[Any, tuple[Any, ...]]:
    """The operator and its further arguments that do a step on one part alone."""

    def left(axes: tuple[int, ...]) -> list[int]:
        return [axis for axis in axes if cut.kept or axis != cut.axis]

    before, after, node = left(step.before), left(step.after), step.node
    outer = len(step.before) - 1
    if node.target in RESHAPES or node.target is aten.unflatten.int:
        # Before the view that names the parts, a part has its share of all channels.
        divided = {cut.axis} if cut.axis in step.after else set(step.after[outer:])
        factors = [
            int(size) // share if axis in divided else int(size)
            for axis, size in zip(step.after[outer:], node.meta["val"].shape[outer:], strict=True)
            if cut.kept or axis != cut.axis
        ]
        if node.target is aten.unflatten.int:
            return node.target, (-1, factors)
        assert isinstance(node.args[1], (list, tuple))
        return node.target, ([*node.args[1][:outer], *factors],)
    if node.target is aten.unsqueeze.default:
        new = next(axis for axis in after if axis not in before)
        return node.target, (after.index(new),)
    if node.target is aten.squeeze.dim:
        gone = [axis for axis in before if axis not in after]
        return (node.target, (before.index(gone[0]),)) if gone else (aten.clone.default, ())
    if node.target is aten.clone.default:
        return node.target, ()
    return aten.permute.default, ([before.index(axis) for axis in after],)


def _positive(index: Any, count: int) -> int:
    number = _number(index)
    return number + count if number < 0 else number


def _number(value: Any) -> int:
    if not isinstance(value, int):
        raise NotCut("where it is cut depends on the input")
    return value
