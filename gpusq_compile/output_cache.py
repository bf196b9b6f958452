"""What a module gave for a batch, so that it is not run on it again while it stays as it is."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_leaves, tree_map

MOST_BYTES = 64 << 20
"""Inputs and outputs that are kept; beyond, a batch is run again: maps of many classes are."""

MOST_BATCHES = 8
"""Batches that are kept: those that come again are the first ones."""


class Cached(nn.Module):
    """A module that is run once on each of a few small batches, which are found by their values.

    The module must stay as it is, leave its inputs alone and depend on tensors only, as graphs do.
    Whoever calls it may write into what goes in and out.
    """

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module
        self._kept: list[tuple[list[torch.Tensor], Any]] = []
        self._bytes = 0

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        inputs = _tensors((args, kwargs))
        for known, outputs in self._kept:
            if same(known, inputs):
                return _copy(outputs)
        outputs = self.module(*args, **kwargs)
        self.keep(inputs, outputs)
        return outputs

    def keep(self, inputs: list[torch.Tensor], outputs: Any) -> None:
        """Answer the flat `inputs` by `outputs` from now on, if they are small."""
        size = sum(tensor.nbytes for tensor in [*inputs, *_tensors(outputs)])
        if len(self._kept) < MOST_BATCHES and self._bytes + size <= MOST_BYTES:
            self._kept.append((_copy(inputs), _copy(outputs)))
            self._bytes += size


def _tensors(tree: Any) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


def _copy(tree: Any) -> Any:
    return tree_map(lambda leaf: leaf.clone() if isinstance(leaf, torch.Tensor) else leaf, tree)


def same(first: list[torch.Tensor], second: list[torch.Tensor]) -> bool:
    """Whether the tensors are equal one by one, in type, device, shape and values."""
    return len(first) == len(second) and all(
        one.dtype == other.dtype and one.device == other.device and torch.equal(one, other)
        for one, other in zip(first, second, strict=True)
    )
