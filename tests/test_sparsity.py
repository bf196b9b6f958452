"""Masks of every pattern are legal, keep the most energy that a legal mask can, and stay frozen."""

from __future__ import annotations

from collections.abc import Iterator
from fractions import Fraction
from itertools import combinations, product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from gpusq_compile.sparsity import (
    PATTERNS,
    Mask,
    Pattern,
    group_masks,
    magnitude_mask,
    violations,
    wanda_mask,
)
from tests.models import noise

steady = settings(deadline=None, max_examples=60)  # A busy machine is no failure.
TWO_OF_FOUR = PATTERNS["2:4"]
FLOATS = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
LEGAL: dict[str, tuple[int, set[frozenset[int]]]] = {
    "2:4": (4, {frozenset(kept) for kept in combinations(range(4), 2)}),
    "pair4:8": (
        8,
        {
            frozenset({2 * a, 2 * a + 1, 2 * b, 2 * b + 1})
            for a, b in [(0, 1), (0, 2), (0, 3), (1, 2), (1, 3), (2, 3)]
        },
    ),
    "portable": (4, {frozenset({0, 1}), frozenset({2, 3})}),
}
"""Each pattern's group and the sets of places that a fullest mask keeps, spelled out."""

patterns = st.sampled_from(list(LEGAL))
every_pattern = pytest.mark.parametrize("name", LEGAL)


@st.composite
def weights(draw: st.DrawFn, kernel: bool | None = None) -> Tensor:
    """A linear's [out, in] or a convolution's [out, in, kh, kw] weight of any float type.

    Half of them are small integers, so that groups hold ties and zeros; some are as small or as
    large as the type allows.
    """
    is_kernel = draw(st.booleans()) if kernel is None else kernel
    shape = [draw(st.integers(1, 4)), 8 * draw(st.integers(1, 3))]
    shape += [draw(st.integers(1, 3)), draw(st.integers(1, 2))] if is_kernel else []
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    dtype = draw(st.sampled_from(FLOATS))
    if draw(st.booleans()):
        return torch.randint(-2, 3, shape, generator=generator).to(dtype)
    limits = torch.finfo(dtype)
    size = draw(st.sampled_from([1.0, 1.0, limits.max / 16, limits.tiny]))
    return (torch.randn(shape, generator=generator, dtype=torch.float64) * size).to(dtype)


def groups(weight: Tensor, size: int) -> Iterator[tuple[tuple[int, ...], list[float]]]:
    """Each aligned group along axis 1: where it starts, and its values. No tensor tricks: this
    is what the mask is judged by."""
    out, reduction, *kernel = weight.shape
    for o, g, *at in product(range(out), range(0, reduction, size), *(range(k) for k in kernel)):
        yield (o, g, *at), [float(weight[(o, g + i, *at)]) for i in range(size)]


def kept(mask: Tensor, start: tuple[int, ...], size: int) -> frozenset[int]:
    o, g, *at = start
    return frozenset(i for i in range(size) if bool(mask[(o, g + i, *at)]))


def energy_of(values: list[float], places: frozenset[int]) -> Fraction:
    """Without rounding, overflow or underflow."""
    return sum((Fraction(values[i]) ** 2 for i in places), Fraction(0))


def mean_squares(columns: int, seed: int) -> Tensor:
    return torch.rand(columns, generator=torch.Generator().manual_seed(seed)) + 0.01


# --- magnitude -----------------------------------------------------------------------------------


@steady
@given(weights(), patterns)
def test_a_mask_is_a_fullest_legal_one_and_keeps_the_most_energy_of_each_group(
    weight: Tensor, name: str
) -> None:
    mask = magnitude_mask(weight, PATTERNS[name])
    assert (mask.dtype, mask.shape) == (torch.bool, weight.shape)
    size, legal = LEGAL[name]
    for start, values in groups(weight, size):
        found = kept(mask, start, size)
        assert found in legal
        best = max(energy_of(values, places) for places in legal)
        # Two sums that differ by less than a double resolves are equal.
        assert energy_of(values, found) >= best * (1 - Fraction(1, 2**50))


@steady
@given(weights(), patterns)
def test_of_equal_units_the_earlier_is_kept(weight: Tensor, name: str) -> None:
    weight = weight.sign()
    mask = magnitude_mask(weight, PATTERNS[name])
    size, legal = LEGAL[name]
    for start, values in groups(weight, size):
        order = sorted(legal, key=sorted)
        assert kept(mask, start, size) == max(order, key=lambda p: energy_of(values, p))


@steady
@given(weights(), patterns)
def test_a_masked_weight_is_legal_and_masking_it_again_changes_nothing(
    weight: Tensor, name: str
) -> None:
    mask = magnitude_mask(weight, PATTERNS[name])
    assert violations(weight * mask, PATTERNS[name]) == 0
    assert violations(mask, PATTERNS[name]) == 0
    assert torch.equal(magnitude_mask(weight * mask, PATTERNS[name]), mask)


@steady
@given(weights(), patterns, st.integers(-8, 8), st.booleans())
def test_a_mask_depends_neither_on_sign_nor_on_scale(
    weight: Tensor, name: str, exponent: int, flip: bool
) -> None:
    # A power of two, in a type with room to spare, so that scaling rounds nothing.
    weight = weight.half().nan_to_num(posinf=1e4, neginf=-1e4).double()
    other = weight * 2.0 ** (100 * exponent) * (-1 if flip else 1)
    mask = magnitude_mask(weight, PATTERNS[name])
    assert torch.equal(magnitude_mask(other, PATTERNS[name]), mask)


@steady
@given(weights(kernel=True), patterns)
def test_a_convolution_is_masked_along_its_input_channels(weight: Tensor, name: str) -> None:
    mask = magnitude_mask(weight, PATTERNS[name])
    for row, column in product(range(weight.shape[2]), range(weight.shape[3])):
        slice_ = magnitude_mask(weight[:, :, row, column], PATTERNS[name])
        assert torch.equal(mask[:, :, row, column], slice_)


@pytest.mark.parametrize("dtype", FLOATS)
def test_pairs_are_judged_by_the_sum_of_their_squares(dtype: torch.dtype) -> None:
    # 9 + 9 against 16 + 1: the pair with the largest weight goes.
    weight = torch.tensor([[4.0, 1.0, -3.0, 3.0, 0.0, 0.0, 2.0, 2.0]], dtype=dtype)
    found = {name: magnitude_mask(weight, PATTERNS[name]).int().tolist()[0] for name in PATTERNS}
    assert found == {
        "2:4": [1, 0, 1, 0, 0, 0, 1, 1],
        "pair4:8": [1, 1, 1, 1, 0, 0, 0, 0],
        "portable": [0, 0, 1, 1, 0, 0, 1, 1],
    }


@pytest.mark.parametrize(
    ("name", "share"), [("2:4", 0.868), ("pair4:8", 0.792), ("portable", 0.75)]
)
def test_gaussian_weights_keep_the_share_of_their_energy_that_theory_gives(
    name: str, share: float
) -> None:
    weight = noise(512, 1024).double()
    masked = weight * magnitude_mask(weight, PATTERNS[name])
    assert float(masked.square().sum() / weight.square().sum()) == pytest.approx(share, abs=2e-3)


@pytest.mark.parametrize(("keep", "group", "unit"), [(1, 4, 1), (4, 8, 1), (1, 2, 1), (3, 16, 4)])
def test_other_patterns_keep_as_many_as_they_say(keep: int, group: int, unit: int) -> None:
    pattern = Pattern(keep, group, unit)
    mask = magnitude_mask(noise(3, 16), pattern)
    units = mask.reshape(3, -1, pattern.units, unit)
    assert torch.equal(units.all(dim=-1), units.any(dim=-1))
    assert units.any(dim=-1).sum(dim=-1).unique().tolist() == [keep]
    assert float(mask.double().mean()) == pattern.density


@every_pattern
def test_a_reduction_axis_that_is_no_multiple_of_the_group_is_refused(name: str) -> None:
    group = PATTERNS[name].group
    ragged = torch.ones(4, group + 2)
    text = f"reduction axis {group + 2} is not a multiple of {group}"
    with pytest.raises(ValueError, match=text):
        magnitude_mask(ragged, PATTERNS[name])
    with pytest.raises(ValueError, match=text):
        wanda_mask(ragged, torch.ones(group + 2), PATTERNS[name])
    with pytest.raises(ValueError, match=text):
        violations(ragged, PATTERNS[name])


# --- legality ------------------------------------------------------------------------------------


@steady
@given(weights(), patterns)
def test_violations_are_the_groups_whose_nonzeros_no_legal_mask_covers(
    weight: Tensor, name: str
) -> None:
    integers = weight.sign().to(torch.int8)
    size, legal = LEGAL[name]
    wrong = 0
    for _, values in groups(integers, size):
        nonzero = {i for i, value in enumerate(values) if value}
        wrong += not any(nonzero <= places for places in legal)
    assert violations(integers, PATTERNS[name]) == wrong
    assert violations(integers.float(), PATTERNS[name]) == wrong


@every_pattern
def test_the_masks_of_a_group_are_all_the_fullest_legal_ones(name: str) -> None:
    size, legal = LEGAL[name]
    found = [frozenset(mask.nonzero().flatten().tolist()) for mask in group_masks(PATTERNS[name])]
    assert set(found) == legal
    assert len(found) == len(legal)
    assert PATTERNS[name].group == size
    assert PATTERNS[name].density == 0.5


@pytest.mark.parametrize(("name", "other"), list(product(LEGAL, LEGAL)))
def test_a_pattern_allows_another_when_every_mask_of_it_is_legal(name: str, other: str) -> None:
    """Brute force over every mask of eight columns."""
    (mine, legal), (theirs, masks) = LEGAL[name], LEGAL[other]
    fits = True
    for parts in product(masks, repeat=8 // theirs):
        nonzero = {theirs * index + i for index, part in enumerate(parts) for i in part}
        for start in range(0, 8, mine):
            group = {i - start for i in nonzero if start <= i < start + mine}
            fits = fits and any(group <= places for places in legal)
    assert PATTERNS[name].allows(PATTERNS[other]) == fits
    assert fits == (name == other or other == "portable")


def test_patterns_whose_groups_do_not_nest_are_compared_over_a_common_multiple() -> None:
    assert Pattern(4, 6).allows(Pattern(1, 2))
    assert not Pattern(2, 6).allows(Pattern(1, 2))
    # Six columns reach into two groups of four, and three columns at some places too.
    assert Pattern(2, 6).allows(Pattern(1, 4))
    assert not Pattern(1, 6).allows(Pattern(1, 4))
    assert Pattern(2, 3).allows(Pattern(1, 4))
    assert not Pattern(1, 3).allows(Pattern(1, 4))


# --- wanda ---------------------------------------------------------------------------------------


@steady
@given(weights(kernel=False), patterns, st.integers(0, 2**32))
def test_wanda_is_a_legal_mask_and_keeps_the_largest_products_of_magnitude_and_input_norm(
    weight: Tensor, name: str, seed: int
) -> None:
    squares = mean_squares(weight.shape[1], seed)
    mask = wanda_mask(weight, squares, PATTERNS[name])
    size, legal = LEGAL[name]
    for start, values in groups(weight, size):
        scores = [
            Fraction(v) ** 2 * Fraction(float(squares[start[1] + i])) for i, v in enumerate(values)
        ]
        found = kept(mask, start, size)
        assert found in legal
        best = max(sum((scores[i] for i in places), Fraction(0)) for places in legal)
        assert sum((scores[i] for i in found), Fraction(0)) >= best * (1 - Fraction(1, 2**45))
    assert torch.equal(wanda_mask(weight * mask, squares, PATTERNS[name]), mask)


@steady
@given(weights(kernel=False), patterns, st.integers(0, 2**32), st.booleans())
def test_wanda_depends_neither_on_sign_nor_on_the_scale_of_the_inputs(
    weight: Tensor, name: str, seed: int, flip: bool
) -> None:
    squares = mean_squares(weight.shape[1], seed)
    mask = wanda_mask(weight, squares, PATTERNS[name])
    other = wanda_mask(-weight if flip else weight, squares * 4.0**9, PATTERNS[name])
    assert torch.equal(other, mask)


@steady
@given(weights(kernel=False), patterns)
def test_wanda_of_equal_inputs_is_the_magnitude_mask(weight: Tensor, name: str) -> None:
    mask = wanda_mask(weight, torch.full(weight.shape[1:], 0.25), PATTERNS[name])
    assert torch.equal(mask, magnitude_mask(weight, PATTERNS[name]))


def test_wanda_prefers_live_inputs_and_tells_dead_ones_apart_by_magnitude() -> None:
    weight = torch.tensor([[1.0, 50.0, 60.0, 2.0, 1.0, 3.0, 2.0, 4.0]])
    live = torch.tensor([1.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 0.0])
    expected = [[True, False, False, True, False, True, False, True]]
    assert wanda_mask(weight, live, TWO_OF_FOUR).tolist() == expected
    live = torch.tensor([0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 0.0, 0.0])
    expected = [[False, False, True, True, False, False, True, True]]
    assert wanda_mask(weight, live, PATTERNS["portable"]).tolist() == expected
    assert wanda_mask(weight, live, PATTERNS["pair4:8"]).tolist() == [
        [True, True, True, True, False, False, False, False]
    ]
    for pattern in PATTERNS.values():
        mask = wanda_mask(weight, torch.zeros(8), pattern)
        assert torch.equal(mask, magnitude_mask(weight, pattern))


# --- the module ----------------------------------------------------------------------------------


@every_pattern
def test_a_masked_entry_has_value_and_gradient_zero(name: str) -> None:
    weight = nn.Parameter(noise(4, 8))
    mask = magnitude_mask(weight.detach(), PATTERNS[name])
    module = Mask(mask)
    result = module(weight)
    (3.0 * result).sum().backward()
    assert weight.grad is not None
    assert torch.equal(result, torch.where(mask, weight, torch.zeros(())))
    assert not weight.grad[~mask].any()
    assert weight.grad[mask].all()
    assert list(module.parameters()) == []
