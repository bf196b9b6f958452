"""Structured sparsity: patterns, masks by score, their legality, and the module that applies them.

A pattern says which weights of each aligned group along the reduction axis may be non-zero. Those
here are what NVIDIA's sparse tensor cores read: PTX ISA, "Matrix multiply-accumulate operation
using mma.sp instruction with sparse matrix A". For 8-bit and wider types it takes at most two
non-zeros of four (2:4); for 4-bit integers it takes non-zeros "pair-wise structured at a
granularity of 4:8": of the four aligned pairs of each eight, two. A third of the masks of the
latter are not 2:4 (both pairs may lie in one half), and few 2:4 masks come in pairs, so neither
serves the other's hardware; one aligned pair of each four serves both. Section 2.1 of GPUSQ-ViT
(CVPR 2023) prunes in the first two.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import combinations, product

import torch
from torch import nn

REDUCTION_AXIS = 1
"""Axis of the reduction in a linear's [out, in] and a convolution's [out, in, kh, kw] weight."""


@dataclass(frozen=True)
class Pattern:
    """At most `keep` units with non-zeros in each aligned group along the reduction axis.

    A unit is `unit` aligned neighbours, which are kept or pruned together; `group` counts weights
    and is a multiple of `unit`.
    """

    keep: int
    group: int
    unit: int = 1

    @property
    def units(self) -> int:
        """Units in a group."""
        return self.group // self.unit

    @property
    def density(self) -> float:
        """The share of weights that stay."""
        return self.keep / self.units

    def by_unit(self) -> Pattern:
        """The same pattern where each unit is one element."""
        return Pattern(self.keep, self.units)

    def allows(self, other: Pattern) -> bool:
        """Whether every mask of `other` is one of this pattern too."""
        size = math.lcm(self.group, other.group)
        rows = product(group_masks(other).float(), repeat=size // other.group)
        return violations(torch.stack([torch.cat(row) for row in rows]), self) == 0


PATTERNS = {
    "2:4": Pattern(keep=2, group=4),
    "pair4:8": Pattern(keep=2, group=8, unit=2),
    "portable": Pattern(keep=1, group=4, unit=2),
}


def group_masks(pattern: Pattern) -> torch.Tensor:
    """Every fullest legal mask of one group: bool [masks, group], first those that keep the first.

    What is not among them is a subset of one that is, and never better.
    """
    kept = list(combinations(range(pattern.units), pattern.keep))
    masks = torch.zeros(len(kept), pattern.units, dtype=torch.bool)
    for mask, places in zip(masks, kept, strict=True):
        mask[list(places)] = True
    return masks.repeat_interleave(pattern.unit, dim=1)


def magnitude_mask(weight: torch.Tensor, pattern: Pattern) -> torch.Tensor:
    """The mask that keeps the `keep` units of largest energy (sum of squares) of each group.

    Args:
        weight: [out, in, ...] with `in` a multiple of the group, any float dtype.

    Returns:
        A bool tensor of the weight's shape with exactly `keep` units True in each group; of equal
        units the earlier is kept, so that the mask is a function of the weight alone.

    Raises:
        ValueError: the reduction axis is no multiple of the group.
    """
    return _highest(weight.abs(), pattern)


def wanda_mask(weight: torch.Tensor, mean_squares: torch.Tensor, pattern: Pattern) -> torch.Tensor:
    """The mask that keeps the `keep` units of each group with the largest `|W| * ||x||`.

    "A Simple and Effective Pruning Approach for Large Language Models" (Sun et al., ICLR 2024),
    section 3, with each group of the pattern as the comparison group. Of a unit of several weights
    the squares are summed.

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
    largest = float(norms.max())
    norms = (norms / largest).clamp_min(1e-9) if largest > 0 else torch.ones_like(norms)
    magnitudes = weight.abs().double()
    return _highest(_in_range(magnitudes, magnitudes.max()) * norms, pattern)


def _highest(scores: torch.Tensor, pattern: Pattern) -> torch.Tensor:
    groups = _grouped(scores, pattern)
    energy = groups
    if pattern.unit > 1:  # The order of single magnitudes is that of their squares.
        groups = groups.double()
        groups = _in_range(groups, groups.amax(dim=-1, keepdim=True))
        units = groups.reshape(*groups.shape[:-1], pattern.units, pattern.unit)
        energy = units.square().sum(dim=-1)
    order = energy.argsort(dim=-1, descending=True, stable=True)
    mask = torch.zeros_like(energy, dtype=torch.bool)
    mask.scatter_(-1, order[..., : pattern.keep], True)
    return _ungrouped(mask.repeat_interleave(pattern.unit, dim=-1), scores.shape)


def _in_range(values: torch.Tensor, largest: torch.Tensor) -> torch.Tensor:
    """`values`, double, by the power of two that brings the largest near 1: its square, and its
    product with a number below 1, stay in range."""
    largest = largest.clamp_min(torch.finfo(values.dtype).tiny)
    return values * (torch.frexp(largest).mantissa / largest)


def violations(weight: torch.Tensor, pattern: Pattern) -> int:
    """How many aligned groups of `weight` [out, in, ...] hold non-zeros in too many units."""
    groups = _grouped(weight, pattern).ne(0)
    units = groups.reshape(*groups.shape[:-1], pattern.units, pattern.unit).any(dim=-1)
    return int(units.sum(dim=-1).gt(pattern.keep).sum())


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
