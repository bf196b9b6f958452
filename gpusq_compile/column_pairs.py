"""Which columns form the units of a pattern of pairs, such as pair-wise 4:8.

A unit is kept or pruned as a whole, so the pattern keeps most where the two columns of a unit are
large in the same rows, and the units of one group in different rows. `pair_by_covariance` makes
units of the former kind to start with; `pair_anew` improves units and groups together.
"""

from __future__ import annotations

from functools import cache
from itertools import combinations

import torch

from gpusq_compile.sparsity import Pattern

CHUNK_BYTES = 8 * 2**20
"""Memory for what is computed from the columns of one chunk of pairs.

More leaves the caches, and less is mostly calls. Several chunks at once on threads are slower than
one after the other: between calls as short as these the threads wait for the interpreter.
"""

Pair = tuple[int, int]


def pair_by_covariance(energy: torch.Tensor, labels: torch.Tensor, group: int) -> torch.Tensor:
    """An order in which neighbours, (0, 1), (2, 3) and so on, covary most.

    The energy that a group keeps grows with the spread between its units: for two units it is half
    of their sum and half of their difference. What spreads units is the variance of their
    energies over the rows, and of that the choice of pairs decides only the covariance.

    Args:
        energy: float32 [in, out], squared weights.
        labels: int64 [in / group], the block of each group. Columns stay within their block, and
            those of a group that is labelled -1 where they are.

    Returns:
        int64 [in], the old column at each position.
    """
    order = torch.arange(len(energy))
    for label in torch.unique(labels[labels >= 0]):
        groups = (labels == label).nonzero()
        places = (groups * group + torch.arange(group)).flatten()
        spread = energy[places.to(energy.device)]
        spread = spread - spread.mean(dim=1, keepdim=True)
        # The products of large energies would leave the range of float32.
        spread /= spread.abs().max().clamp_min(torch.finfo(spread.dtype).tiny)
        order[places] = places[greedy_matching(spread @ spread.T).cpu()]
    return order


def greedy_matching(gain: torch.Tensor) -> torch.Tensor:
    """All of an even number of items in pairs, the pair of most gain first, then of what is left.

    Two that are each other's best are in that matching whatever else is, so each round takes all
    such pairs at once. There always is one: of the pairs of most gain, the first.

    Args:
        gain: [items, items], symmetric.

    Returns:
        int64 [items], the pairs one after the other.
    """
    gain = gain.clone().fill_diagonal_(-torch.inf)
    best = gain.argmax(dim=1)
    left = torch.arange(len(gain), device=gain.device)
    free = torch.ones_like(left, dtype=torch.bool)
    found = []
    while len(left):
        item = left[(best[best[left]] == left) & (left < best[left])]
        found.append(torch.stack([item, best[item]], dim=1).flatten())
        free[found[-1]] = False
        gain.index_fill_(1, found[-1], -torch.inf)
        left = left[free[left]]
        # Only who has lost his best looks for another.
        bereft = left[~free[best[left]]]
        best[bereft] = gain[bereft].argmax(dim=1)
    return torch.cat(found)


def pair_anew(
    energy: torch.Tensor,
    order: torch.Tensor,
    pairs: torch.Tensor,
    pattern: Pattern,
    generator: torch.Generator,
) -> float:
    """Place the columns of two units of each of two groups anew, in the best of all 630 ways.

    Which of the eight columns form a unit and which units share a group are chosen together: the
    best units for one grouping are seldom those for another.

    Args:
        energy: float32 [in, out], squared weights by old channel.
        order: int64 [in], the old channel at each position; changed in place.
        pairs: int64 [pairs, 2], disjoint groups.
        pattern: of units of two columns.
        generator: decides which units of a larger group are taken, a CPU generator.

    Returns:
        The energy gained.
    """
    shuffled = torch.rand(*pairs.shape, pattern.units, generator=generator).argsort(dim=-1)
    units = pairs[:, :, None] * pattern.units + shuffled
    places = units[..., None] * 2 + torch.arange(2)
    moved, fixed = places[:, :, :2].flatten(1), places[:, :, 2:].flatten(2)
    ways = arrangements()
    # All pairs of columns are kept while a chunk is looked at, besides what they are made of.
    row_bytes = 4 * energy.shape[1] * (len(_pairs()) + 2 * pattern.group + 8)
    step = max(1, CHUNK_BYTES // row_bytes)

    gain = 0.0
    for part, beside in zip(torch.split(moved, step), torch.split(fixed, step), strict=True):
        values = energy[order[part].T.to(energy.device)]
        others = energy[order[beside].permute(1, 2, 0).to(energy.device)]
        scores = arrangement_energy(values, others[:, ::2] + others[:, 1::2], pattern.keep)
        gain += take_best(order, part, ways, scores)
    return gain


def take_best(
    order: torch.Tensor, places: torch.Tensor, ways: torch.Tensor, scores: torch.Tensor
) -> float:
    """Reorder columns in the best way of each row of places, in place; the energy gained.

    Args:
        order: int64 [in], the old channel at each position.
        places: int64 [pairs, columns], disjoint positions.
        ways: int64 [ways, columns], orders of these; the first leaves all as it is.
        scores: [ways, pairs], the energy kept in each way.
    """
    best, way = scores.max(dim=0)
    better = best > scores[0] * (1 + 1e-6)
    way = torch.where(better, way, 0).cpu()
    order[places] = order[places].gather(1, ways[way])
    return float((best - scores[0])[better].sum())


def arrangement_energy(values: torch.Tensor, others: torch.Tensor, keep: int) -> torch.Tensor:
    """The energy that two groups keep in each arrangement: [ways, pairs].

    Args:
        values: [8, pairs, out], energies of the columns that are placed.
        others: [2, units, pairs, out], those of each group's other units.
        keep: units that a group keeps, not all of them.
    """
    # The most that one, two, ... of the other units keep.
    most = others.sort(dim=1, descending=True).values.cumsum(dim=1)
    unit = {pair: values[pair[0]] + values[pair[1]] for pair in _pairs()}
    one = _half_energy(unit, most[0], keep)
    two = _half_energy(unit, most[1], keep) if len(most[1]) else one
    first, second = _halves_of_arrangements().unbind(dim=1)
    return one[first] + two[second]


def _half_energy(unit: dict[Pair, torch.Tensor], most: torch.Tensor, keep: int) -> torch.Tensor:
    """The energy that a group keeps with each half of the columns as two units: [halves, pairs].

    The best `keep` units are the best of: so many of the two, and the rest of the others, whose
    sums are `most` [units, pairs, out].
    """
    found = []
    extreme: torch.Tensor | None = None
    for index, (one, two) in enumerate(_halves()):
        if index % 3 == 0:  # Both or neither is the same for all three ways.
            extreme = most[keep - 1] if keep <= len(most) else None
            if keep >= 2:
                both = unit[one] + unit[two]
                both = both + most[keep - 3] if keep > 2 else both
                extreme = both if extreme is None else torch.maximum(both, extreme)
        best = torch.maximum(unit[one], unit[two])
        if keep > 1:
            best += most[keep - 2]
        if extreme is not None:
            torch.maximum(best, extreme, out=best)
        found.append(best.sum(dim=-1))
    return torch.stack(found)


@cache
def _pairs() -> list[Pair]:
    """The 28 pairs of eight columns."""
    return list(combinations(range(8), 2))


@cache
def _halves() -> list[tuple[Pair, Pair]]:
    """Half of eight columns as two units: 70 halves, each in its three ways one after the other."""
    return [
        way
        for a, b, c, d in combinations(range(8), 4)
        for way in (((a, b), (c, d)), ((a, c), (b, d)), ((a, d), (b, c)))
    ]


@cache
def _halves_of_arrangements() -> torch.Tensor:
    """Every arrangement of eight columns: the half of each group, int64 [630, 2].

    The first leaves all as it is.
    """
    columns = [frozenset(one + two) for one, two in _halves()]
    everything = frozenset(range(8))
    ways = [
        (first, second)
        for first, one in enumerate(columns)
        for second, two in enumerate(columns)
        if two == everything - one
    ]
    return torch.tensor(ways)


@cache
def arrangements() -> torch.Tensor:
    """Every way to make eight columns two units of one group and two of another: int64 [630, 8].

    The first leaves all as it is.
    """
    halves = torch.tensor(_halves()).flatten(1)
    return halves[_halves_of_arrangements()].flatten(1)
