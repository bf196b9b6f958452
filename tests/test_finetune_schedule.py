"""How long a phase trains and how its learning rate goes, against torch's own schedulers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.optim import lr_scheduler

from gpusq_compile.compilation import Compilation
from gpusq_compile.errors import InputError
from gpusq_compile.finetune.schedule import Budget, learning_rate_factor, plan_budget
from gpusq_compile.language.training import Phase
from tests.compilations import begin, make_rules
from tests.models import Shape, TinyViT, images, labelled, seeded

DATA = labelled(3)
BATCH = len(DATA[0][1])


def tiny(**options: Any) -> Compilation:
    model = seeded(TinyViT, Shape(depth=1))
    return begin(model, images(2), make_rules(), finetune=True, train_data=DATA, **options)


def factors(phase: Phase, budget: Budget) -> list[float]:
    return [learning_rate_factor(phase, step, budget) for step in range(budget.steps)]


def torchs(scheduler: Any, steps: int) -> list[float]:
    """The learning rates that a torch scheduler gives, one step after the other, from 1."""
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    schedule = scheduler(optimizer)
    found = []
    for _ in range(steps):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    return found


@pytest.mark.parametrize(
    ("phase", "options", "steps"),
    [
        (Phase(epochs=2), {}, 6),
        (Phase(epochs=0.5), {}, 2),
        (Phase(epochs=0.01), {}, 1),
        (Phase(epochs=9, max_steps=4), {}, 4),
        (Phase(epochs=2), {"epochs": 3.0}, 9),
        (Phase(epochs=2, max_steps=4), {"steps": 11}, 11),
        (Phase(epochs=2, batch_size=2 * BATCH), {}, 3),
    ],
)
def test_the_budget_is_the_options_before_the_rules(
    phase: Phase, options: dict[str, Any], steps: int
) -> None:
    assert plan_budget(tiny(**options), phase, lambda: DATA).steps == steps


def test_a_batch_size_is_made_up_of_whole_batches() -> None:
    assert plan_budget(tiny(), Phase(), lambda: DATA).accumulate == 1
    budget = plan_budget(tiny(), Phase(batch_size=3 * BATCH), lambda: DATA)
    assert (budget.accumulate, budget.epoch_steps) == (3, 1.0)
    for size in (BATCH + 1, BATCH - 1):
        with pytest.raises(InputError) as caught:
            plan_budget(tiny(), Phase(batch_size=size), lambda: DATA)
        assert caught.value.code == "batch-size"
        assert f"{size} images" in caught.value.message
        assert f"batches of {BATCH}" in caught.value.message


def test_the_learning_rate_warms_up_and_falls_along_a_cosine() -> None:
    found = factors(Phase(warmup_steps=3, schedule="cosine"), Budget(11, 1, 11))
    assert found[:4] == [0.25, 0.5, 0.75, 1.0]
    assert found[7] == pytest.approx(0.5)
    assert found[3:] == sorted(found[3:], reverse=True)
    assert found[-1] > 0
    constant = Phase(warmup_steps=1, schedule="constant")
    assert factors(constant, Budget(4, 1, 4)) == [0.5, 1, 1, 1]


@given(st.integers(1, 30))
def test_a_cosine_is_torchs(steps: int) -> None:
    expected = torchs(lambda o: lr_scheduler.CosineAnnealingLR(o, T_max=steps), steps)
    found = factors(Phase(schedule="cosine"), Budget(steps, 1, 5))
    assert found == pytest.approx(expected, abs=1e-6)


@given(st.integers(1, 30), st.sampled_from([0.5, 1.0, 2.0]))
def test_a_polynomial_is_torchs(steps: int, power: float) -> None:
    expected = torchs(lambda o: lr_scheduler.PolynomialLR(o, steps, power), steps)
    found = factors(Phase(schedule="polynomial", power=power), Budget(steps, 1, 5))
    assert found == pytest.approx(expected, abs=1e-6)


@given(st.integers(1, 7), st.lists(st.integers(1, 9), min_size=1, unique=True))
def test_milestones_are_torchs_counted_in_epochs(epoch_steps: int, epochs: list[int]) -> None:
    epochs = sorted(epochs)
    steps = 10 * epoch_steps
    at = [epoch * epoch_steps for epoch in epochs]
    expected = torchs(lambda o: lr_scheduler.MultiStepLR(o, at, 0.1), steps)
    phase = Phase(schedule="multistep", milestones=tuple(map(float, epochs)))
    assert factors(phase, Budget(steps, 1, epoch_steps)) == pytest.approx(expected)


@given(st.integers(1, 7), st.integers(1, 5))
def test_steps_are_torchs_counted_in_epochs(epoch_steps: int, size: int) -> None:
    steps = 10 * epoch_steps
    expected = torchs(lambda o: lr_scheduler.StepLR(o, size * epoch_steps, 0.5), steps)
    phase = Phase(schedule="step", step_size=float(size), decay=0.5)
    assert factors(phase, Budget(steps, 1, epoch_steps)) == pytest.approx(expected)


def test_epochs_are_optimizer_steps_over_accumulated_batches() -> None:
    phase = Phase(schedule="step", step_size=1.0, decay=0.5)
    assert factors(phase, Budget(4, 2, 4)) == [1.0, 1.0, 0.5, 0.5]
