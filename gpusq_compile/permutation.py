"""Search for an order of input channels in which a sparsity pattern keeps more of a weight.

The pattern keeps `keep` units of each aligned group of columns, row by row. Which columns share a
group is free wherever the columns may be reordered, so the search regroups them: it takes groups
in random disjoint pairs, tries every way to split a pair's units into two groups, and keeps the
best. Where a unit is two columns, which columns form one is free too. Channel permutation for N:M
sparsity is the idea of Pool and Yu, "Channel Permutations for N:M Sparsity" (NeurIPS 2021).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache
from itertools import combinations

import torch

from gpusq_compile.column_pairs import CHUNK_BYTES, pair_anew, pair_by_covariance, take_best
from gpusq_compile.sparsity import Pattern

SMALL = 1 << 16
"""Weights of a layer up to which the search goes on for as long as it finds anything."""

WORK = 12 * 10**6
"""Rows times columns that the search may visit in all of a larger one, which so gets fewer rounds:
most of what is gained is gained in the first."""

MIN_ROUNDS = 10
MEETINGS = 4
"""Times that two groups of one block meet in a larger layer on average; few gain anything later."""

LARGE_ROUND = 4
"""A round takes so many times as long where groups hold more than two units of two columns."""

MAX_ROUNDS = 300
PATIENCE = 12
MIN_GAIN = 1e-5
"""The search ends after `PATIENCE` rounds in a row that each gain less than this of the energy."""


@dataclass(frozen=True)
class Order:
    """An order of channels and what the pattern keeps with it.

    `channels` int64 [in]: position j holds the old channel `channels[j]`. `before` and `after` are
    the shares of the energy (sum of squares) that the pattern keeps in the old and the new order.
    """

    channels: torch.Tensor
    before: float
    after: float


def best_order(
    weight: torch.Tensor,
    pattern: Pattern,
    generator: torch.Generator,
    *,
    blocks: torch.Tensor | None = None,
) -> Order:
    """An order of the columns with at least the energy kept that the given order has.

    Args:
        weight: [out, in] with `in` a multiple of the group, any float dtype, scaled per column
            beforehand where channels do not count alike.
        generator: a CPU generator; the result is a function of the weight and its state.
        blocks: int64 [in], columns may trade places only with columns of the same number, such as
            the channels of one attention head. A group across two blocks stays as it is. All
            columns are one block where None.

    Raises:
        ValueError: the number of columns is no multiple of the group, or the pattern's units are
            larger than pairs.
    """
    rows, columns = weight.shape
    if columns % pattern.group:
        raise ValueError(f"{columns} columns are not a multiple of {pattern.group}")
    if pattern.unit > 2:
        raise ValueError(f"no search for units of {pattern.unit} columns")
    # By a power of two, so that squares of any weight stay in range and nothing else changes.
    exponent = math.frexp(float(weight.abs().max()))[1]
    energy = (weight.detach().double() * 2.0**-exponent).float().square().T.contiguous()
    total = float(energy.sum(dtype=torch.float64)) or 1.0
    identity = torch.arange(columns)
    order = identity.clone()
    labels = group_blocks(blocks, columns, pattern)
    if pattern.unit == 2:
        paired = pair_by_covariance(energy, labels, pattern.group)
        if kept_energy(energy, paired, pattern) > kept_energy(energy, order, pattern):
            order = paired
    rounds = MAX_ROUNDS if rows * columns <= SMALL else affordable_rounds(rows, labels, pattern)
    idle = 0
    for _ in range(rounds):
        pairs = random_pairs(labels, generator)
        if not len(pairs):
            break
        gain = improve(energy, order, pairs, pattern, generator)
        idle = 0 if gain > MIN_GAIN * total else idle + 1
        if idle == PATIENCE:
            break
    before = kept_energy(energy, identity, pattern) / total
    after = kept_energy(energy, order, pattern) / total
    if after > before:
        return Order(order, before, after)
    return Order(identity, before, before)


def affordable_rounds(rows: int, labels: torch.Tensor, pattern: Pattern) -> int:
    """The rounds that the search may take in a larger layer with these blocks."""
    visits = rows * len(labels) * pattern.group
    if pattern.unit == 2 and pattern.units > 2:
        visits *= LARGE_ROUND
    others = int(torch.unique(labels, return_counts=True)[1].max()) - 1
    return min(MAX_ROUNDS, max(MIN_ROUNDS, WORK // visits), max(1, MEETINGS * others))


def group_blocks(blocks: torch.Tensor | None, columns: int, pattern: Pattern) -> torch.Tensor:
    """The block of each group, int64 [in / group]; -1 for a group across two blocks."""
    if blocks is None:
        return torch.zeros(columns // pattern.group, dtype=torch.int64)
    grouped = blocks.reshape(-1, pattern.group)
    whole = (grouped == grouped[:, :1]).all(dim=1)
    return torch.where(whole, grouped[:, 0], -1)


def random_pairs(labels: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Disjoint pairs [pairs, 2] of groups of one block, at random; an odd one out is left alone."""
    shuffled = torch.randperm(len(labels), generator=generator)
    ordered = shuffled[labels[shuffled].argsort(stable=True)]
    ordered = ordered[labels[ordered] >= 0]
    mine = labels[ordered]
    first = torch.searchsorted(mine, mine)
    place = torch.arange(len(mine)) - first
    size = torch.searchsorted(mine, mine, right=True) - first
    heads = (place % 2 == 0) & (place + 1 < size)
    start = heads.nonzero().flatten()
    return torch.stack([ordered[start], ordered[start + 1]], dim=1)


def improve(
    energy: torch.Tensor,
    order: torch.Tensor,
    pairs: torch.Tensor,
    pattern: Pattern,
    generator: torch.Generator,
) -> float:
    """One round over disjoint pairs of groups, in place in `order`; the energy gained."""
    if pattern.unit == 1:
        return regroup(energy, order, pairs, pattern)
    gain = pair_anew(energy, order, pairs, pattern, generator)
    if pattern.units > 2:
        columns = order.reshape(-1, pattern.unit)
        of_units = energy[columns.to(energy.device)].sum(dim=1)
        units = torch.arange(len(columns))
        gain += regroup(of_units, units, pairs, pattern.by_unit())
        order.copy_(columns[units].flatten())
    return gain


@cache
def splits(group: int) -> torch.Tensor:
    """Every way to split 2 * group places into two groups, int64 [ways, 2 * group].

    The first way leaves all as it is. Column 0 is always in the first half, so none comes twice:
    35 ways for groups of four.
    """
    places = range(2 * group)
    ways = [
        (0, *others, *(place for place in places if place and place not in others))
        for others in combinations(places[1:], group - 1)
    ]
    return torch.tensor(ways)


def regroup(
    energy: torch.Tensor, order: torch.Tensor, pairs: torch.Tensor, pattern: Pattern
) -> float:
    """Split each pair of groups in the best way, in place in `order`; the energy gained.

    Args:
        energy: float32 [in, out], squared weights by old channel.
        pairs: int64 [pairs, 2], disjoint groups.
    """
    group = pattern.group
    ways = splits(group)
    offsets = torch.arange(group)
    places = (pairs[:, :, None] * group + offsets).flatten(1)
    # Besides the columns, all pairs of columns are kept, twice, while a chunk is looked at.
    row_bytes = 4 * energy.shape[1] * 2 * (group * (2 * group - 1) + 2 * group)
    step = max(1, CHUNK_BYTES // row_bytes)

    gain = 0.0
    for part in torch.split(places, step):
        values = energy[order[part].T.to(energy.device)]
        gain += take_best(order, part, ways, split_scores(values, pattern))
    return gain


def split_scores(values: torch.Tensor, pattern: Pattern) -> torch.Tensor:
    """The energy kept [ways, pairs] by each split of `values` [2 * group, pairs, out]."""
    kept = subset_energy(values, pattern)
    group = pattern.group
    return torch.stack(
        [
            kept[tuple(sorted(way[:group]))] + kept[tuple(sorted(way[group:]))]
            for way in splits(group).tolist()
        ]
    )


def subset_energy(values: torch.Tensor, pattern: Pattern) -> dict[tuple[int, ...], torch.Tensor]:
    """The energy kept [pairs] in each `group` of the columns `values` [2 * group, pairs, out]."""
    subsets = combinations(range(len(values)), pattern.group)
    if (pattern.keep, pattern.group) != (2, 4):
        return {s: top_sum(values[list(s)], pattern.keep) for s in subsets}
    larger: dict[tuple[int, int], torch.Tensor] = {}
    both: dict[tuple[int, int], torch.Tensor] = {}
    for i, j in combinations(range(len(values)), 2):
        larger[i, j] = torch.maximum(values[i], values[j])
        both[i, j] = values[i] + values[j]
    found: dict[tuple[int, ...], torch.Tensor] = {}
    for a, b, c, d in subsets:
        # The two largest of four: the larger one of each pair, or one of the pairs.
        best = larger[a, b] + larger[c, d]
        torch.maximum(best, both[a, b], out=best)
        torch.maximum(best, both[c, d], out=best)
        found[a, b, c, d] = best.sum(dim=-1)
    return found


def top_sum(values: torch.Tensor, keep: int) -> torch.Tensor:
    return values.topk(keep, dim=0).values.sum(dim=(0, -1))


def kept_energy(energy: torch.Tensor, order: torch.Tensor, pattern: Pattern) -> float:
    """The energy that the pattern keeps with the columns of `energy` [in, out] in this order."""
    ordered = energy[order.to(energy.device)]
    units = ordered.reshape(-1, pattern.units, pattern.unit, energy.shape[1]).sum(dim=2)
    return float(units.topk(pattern.keep, dim=1).values.sum(dtype=torch.float64))
