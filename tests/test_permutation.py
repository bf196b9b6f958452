"""The search for an order: a bijection that never keeps less, and the best where all are tried."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import combinations
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from gpusq_compile.column_pairs import (
    arrangement_energy,
    arrangements,
    greedy_matching,
    pair_anew,
    pair_by_covariance,
)
from gpusq_compile.permutation import Order, best_order, improve, random_pairs, splits
from gpusq_compile.sparsity import PATTERNS, Pattern, magnitude_mask
from tests.models import noise

TWO_OF_FOUR = PATTERNS["2:4"]
PAIRWISE = PATTERNS["pair4:8"]
PORTABLE = PATTERNS["portable"]
every_pattern = pytest.mark.parametrize("pattern", PATTERNS.values(), ids=PATTERNS)


@pytest.fixture(autouse=True)
def fewer_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiny weights need no more."""
    monkeypatch.setattr("gpusq_compile.permutation.MAX_ROUNDS", 60)


def energy_kept(weight: Tensor, pattern: Pattern) -> float:
    """By the mask that sparsify makes, not by anything of the search."""
    weight = weight.double()
    return float((weight * magnitude_mask(weight, pattern)).square().sum())


def share_kept(weight: Tensor, pattern: Pattern) -> float:
    return energy_kept(weight, pattern) / float(weight.double().square().sum())


def search(weight: Tensor, pattern: Pattern, seed: int = 0, **options: Any) -> Order:
    return best_order(weight, pattern, torch.Generator().manual_seed(seed), **options)


def energies(weight: Tensor) -> Tensor:
    return weight.square().T.contiguous()


@settings(max_examples=50, deadline=None)
@given(
    st.integers(1, 6),
    st.integers(1, 5),
    st.integers(0, 2**31),
    st.sampled_from([*PATTERNS.values(), Pattern(1, 4), Pattern(1, 2), Pattern(3, 4)]),
    st.booleans(),
    st.sampled_from([1.0, 1e-30, 1e30]),
    st.data(),
)
def test_the_order_is_a_bijection_within_blocks_that_keeps_no_less(
    rows: int,
    groups: int,
    seed: int,
    pattern: Pattern,
    coarse: bool,
    size: float,
    data: st.DataObject,
) -> None:
    columns = groups * pattern.group
    weight = noise(rows, columns, seed=seed)
    weight = size * (weight.round() if coarse else weight)
    blocks = torch.tensor(
        data.draw(st.lists(st.integers(0, 2), min_size=columns, max_size=columns))
    )
    blocks = blocks.sort().values
    found = search(weight, pattern, seed, blocks=blocks)
    assert found.channels.sort().values.tolist() == list(range(columns))
    assert torch.equal(blocks[found.channels], blocks)
    total = float(weight.double().square().sum()) or 1.0
    before, after = energy_kept(weight, pattern), energy_kept(weight[:, found.channels], pattern)
    assert after >= before * (1 - 1e-6)
    assert found.after >= found.before
    assert (found.before, found.after) == pytest.approx((before / total, after / total), rel=1e-5)


@pytest.mark.parametrize("pattern", [TWO_OF_FOUR, Pattern(1, 4), Pattern(1, 2)])
@pytest.mark.parametrize("seed", range(5))
def test_two_groups_are_split_in_the_best_of_all_ways(pattern: Pattern, seed: int) -> None:
    weight = noise(3, 2 * pattern.group, seed=seed)
    places = set(range(2 * pattern.group))
    best = max(
        energy_kept(weight[:, [*half, *(places - set(half))]], pattern)
        for half in combinations(sorted(places), pattern.group)
    )
    found = search(weight, pattern)
    assert energy_kept(weight[:, found.channels], pattern) == pytest.approx(best, rel=1e-6)


def matchings(items: list[int]) -> Iterator[list[int]]:
    """Every way to make pairs of the items, as an order in which pairs are neighbours."""
    if not items:
        yield []
        return
    first, *rest = items
    for partner in rest:
        for others in matchings([item for item in rest if item != partner]):
            yield [first, partner, *others]


@pytest.mark.parametrize("seed", range(5))
def test_two_portable_groups_get_the_best_of_all_pairs_and_groups(seed: int) -> None:
    weight = noise(3, 8, seed=seed)
    orders = list(matchings(list(range(8))))
    assert len(orders) == 105
    # With the pairs chosen, the first pair's partner decides both groups.
    best = max(
        energy_kept(weight[:, order[:2] + order[2 * k : 2 * k + 2] + rest], PORTABLE)
        for order in orders
        for k in (1, 2, 3)
        for rest in [order[2 : 2 * k] + order[2 * k + 2 :]]
    )
    found = search(weight, PORTABLE)
    assert energy_kept(weight[:, found.channels], PORTABLE) == pytest.approx(best, rel=1e-6)


@pytest.mark.parametrize("seed", range(3))
def test_two_pairwise_groups_come_close_to_the_best_of_several_searches(seed: int) -> None:
    """Of the 70 million orders of 16 columns, none of those that restarts find is much better."""
    weight = noise(4, 16, seed=seed)
    found = share_kept(weight[:, search(weight, PAIRWISE).channels], PAIRWISE)
    generator = torch.Generator().manual_seed(seed)
    best = 0.0
    for start in range(4):
        shuffled = weight[:, torch.randperm(16, generator=generator)]
        best = max(best, search(shuffled, PAIRWISE, start).after)
    assert found > share_kept(weight, PAIRWISE)
    assert found > best - 0.02


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize(("pattern", "share"), [(PAIRWISE, 0.97), (PORTABLE, 0.999)])
def test_columns_that_belong_together_are_found_again(
    pattern: Pattern, share: float, seed: int
) -> None:
    """Each row is large in half of the units of each group: in that order all of it is kept."""
    rows, groups = 64, 6
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.rand(rows, groups, pattern.units, generator=generator).argsort(dim=-1)
    large = (chosen < pattern.keep).repeat_interleave(2, dim=-1).reshape(rows, -1)
    weight = noise(rows, groups * pattern.group) * torch.where(large, 1.0, 0.01)
    assert share_kept(weight, pattern) > 0.999
    shuffled = weight[:, torch.randperm(weight.shape[1], generator=generator)]
    found = search(shuffled, pattern)
    assert found.before < 0.92
    assert found.after > share
    # What is as good as can be stays as it is, or as good.
    assert search(weight, pattern).after > 0.999


def test_pairs_are_worth_more_than_units_that_stay_together() -> None:
    """Regrouping units as they are, without new pairs, keeps less."""
    weight = noise(64, 128)
    of_units = energies(weight).reshape(64, 2, 64).sum(dim=1)
    for pattern, gain in ((PORTABLE, 0.02), (PAIRWISE, 0.005)):
        together = best_order(
            of_units.sqrt().T, pattern.by_unit(), torch.Generator().manual_seed(0)
        )
        assert search(weight, pattern).after > together.after + gain


@pytest.mark.parametrize("pattern", [PAIRWISE, PORTABLE, TWO_OF_FOUR])
def test_an_order_helps_gaussian_weights_by_a_known_margin(pattern: Pattern) -> None:
    found = search(noise(64, 128), pattern)
    assert found.after > found.before + 0.02


def test_large_columns_that_crowd_one_group_are_spread_over_all_of_them() -> None:
    weight = noise(16, 32) * 0.01
    weight[:, :16] += 1.0
    found = search(weight, TWO_OF_FOUR)
    grouped = (found.channels < 16).reshape(-1, 4).sum(dim=1)
    assert grouped.tolist() == [2] * 8
    assert found.before < 0.55
    assert found.after > 0.99


@pytest.mark.parametrize(("pattern", "large"), [(PORTABLE, 1), (PAIRWISE, 2)])
def test_large_columns_share_units_and_spread_over_groups(pattern: Pattern, large: int) -> None:
    weight = noise(16, 32) * 0.01
    weight[:, :16] += 1.0
    found = search(weight, pattern)
    units = (found.channels < 16).reshape(-1, pattern.units, 2).sum(dim=2)
    assert units.ne(1).all()
    assert units.eq(2).sum(dim=1).tolist() == [large] * (32 // pattern.group)
    assert found.after > 0.99


@pytest.mark.parametrize(("work", "rounds"), [(0, 10), (16 * 64 * 20, 20), (10**9, 60)])
def test_a_large_layer_is_searched_for_as_many_rounds_as_its_size_allows(
    work: int, rounds: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    searched = []

    def counted(*arguments: Any) -> float:
        searched.append(arguments)
        return 1.0 + improve(*arguments)  # So that it is never the gain that ends the search.

    monkeypatch.setattr("gpusq_compile.permutation.improve", counted)
    monkeypatch.setattr("gpusq_compile.permutation.WORK", work)
    small = search(noise(16, 64), TWO_OF_FOUR)
    assert len(searched) == 60
    searched.clear()
    monkeypatch.setattr("gpusq_compile.permutation.SMALL", 16 * 64 - 1)
    large = search(noise(16, 64), TWO_OF_FOUR)
    assert len(searched) == rounds
    assert large.before < large.after <= small.after


def test_there_are_35_ways_to_split_eight_columns() -> None:
    ways = splits(4)
    assert ways.shape == (35, 8)
    assert ways[0].tolist() == list(range(8))
    assert len({frozenset(way[:4]) for way in ways.tolist()}) == 35


def test_there_are_630_ways_to_make_eight_columns_two_units_of_each_of_two_groups() -> None:
    ways = arrangements().tolist()
    assert ways[0] == list(range(8))
    assert all(sorted(way) == list(range(8)) for way in ways)
    units = [[frozenset(way[i : i + 2]) for i in range(0, 8, 2)] for way in ways]
    assert len({(frozenset(unit[:2]), frozenset(unit[2:])) for unit in units}) == len(ways) == 630


@pytest.mark.parametrize(
    ("keep", "others"), [(1, 0), (1, 1), (2, 1), (1, 2), (2, 2), (3, 2), (3, 3), (4, 3)]
)
def test_the_energy_of_an_arrangement_is_that_of_the_units_it_keeps(keep: int, others: int) -> None:
    values, beside = noise(8, 3, 5).square(), noise(2, others, 3, 5, seed=1).square()
    found = arrangement_energy(values, beside, keep)
    for way, energy in zip(arrangements().tolist(), found, strict=True):
        units = values[way].reshape(2, 2, 2, 3, 5).sum(dim=2)
        kept = torch.cat([units, beside], dim=1).topk(keep, dim=1).values
        torch.testing.assert_close(energy, kept.sum(dim=(0, 1, 3)))


@pytest.mark.parametrize("pattern", [PAIRWISE, PORTABLE, Pattern(1, 8, 2), Pattern(2, 6, 2)])
def test_pairing_anew_gains_what_it_says_and_reaches_the_best_of_its_arrangements(
    pattern: Pattern,
) -> None:
    weight = noise(5, 4 * pattern.group)
    energy = energies(weight)
    order = torch.arange(len(energy))
    pairs = torch.tensor([[2, 0], [1, 3]])
    gain = pair_anew(energy, order, pairs, pattern, torch.Generator().manual_seed(1))
    assert gain > 0
    before, after = energy_kept(weight, pattern), energy_kept(weight[:, order], pattern)
    assert after - before == pytest.approx(gain, rel=1e-4)
    # The same units taken once more: nothing is left to gain.
    assert pair_anew(energy, order, pairs, pattern, torch.Generator().manual_seed(1)) == 0


@given(st.integers(1, 6), st.integers(0, 1000), st.booleans())
def test_the_matching_takes_the_best_pair_first(half: int, seed: int, ties: bool) -> None:
    gain = noise(2 * half, 2 * half, seed=seed)
    gain = gain + gain.T
    gain = gain.round() if ties else gain
    left = set(range(2 * half))
    expected = 0.0
    found = greedy_matching(gain.clone()).tolist()
    assert sorted(found) == sorted(left)
    pairs = sorted(zip(found[::2], found[1::2], strict=True), key=lambda p: -float(gain[p]))
    for a, b in pairs:
        best = max(float(gain[i, j]) for i, j in combinations(sorted(left), 2))
        assert float(gain[a, b]) == best
        left -= {a, b}
        expected += best


def test_columns_that_covary_become_neighbours_within_their_block() -> None:
    shared = noise(50, 8).square()
    columns = [*range(8), *range(8)]
    energy = (shared[:, columns] + 0.1 * noise(50, 16, seed=1).square()).T.contiguous()
    order = pair_by_covariance(energy, torch.zeros(2, dtype=torch.int64), 8)
    assert all(abs(a - b) == 8 for a, b in order.reshape(-1, 2).tolist())
    apart = pair_by_covariance(energy, torch.tensor([0, 1]), 8)
    assert sorted(apart[:8].tolist()) == list(range(8))
    fixed = pair_by_covariance(energy, torch.tensor([-1, -1]), 8)
    assert fixed.tolist() == list(range(16))


@pytest.mark.parametrize("values", [0.0, 1.0, 3e38, torch.inf, torch.nan])
def test_columns_that_are_all_alike_are_paired_somehow(values: float) -> None:
    order = pair_by_covariance(torch.full((16, 4), values), torch.zeros(2, dtype=torch.int64), 8)
    assert sorted(order.tolist()) == list(range(16))


@given(st.lists(st.integers(-1, 3), min_size=1, max_size=30), st.integers(0, 1000))
def test_pairs_are_disjoint_within_a_block_and_leave_one_out_at_most(
    labels: list[int], seed: int
) -> None:
    given_labels = torch.tensor(labels)
    pairs = random_pairs(given_labels, torch.Generator().manual_seed(seed))
    assert pairs.flatten().unique().numel() == pairs.numel()
    assert torch.equal(given_labels[pairs[:, 0]], given_labels[pairs[:, 1]])
    for label in range(4):
        assert int((given_labels[pairs[:, 0]] == label).sum()) == labels.count(label) // 2


@every_pattern
def test_a_group_across_two_blocks_stays_where_it_is(pattern: Pattern) -> None:
    group = pattern.group
    blocks = torch.tensor([0] * (2 * group + 2) + [1] * (3 * group - 2))
    found = search(noise(4, 5 * group), pattern, blocks=blocks)
    assert found.after > found.before
    across = slice(2 * group, 3 * group)
    assert found.channels[across].tolist() == list(range(5 * group))[across]


@every_pattern
def test_the_order_follows_from_the_seed_and_leaves_the_global_random_state_alone(
    pattern: Pattern,
) -> None:
    weight = noise(8, 32)
    state = torch.get_rng_state()
    first, again, other = (search(weight, pattern, seed) for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(first.channels, again.channels)
    assert not torch.equal(first.channels, other.channels)


@every_pattern
def test_zero_weights_and_ragged_columns(pattern: Pattern) -> None:
    zeros = search(torch.zeros(4, 16), pattern)
    assert zeros.channels.tolist() == list(range(16))
    assert zeros.before == zeros.after == 0.0
    with pytest.raises(ValueError, match=f"18 columns are not a multiple of {pattern.group}"):
        search(torch.zeros(4, 18), pattern)


def test_units_that_the_search_cannot_make_are_refused() -> None:
    with pytest.raises(ValueError, match="units of 4 columns"):
        search(torch.ones(4, 16), Pattern(1, 8, 4))
