"""The losses of Algorithm 1, against computations written out by hand."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from gpusq_compile.finetune.losses import (
    combine,
    hard_label_loss,
    prune_loss_shares,
    soft_logits_loss,
    tap_losses,
)
from gpusq_compile.language.training import Loss

steady = settings(deadline=None)  # A busy machine is no failure.

errors = st.floats(0, 1e6)
thetas = st.floats(1e-3, 1e3)


@st.composite
def logits(draw: st.DrawFn) -> tuple[list[list[float]], list[list[float]]]:
    """Student's and teacher's logits [batch, classes] as lists."""
    rows, classes = draw(st.integers(1, 4)), draw(st.integers(2, 5))
    row = st.lists(st.floats(-8, 8, width=32), min_size=classes, max_size=classes)
    both = [draw(st.lists(row, min_size=rows, max_size=rows)) for _ in range(2)]
    return both[0], both[1]


def probabilities(row: list[float], temperature: float = 1.0) -> list[float]:
    weights = [math.exp(value / temperature) for value in row]
    return [weight / sum(weights) for weight in weights]


def mean(values: list[float]) -> float:
    return sum(values) / len(values)


def close(found: Tensor, expected: float) -> bool:
    return found.item() == pytest.approx(expected, rel=1e-4, abs=1e-4)


@steady
@given(logits(), st.data())
def test_hard_labels_are_the_cross_entropy_with_the_ground_truth(
    both: tuple[list[list[float]], list[list[float]]], data: st.DataObject
) -> None:
    student, teacher = both
    classes = st.integers(0, len(student[0]) - 1)
    labels = data.draw(st.lists(classes, min_size=len(student), max_size=len(student)))
    found = hard_label_loss(
        torch.tensor(student), torch.tensor(teacher), torch.tensor(labels), "hard"
    )
    each = [-math.log(probabilities(row)[k]) for row, k in zip(student, labels, strict=True)]
    assert close(found, mean(each))


@steady
@given(logits())
def test_without_labels_the_teachers_argmax_stands_in(
    both: tuple[list[list[float]], list[list[float]]],
) -> None:
    student, teacher = both
    found = hard_label_loss(torch.tensor(student), torch.tensor(teacher), None, "hard")
    each = [
        -math.log(probabilities(ours)[theirs.index(max(theirs))])
        for ours, theirs in zip(student, teacher, strict=True)
    ]
    assert close(found, mean(each))


@steady
@given(logits())
def test_soft_stand_ins_are_the_teachers_probabilities(
    both: tuple[list[list[float]], list[list[float]]],
) -> None:
    student, teacher = both
    found = hard_label_loss(torch.tensor(student), torch.tensor(teacher), None, "soft")
    each = [
        -sum(p * math.log(q) for p, q in zip(probabilities(t), probabilities(s), strict=True))
        for s, t in zip(student, teacher, strict=True)
    ]
    assert close(found, mean(each))


@steady
@given(logits(), st.sampled_from([0.5, 1.0, 4.0]))
def test_soft_logits_are_the_divergence_from_the_teacher_times_the_squared_temperature(
    both: tuple[list[list[float]], list[list[float]]], temperature: float
) -> None:
    student, teacher = both
    found = soft_logits_loss(torch.tensor(student), torch.tensor(teacher), temperature)
    each = [
        sum(
            p * math.log(p / q)
            for p, q in zip(
                probabilities(theirs, temperature), probabilities(ours, temperature), strict=True
            )
        )
        for ours, theirs in zip(student, teacher, strict=True)
    ]
    assert close(found, mean(each) * temperature**2)


def test_the_divergence_is_taken_from_the_teacher_not_towards_it() -> None:
    student, teacher = torch.tensor([[0.0, 0.0]]), torch.tensor([[5.0, 0.0]])
    forward, backward = (
        soft_logits_loss(a, b, 1.0).item() for a, b in ((student, teacher), (teacher, student))
    )
    assert forward == pytest.approx(0.6529, abs=1e-3)
    assert backward != pytest.approx(forward, rel=0.1)


def test_a_taps_loss_is_its_mean_squared_error() -> None:
    ours = [torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.zeros(2, 3, 4)]
    theirs = [torch.tensor([[1.0, 0.0], [0.0, 4.0]]), torch.full((2, 3, 4), 2.0)]
    assert [loss.item() for loss in tap_losses(ours, theirs, "none")] == [(4 + 9) / 4, 4.0]


def test_normalized_by_the_teachers_variance_large_layers_do_not_drown_small_ones() -> None:
    teacher = torch.tensor([-1.0, 1.0, -1.0, 1.0])
    student = teacher + 0.5
    small, large = tap_losses(
        [student, 1000 * student], [teacher, 1000 * teacher], "teacher_variance"
    )
    assert small.item() == pytest.approx(0.25 / (4 / 3))
    assert large.item() == pytest.approx(small.item())
    [constant] = tap_losses([torch.ones(4)], [torch.ones(4)], "teacher_variance")
    assert constant.item() == 0.0


def test_the_parts_are_combined_with_their_weights() -> None:
    parts = combine(
        Loss(alpha=2.0, beta=3.0, gamma=5.0),
        torch.tensor(7.0),
        torch.tensor(11.0),
        [torch.tensor(1.0), torch.tensor(4.0)],
        [5.0, 2.0],
    )
    assert parts.values().tolist() == [112.0, 7.0, 11.0, 13.0, 1.0, 4.0]


def test_without_logits_there_is_no_soft_part() -> None:
    parts = combine(Loss(alpha=2.0, beta=3.0), torch.tensor(7.0), None, [], [])
    assert parts.values().tolist() == [14.0, 7.0, 0.0, 0.0]


def test_the_default_weights_are_the_papers() -> None:
    assert (Loss().alpha, Loss().beta, Loss().gamma, Loss().temperature) == (1.0, 10.0, 5.0, 1.0)


@steady
@given(st.lists(st.tuples(errors, thetas), min_size=1, max_size=8))
def test_tap_weights_are_shares_of_the_prune_loss_and_sum_to_one(
    taps: list[tuple[float, float]],
) -> None:
    shares = prune_loss_shares([error for error, _ in taps], [theta for _, theta in taps])
    assert sum(shares) == pytest.approx(1.0)
    assert all(share >= 0 for share in shares)
    total = sum(error * theta for error, theta in taps)
    if total > 0:
        for share, (error, theta) in zip(shares, taps, strict=True):
            assert share * total == pytest.approx(error * theta)


@pytest.mark.parametrize("count", [1, 2, 5])
def test_models_that_agree_everywhere_give_every_tap_the_same_weight(count: int) -> None:
    assert prune_loss_shares([0.0] * count, [2.0] * count) == [1.0 / count] * count


def test_without_taps_there_are_no_weights() -> None:
    assert prune_loss_shares([], []) == []
