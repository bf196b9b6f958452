"""2:4 masks are legal, keep the most energy that a legal mask can, and stay frozen."""

from __future__ import annotations

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

steady = settings(deadline=None)  # A busy machine is no failure.
TWO_OF_FOUR = PATTERNS["2:4"]


@st.composite
def weights(draw: st.DrawFn, kernel: bool | None = None) -> Tensor:
    """A linear's [out, in] or a convolution's [out, in, kh, kw] weight.

    Half of them are small integers, so that groups hold ties and zeros.
    """
    is_kernel = draw(st.booleans()) if kernel is None else kernel
    shape = [draw(st.integers(1, 5)), 4 * draw(st.integers(1, 4))]
    shape += [draw(st.integers(1, 3)), draw(st.integers(1, 3))] if is_kernel else []
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    if draw(st.booleans()):
        return torch.randint(-2, 3, shape, generator=generator).float()
    return torch.randn(shape, generator=generator)


def groups(weight: Tensor) -> list[tuple[tuple[int, ...], list[float]]]:
    """Each aligned group of four along axis 1: where it starts, and its values. No tensor tricks:
    this is what the mask is judged by."""
    found = []
    out, reduction, *kernel = weight.shape
    for o, g, *at in product(range(out), range(0, reduction, 4), *(range(k) for k in kernel)):
        values = [float(weight[(o, g + i, *at)]) for i in range(4)]
        found.append(((o, g, *at), values))
    return found


def kept(mask: Tensor, start: tuple[int, ...]) -> tuple[int, ...]:
    o, g, *at = start
    return tuple(i for i in range(4) if bool(mask[(o, g + i, *at)]))


@steady
@given(weights())
def test_a_mask_keeps_the_most_energy_of_every_aligned_group_and_of_equals_the_earlier(
    weight: Tensor,
) -> None:
    mask = magnitude_mask(weight, TWO_OF_FOUR)
    for start, values in groups(weight):
        best = max(combinations(range(4), 2), key=lambda pair: sum(values[i] ** 2 for i in pair))
        # `max` takes the first of equals, and combinations come in lexicographic order.
        assert kept(mask, start) == best


@steady
@given(weights())
def test_a_masked_weight_is_legal_and_masking_it_again_changes_nothing(weight: Tensor) -> None:
    mask = magnitude_mask(weight, TWO_OF_FOUR)
    assert mask.dtype == torch.bool
    assert mask.shape == weight.shape
    assert violations(weight * mask, TWO_OF_FOUR) == 0
    assert torch.equal(magnitude_mask(weight * mask, TWO_OF_FOUR), mask)


@steady
@given(weights(), st.floats(0.01, 100.0), st.booleans())
def test_a_mask_depends_neither_on_sign_nor_on_scale(
    weight: Tensor, factor: float, flip: bool
) -> None:
    other = weight * (-factor if flip else factor)
    assert torch.equal(magnitude_mask(other, TWO_OF_FOUR), magnitude_mask(weight, TWO_OF_FOUR))


@steady
@given(weights())
def test_violations_are_the_groups_with_more_than_two_nonzeros(weight: Tensor) -> None:
    wrong = sum(sum(value != 0 for value in values) > 2 for _, values in groups(weight))
    assert violations(weight, TWO_OF_FOUR) == wrong
    assert violations(weight.mul(10).to(torch.int8), TWO_OF_FOUR) == violations(
        weight.mul(10).to(torch.int8).float(), TWO_OF_FOUR
    )


@steady
@given(weights(kernel=True))
def test_a_convolution_is_masked_along_its_input_channels(weight: Tensor) -> None:
    mask = magnitude_mask(weight, TWO_OF_FOUR)
    for row, column in product(range(weight.shape[2]), range(weight.shape[3])):
        slice_ = magnitude_mask(weight[:, :, row, column], TWO_OF_FOUR)
        assert torch.equal(mask[:, :, row, column], slice_)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_every_float_type_is_masked(dtype: torch.dtype) -> None:
    weight = torch.tensor([[1.0, -4.0, 2.0, 3.0]], dtype=dtype)
    assert magnitude_mask(weight, TWO_OF_FOUR).tolist() == [[False, True, False, True]]


@pytest.mark.parametrize(("keep", "group"), [(1, 4), (4, 8), (1, 2)])
def test_other_patterns_keep_as_many_as_they_say(keep: int, group: int) -> None:
    weight = torch.randn(3, 16, generator=torch.Generator().manual_seed(0))
    mask = magnitude_mask(weight, Pattern(keep, group))
    assert mask.reshape(3, -1, group).sum(dim=-1).unique().tolist() == [keep]


def test_a_reduction_axis_that_is_no_multiple_of_the_group_is_refused() -> None:
    with pytest.raises(ValueError, match="reduction axis 6 is not a multiple of 4"):
        magnitude_mask(torch.ones(4, 6), TWO_OF_FOUR)
    with pytest.raises(ValueError, match="reduction axis 6 is not a multiple of 4"):
        violations(torch.ones(4, 6), TWO_OF_FOUR)


@steady
@given(weights(kernel=False), st.integers(0, 2**32))
def test_wanda_keeps_the_largest_products_of_magnitude_and_input_norm(
    weight: Tensor, seed: int
) -> None:
    squares = torch.rand(weight.shape[1], generator=torch.Generator().manual_seed(seed)) + 0.01
    mask = wanda_mask(weight, squares, TWO_OF_FOUR)
    for start, values in groups(weight):
        scores = [abs(v) * float(squares[start[1] + i]) ** 0.5 for i, v in enumerate(values)]
        total = sum(scores[i] for i in kept(mask, start))
        assert total == pytest.approx(max(scores[i] + scores[j] for i, j in PAIRS))


PAIRS = list(combinations(range(4), 2))


def test_wanda_prefers_live_inputs_and_tells_dead_ones_apart_by_magnitude() -> None:
    weight = torch.tensor([[1.0, 50.0, 60.0, 2.0, 1.0, 3.0, 2.0, 4.0]])
    live = torch.tensor([1.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 0.0])
    expected = [[True, False, False, True, False, True, False, True]]
    assert wanda_mask(weight, live, TWO_OF_FOUR).tolist() == expected
    nothing = torch.zeros(8)
    assert torch.equal(
        wanda_mask(weight, nothing, TWO_OF_FOUR), magnitude_mask(weight, TWO_OF_FOUR)
    )


@pytest.mark.parametrize(("keep", "group"), [(2, 4), (1, 4), (4, 8), (3, 3)])
def test_the_masks_of_a_group_are_all_the_fullest_legal_ones(keep: int, group: int) -> None:
    masks = group_masks(Pattern(keep, group))
    found = {tuple(mask.nonzero().flatten().tolist()) for mask in masks}
    assert found == set(combinations(range(group), keep))
    assert len(masks) == len(found)


def test_a_masked_entry_has_value_and_gradient_zero() -> None:
    weight = nn.Parameter(torch.randn(4, 8, generator=torch.Generator().manual_seed(0)))
    mask = magnitude_mask(weight.detach(), TWO_OF_FOUR)
    module = Mask(mask)
    result = module(weight)
    (3.0 * result).sum().backward()
    assert weight.grad is not None
    assert torch.equal(result, torch.where(mask, weight, torch.zeros(())))
    assert not weight.grad[~mask].any()
    assert weight.grad[mask].all()
    assert list(module.parameters()) == []
