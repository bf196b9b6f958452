"""The model's inputs within a batch of any form, as a user's `loss(model, batch)` may read it."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_map


@dataclass(frozen=True)
class Found:
    """What `forward` takes of a batch, and what stands beside it (None: nothing does).

    `paired` says that the inputs are the batch's first item.
    """

    inputs: tuple[Any, ...]
    rest: Any
    paired: bool = False


def find_inputs(raw: Any, example: tuple[Any, ...], names: Sequence[str]) -> Found | None:
    """The first of these that is like the example inputs, or None:

    1. of a mapping, the values under the names of forward's parameters;
    2. of a tuple or list, its first item;
    3. the batch itself.

    Several inputs are a tuple or list of as many. Sizes and types are not compared here.

    Args:
        names: the parameters of `forward` that the example inputs fill; see `forward_names`.
    """
    if isinstance(raw, Mapping) and names and all(name in raw for name in names):
        inputs = tuple(raw[name] for name in names)
        if alike(inputs, example):
            return Found(inputs, {key: raw[key] for key in raw if key not in names} or None)
    if isinstance(raw, (tuple, list)) and raw:
        first = as_arguments(raw[0], example)
        if first is not None:
            rest = raw[1] if len(raw) == 2 else tuple(raw[1:])
            return Found(first, None if len(raw) == 1 else rest, paired=True)
    whole = as_arguments(raw, example)
    return None if whole is None else Found(whole, None)


def forward_names(module: nn.Module, example: tuple[Any, ...]) -> tuple[str, ...]:
    """The names of the parameters of `forward` that the example inputs fill, in their order."""
    try:
        bound = inspect.signature(module.forward).bind(*example)
    except (TypeError, ValueError):
        return ()
    return tuple(bound.arguments) if len(bound.arguments) == len(example) else ()


def as_arguments(value: Any, example: tuple[Any, ...]) -> tuple[Any, ...] | None:
    """`value` as positional arguments of `forward`, None where it is not like the example.

    A tuple of samples where the example has a list becomes one.
    """
    if len(example) == 1 and alike(value, example[0]):
        found: tuple[Any, ...] = (value,)
    elif isinstance(value, (tuple, list)) and alike(tuple(value), example):
        found = tuple(value)
    else:
        return None
    return tuple(
        list(item) if isinstance(like, list) else item
        for item, like in zip(found, example, strict=True)
    )


def alike(value: Any, example: Any) -> bool:
    """Whether a value is built like an example.

    Tensors match tensors, tuples match tuples or lists of as many items, mappings match mappings
    with their keys; a list has one item per sample, so its length is free and every item is like
    the example's first. Anything else matches what is neither of these.
    """
    if isinstance(example, torch.Tensor):
        return isinstance(value, torch.Tensor)
    if isinstance(example, Mapping):
        return isinstance(value, Mapping) and all(
            key in value and alike(value[key], item) for key, item in example.items()
        )
    if isinstance(example, list) and example:
        return isinstance(value, (tuple, list)) and all(alike(item, example[0]) for item in value)
    if isinstance(example, tuple):
        return (
            isinstance(value, (tuple, list))
            and len(value) == len(example)
            and all(alike(item, like) for item, like in zip(value, example, strict=True))
        )
    return not isinstance(value, (torch.Tensor, Mapping))


def size_of(value: Any) -> int | None:
    """Samples of a batch: the first size of its first tensor, or the length of its first list.

    None where it has neither. Tuples and mappings are searched in their order.
    """
    if isinstance(value, torch.Tensor):
        return int(value.shape[0]) if value.ndim else None
    if isinstance(value, list):
        return len(value)
    if isinstance(value, (tuple, Mapping)):
        items = value.values() if isinstance(value, Mapping) else value
        return next((size for item in items if (size := size_of(item)) is not None), None)
    return None


def part_of(value: Any, start: int, end: int, size: int) -> Any:
    """Samples `start` to `end` of a value that holds `size` of them; anything else as it is.

    Cut are tensors of this first size, lists of this length, and tuples of this length unless
    their items are such tensors. Other tuples and mappings are searched.
    """
    if isinstance(value, torch.Tensor):
        return value[start:end] if value.ndim and value.shape[0] == size else value
    if isinstance(value, list):
        return value[start:end] if len(value) == size else value
    if isinstance(value, tuple):
        batched = all(isinstance(item, torch.Tensor) and size_of(item) == size for item in value)
        if len(value) == size and not batched:
            return value[start:end]
        return tuple(part_of(item, start, end, size) for item in value)
    if isinstance(value, Mapping):
        return {key: part_of(item, start, end, size) for key, item in value.items()}
    return value


def moved(value: Any, device: torch.device) -> Any:
    """`value` with its tensors on `device`; tuples, lists and dictionaries keep their structure.

    So does what else has a `to` method, such as the batches of transformers.
    """
    done: dict[int, Any] = {}

    def move(leaf: Any) -> Any:
        if not callable(getattr(leaf, "to", None)):
            return leaf
        if id(leaf) not in done:
            done[id(leaf)] = leaf.to(device)
        return done[id(leaf)]

    return tree_map(move, value)
