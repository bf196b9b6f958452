"""2:4 structured sparsity: masks by score, their legality, and the module that applies them.

The pattern is the one that NVIDIA's sparse tensor cores read (PTX `mma.sp`, section "Matrix
multiply-accumulate operation using mma.sp instruction"): in each aligned group of four elements
along the reduction axis at most two are non-zero.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import combinations

import torch
from torch import nn

REDUCTION_AXIS = 1
"""Axis of the reduction in a linear's [out, in] and a convolution's [out, in, kh, kw] weight."""


@dataclass(frozen=True)
class Pattern:
    """At most `keep` non-zeros in each aligned group of `group` along the reduction axis."""

    keep: int
    group: int


PATTERNS = {"2:4": Pattern(keep=2, group=4)}


def group_masks(pattern: Pattern) -> torch.Tensor:
    """Every fullest legal mask of one group: bool [masks, group], first those that keep the first.

    What is not among them is a subset of one that is, and never better.
    """
    kept = list(combinations(range(pattern.group), pattern.keep))
    masks = torch.zeros(len(kept), pattern.group, dtype=torch.bool)
    for mask, places in zip(masks, kept, strict=True):
        mask[list(places)] = True
    return masks


def magnitude_mask(weight: torch.Tensor, pattern: Pattern) -> torch.Tensor:
    """The mask that keeps the `keep` largest magnitudes of each group.

    Args:
        weight: [out, in, ...] with `in` a multiple of the group, any float dtype.

    Returns:
        A bool tensor of the weight's shape with exactly `keep` True in each group; of equal
        magnitudes the earlier is kept, so that the mask is a function of the weight alone.

    Raises:
        ValueError: the reduction axis is no multiple of the group.
    """
    return _highest(weight.abs(), pattern)


def wanda_mask(weight: torch.Tensor, mean_squares: torch.Tensor, pattern: Pattern) -> torch.Tensor:
    """The mask that keeps the `keep` largest `|W| * ||x||` of each group.

    "A Simple and Effective Pruning Approach for Large Language Models" (Sun et al., ICLR 2024),
    section 3, with each group of the pattern as the comparison group.

    Args:
        weight: [out, columns], any float dtype; `columns` is a multiple of the group.
        mean_squares: [columns], the mean square of the input that each column meets. Among
            inputs that are always zero the magnitude decides.

    Returns:
        As `magnitude_mask`.

    Raises:
        ValueError: the reduction axis is no multiple of the group.
    """
    norms = mean_squares.double().sqrt()
    norms = norms.clamp_min(1e-9 * float(norms.max()) or 1.0)
    return _highest(weight.abs() * norms, pattern)


def _highest(scores: torch.Tensor, pattern: Pattern) -> torch.Tensor:
    groups = _grouped(scores, pattern)
    order = groups.argsort(dim=-1, descending=True, stable=True)
    mask = torch.zeros_like(groups, dtype=torch.bool)
    mask.scatter_(-1, order[..., : pattern.keep], True)
    return _ungrouped(mask, scores.shape)


def violations(weight: torch.Tensor, pattern: Pattern) -> int:
    """How many aligned groups of `weight` [out, in, ...] hold more than `keep` non-zeros."""
    nonzero = _grouped(weight, pattern).ne(0).sum(dim=-1)
    return int(nonzero.gt(pattern.keep).sum())


def _grouped(weight: torch.Tensor, pattern: Pattern) -> torch.Tensor:
    """[out, in, ...] -> [..., in / group, group] with the reduction axis last."""
    size = weight.shape[REDUCTION_AXIS]
    if size % pattern.group:
        raise ValueError(f"reduction axis {size} is not a multiple of {pattern.group}")
    moved = weight.movedim(REDUCTION_AXIS, -1)
    return moved.reshape(*moved.shape[:-1], size // pattern.group, pattern.group)


def _ungrouped(groups: torch.Tensor, shape: torch.Size) -> torch.Tensor:
    flat = groups.reshape(*groups.shape[:-2], -1)
    return flat.movedim(-1, REDUCTION_AXIS).reshape(shape)


class Mask(nn.Module):
    """Multiplies a weight by a fixed 0/1 mask.

    The gradient of a masked entry is zero through the same product, so a frozen mask needs no
    care in the training loop beyond starting from zeroed entries.
    """

    mask: torch.Tensor

    def __init__(self, mask: torch.Tensor) -> None:
        super().__init__()
        self.register_buffer("mask", mask.to(torch.bool))

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        # Converting bytes is several times as fast on a CPU as multiplying by a bool tensor.
        return weight * self.mask.view(torch.uint8).to(weight.dtype)
