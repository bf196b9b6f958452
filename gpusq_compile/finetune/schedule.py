"""How long a phase trains, and its learning rate along the way."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from gpusq_compile.compilation import Compilation
from gpusq_compile.data import batches
from gpusq_compile.errors import InputError
from gpusq_compile.language.training import Phase
from gpusq_compile.model_source import DataFactory
from gpusq_compile.randomness import isolated_random

CPU = torch.device("cpu")


@dataclass(frozen=True)
class Budget:
    """`steps` optimizer steps of `accumulate` batches each; an epoch has `epoch_batches`."""

    steps: int
    accumulate: int
    epoch_batches: int

    @property
    def epoch_steps(self) -> float:
        """Optimizer steps per epoch; no whole number where batches are left over."""
        return self.epoch_batches / self.accumulate


def plan_budget(compilation: Compilation, phase: Phase, factory: DataFactory) -> Budget:
    """The budget of a phase: --steps, else --epochs or the rules' epochs, and max_steps.

    Raises:
        InputError: the data is empty, or its batches do not make up the rules' `batch_size`.
    """
    options = compilation.options
    length = epoch_length(factory)
    accumulate = accumulated_batches(compilation, phase, factory)
    if options.steps is not None:
        return Budget(options.steps, accumulate, length)
    epochs = phase.epochs if options.epochs is None else options.epochs
    steps = max(1, math.ceil(epochs * length / accumulate))
    if phase.max_steps is not None:
        steps = min(steps, phase.max_steps)
    return Budget(steps, accumulate, length)


def epoch_length(factory: DataFactory) -> int:
    """Batches of one pass over the training data; data without a length is read once."""
    data = factory()
    try:
        length = len(data)  # type: ignore[arg-type]
    except TypeError:
        with isolated_random(CPU):
            length = sum(1 for _ in batches(factory, "train_data", CPU))
    if length == 0:
        raise InputError("data-empty", "train_data() yielded no batch")
    return length


def accumulated_batches(compilation: Compilation, phase: Phase, factory: DataFactory) -> int:
    """How many batches of the training data make up the rules' `batch_size`; 1 without one."""
    if phase.batch_size is None:
        return 1
    with isolated_random(CPU):
        first = next(batches(factory, "train_data", CPU, limit=1))
    if phase.batch_size % first.size:
        raise InputError(
            "batch-size",
            f"the rules train on {phase.batch_size} images a step (batch_size), and train_data() "
            f"gives batches of {first.size}: no number of them makes that up",
            location=compilation.source.place("train_data"),
            hint="change the batches of train_data(), or the rules: `batch_size: none` takes each "
            "batch as a step",
        )
    return phase.batch_size // first.size


def learning_rate_factor(phase: Phase, step: int, budget: Budget) -> float:
    """The learning rate at `step` (from 0), as a share of its highest value.

    The schedules of the paper's Table 1, as torch.optim.lr_scheduler's CosineAnnealingLR,
    MultiStepLR, StepLR and PolynomialLR define them, counted in optimizer steps; epochs in the
    rules become steps. The warm-up comes before and takes no share of a cosine or polynomial.
    """
    if step < phase.warmup_steps:
        return (step + 1) / (phase.warmup_steps + 1)
    if phase.schedule in ("cosine", "polynomial"):
        progress = (step - phase.warmup_steps) / max(1, budget.steps - phase.warmup_steps)
        left = 1.0 - min(1.0, progress)
        if phase.schedule == "polynomial":
            return float(left**phase.power)
        return 0.5 * (1.0 - math.cos(math.pi * left))
    epoch: float = step / budget.epoch_steps
    if phase.schedule == "multistep":
        passed = sum(epoch >= milestone for milestone in phase.milestones or ())
        return float(phase.decay**passed)
    if phase.schedule == "step":
        assert phase.step_size is not None
        return float(phase.decay ** int(epoch / phase.step_size))
    return 1.0
