"""A difference is told in the reference's own units, and never hides a NaN."""

from __future__ import annotations

import math

import pytest
import torch

from gpusq_compile.numerics import (
    cosine_per_sample,
    is_rounding,
    largest_difference,
    per_sample,
    spread,
)

INF, NAN = float("inf"), float("nan")


def test_a_difference_is_in_standard_deviations_of_the_reference() -> None:
    reference = torch.tensor([0.0, 2.0, 0.0, 2.0])
    assert largest_difference(reference + 0.5, reference) == pytest.approx(0.5)
    assert largest_difference(100 * reference + 50, 100 * reference) == pytest.approx(0.5)


def test_an_infinity_or_nan_on_one_side_is_as_far_as_can_be() -> None:
    reference = torch.tensor([1.0, 2.0, 3.0])
    assert largest_difference(torch.tensor([1.0, 2.0, INF]), reference) == INF
    assert largest_difference(reference, torch.tensor([1.0, 2.0, -INF])) == INF
    assert largest_difference(torch.tensor([1.0, NAN, 3.0]), reference) == INF
    assert largest_difference(torch.full((3,), NAN), reference) == INF


def test_the_rounding_of_a_constant_is_no_difference() -> None:
    assert largest_difference(torch.full((4,), 1.0 + 1e-6), torch.ones(4)) < 1e-5
    assert largest_difference(torch.tensor(2.0 + 1e-6), torch.tensor(2.0)) < 1e-5
    assert largest_difference(torch.ones(4), torch.zeros(4)) > 1e6
    assert spread(torch.zeros(4)) > 0


def test_each_sample_has_a_cosine_of_its_own() -> None:
    reference = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 0.0], [3.0, 4.0], [1.0, 1.0]])
    found = torch.tensor([[0.0, 1.0], [-2.0, 0.0], [0.0, 0.0], [3.0, 4.0], [NAN, 1.0]])
    assert cosine_per_sample(found, reference).tolist() == pytest.approx([0, -1, 1, 1, -1])


@pytest.mark.parametrize(
    ("shape", "rows"), [((3, 5), (3, 5)), ((3, 2, 4), (3, 8)), ((3,), (3, 1)), ((), (1, 1))]
)
def test_outputs_of_any_shape_are_rows_of_values(
    shape: tuple[int, ...], rows: tuple[int, int]
) -> None:
    found = per_sample(torch.ones(shape, dtype=torch.float16))
    assert found.shape == rows
    assert found.dtype == torch.float32
    assert not math.isnan(float(found.sum()))


def test_what_rounding_explains_is_told_from_a_difference() -> None:
    """Four boxes in the middle of an image, which an untrained detector tells apart by 1e-6."""
    boxes = 0.5 + torch.tensor([0.0, 1e-6, 2e-6, 3e-6])
    assert is_rounding(boxes + 6e-8, boxes)
    assert not is_rounding(boxes + 1e-5, boxes)
    assert not is_rounding(boxes * torch.nan, boxes)
    assert largest_difference(boxes + 1e-5, boxes) > 1


def test_nothing_differs_from_nothing() -> None:
    nothing = torch.zeros(2, 0)
    assert largest_difference(nothing, nothing) == 0.0
    assert is_rounding(nothing, nothing)
    assert cosine_per_sample(nothing, nothing).tolist() == [1.0, 1.0]
    assert spread(nothing) == 1.0
