"""One fine-tune phase: train the student graph towards a frozen teacher."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.fx

from gpusq_compile.compilation import Compilation
from gpusq_compile.data import (
    Batch,
    batches,
    check_labels,
    logits_of,
    require_train_data,
)
from gpusq_compile.errors import CheckFailed, InputError
from gpusq_compile.finetune.losses import (
    LossParts,
    combine,
    hard_label_loss,
    prune_loss_shares,
    soft_logits_loss,
    tap_losses,
)
from gpusq_compile.finetune.taps import features_of, listen, taps_of
from gpusq_compile.language.training import Phase, QuantizePhase
from gpusq_compile.model_source import DataFactory
from gpusq_compile.plan import Treatment, planned
from gpusq_compile.quantization.fake_quantize import FakeQuantize

SMOOTHING = 0.95
"""Weight of the past in the smoothed loss that thresholds and plateaus are judged by."""
MIN_IMPROVEMENT = 1e-3
"""Relative improvement of the smoothed loss that counts against a plateau."""
PHASES = ("sparse", "quantize")
CURVE_POINTS = 200
"""Most points of the loss curve that the report keeps."""


@dataclass
class PhaseReport:
    """What the report says of one phase. `curve` holds loss parts by step (from 1)."""

    steps: int
    seconds: float
    images: int
    stopped_by: str
    curve: list[dict[str, float]]
    settings: dict[str, Any]

    def as_dict(self) -> dict[str, Any]:
        return {
            "steps": self.steps,
            "seconds": round(self.seconds, 3),
            "images": self.images,
            "stopped_by": self.stopped_by,
            "loss": thinned(self.curve),
            "settings": self.settings,
        }


def skipped(reason: str) -> dict[str, Any]:
    """The report of a phase that did not run, with the keys of one that did."""
    nothing = {"steps": 0, "seconds": 0.0, "images": 0, "loss": []}
    return {**nothing, "stopped_by": "skipped", "reason": reason}


def skip_reason(compilation: Compilation, name: str, kind: type[torch.nn.Module]) -> str | None:
    """Why the phase `name` has nothing to do, or None.

    `kind` is the module that the passes before insert for what the phase trains: masks or
    fake-quantizers.
    """
    if not compilation.options.finetune:
        return "switched off (--no-finetune)"
    if getattr(compilation.rules.finetune, name) == "none":
        return f"switched off by the rules (finetune.{name}: none)"
    if not any(isinstance(module, kind) for module in compilation.ir.modules()):
        return "no layer is sparse" if name == "sparse" else "no layer is quantized"
    return None


def train(
    compilation: Compilation,
    teacher: torch.fx.GraphModule,
    phase: Phase,
    *,
    name: str,
    tap_weights: list[float],
) -> PhaseReport:
    """Train the compilation's graph towards `teacher` until the first limit of `phase` is met.

    Args:
        teacher: frozen graph with the same taps as the student.
        name: what the progress and messages call the phase: `sparse` or `quantize`.
        tap_weights: weight of each tap's loss, in the order of the taps.

    Raises:
        InputError: no training data, or labels outside the model's classes.
        CheckFailed: the loss became NaN or infinite; the message names the step and the part.
    """
    student = compilation.ir
    factory = require_train_data(compilation.source, name)
    total_steps = planned_steps(compilation, phase, factory)
    unfreeze(student, compilation.frozen)
    optimizer = make_optimizer(student, phase)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: learning_rate_factor(phase, step, total_steps)
    )
    listen(student)
    listen(teacher)
    # The order of the data depends on the seed and the phase alone, not on what ran before.
    torch.manual_seed(compilation.options.seed + PHASES.index(name))
    curve: list[dict[str, float]] = []
    limits = Limits(phase)
    stopped_by = "budget"
    images = 0
    started = time.monotonic()
    with compilation.console.progress(f"fine-tune {name}", total_steps) as advance:
        for step, batch in enumerate(endless(compilation, factory, total_steps), start=1):
            parts = distillation_loss(compilation, student, teacher, batch, tap_weights, step)
            optimizer.zero_grad(set_to_none=True)
            parts.total.backward()  # type: ignore[no-untyped-call]
            if phase.clip_norm is not None:
                torch.nn.utils.clip_grad_norm_(trained_parameters(student), phase.clip_norm)
            optimizer.step()
            schedule.step()
            values = parts.as_floats()
            curve.append({"step": step, **values})
            images += batch.size
            advance(describe(values))
            met = limits.met(values["total"])
            if met is not None:
                stopped_by = met
                break
    listen(student, False)
    listen(teacher, False)
    student.requires_grad_(False)
    return PhaseReport(
        steps=len(curve),
        seconds=time.monotonic() - started,
        images=images,
        stopped_by=stopped_by,
        curve=curve,
        settings=phase.model_dump(mode="json"),
    )


def distillation_loss(
    compilation: Compilation,
    student: torch.fx.GraphModule,
    teacher: torch.fx.GraphModule,
    batch: Batch,
    tap_weights: list[float],
    step: int,
) -> LossParts:
    """The loss of one batch, with the teacher's forward pass under `no_grad`."""
    settings = compilation.rules.finetune
    find_logits = compilation.source.logits
    with torch.no_grad():
        teacher_logits = logits_of(compilation.network.run(teacher, batch.inputs), find_logits)
    student_logits = logits_of(compilation.network.run(student, batch.inputs), find_logits)
    if batch.labels is not None:
        check_labels(batch.labels, student_logits.shape[1], f"train_data() batch of step {step}")
    taps = taps_of(student)
    per_tap = tap_losses(features_of(taps), features_of(taps_of(teacher)), settings.normalize)
    feature = sum(
        (weight * error for weight, error in zip(tap_weights, per_tap, strict=True)),
        start=torch.zeros((), device=student_logits.device),
    )
    parts = combine(
        settings.loss,
        hard_label_loss(student_logits, teacher_logits, batch.labels, settings.labels),
        soft_logits_loss(student_logits, teacher_logits, settings.loss.temperature),
        feature,
    )
    if not bool(torch.isfinite(parts.total.detach())):
        bad = [tap.name for tap, e in zip(taps, per_tap, strict=True) if not e.isfinite()]
        where = f", first at tap {bad[0]}" if bad else ""
        raise CheckFailed(
            "loss-not-finite",
            f"the loss became {float(parts.total.detach())} at step {step}{where}",
            hint="a smaller lr or clip_norm in the rules' finetune section keeps it finite",
        )
    return parts


def tap_shares(
    compilation: Compilation, dense: torch.fx.GraphModule, sparse: torch.fx.GraphModule
) -> list[float]:
    """W_j over a calibration pass; both models are frozen by then, so once is enough."""
    thetas = [tap.theta for tap in taps_of(sparse)]
    sums = [0.0] * len(thetas)
    factory = require_train_data(compilation.source, "quantize")
    listen(dense)
    listen(sparse)
    with torch.no_grad():
        limit = compilation.rules.calibration.batches
        for batch in batches(factory, "train_data", compilation.device, limit):
            compilation.network.run(dense, batch.inputs)
            compilation.network.run(sparse, batch.inputs)
            errors = tap_losses(
                features_of(taps_of(sparse)),
                features_of(taps_of(dense)),
                compilation.rules.finetune.normalize,
            )
            sums = [total + float(error) for total, error in zip(sums, errors, strict=True)]
    listen(dense, False)
    listen(sparse, False)
    return prune_loss_shares(sums, thetas)


def planned_steps(compilation: Compilation, phase: Phase, factory: DataFactory) -> int:
    """Optimizer steps of the budget: --steps, else --epochs or the rules' epochs and max_steps."""
    options = compilation.options
    if options.steps is not None:
        return options.steps
    epochs = phase.epochs if options.epochs is None else options.epochs
    data = factory()
    try:
        length = len(data)  # type: ignore[arg-type]
    except TypeError:
        length = sum(1 for _ in batches(factory, "train_data", torch.device("cpu")))
    if length == 0:
        raise InputError("data-empty", "train_data() yielded no batch")
    steps = max(1, math.ceil(epochs * length))
    return steps if phase.max_steps is None else min(steps, phase.max_steps)


def endless(compilation: Compilation, factory: DataFactory, steps: int) -> Iterator[Batch]:
    """`steps` batches, starting the data anew whenever it ends."""
    done = 0
    while done < steps:
        for batch in batches(factory, "train_data", compilation.device, steps - done):
            yield batch
            done += 1


def unfreeze(student: torch.fx.GraphModule, frozen: frozenset[str]) -> None:
    """Train every parameter but those the user froze; a compressed weight trains in any case."""
    compressed = {plan.weight for _, plan in planned(student.graph) if plan.applied != Treatment()}
    for name, parameter in student.named_parameters():
        parameter.requires_grad_(name not in frozen or name in compressed)


def trained_parameters(student: torch.fx.GraphModule) -> list[torch.nn.Parameter]:
    return [parameter for parameter in student.parameters() if parameter.requires_grad]


def make_optimizer(student: torch.fx.GraphModule, phase: Phase) -> torch.optim.Optimizer:
    """Weights decay; biases, norms and other vectors do not; scales have their own rate."""
    scales = {
        id(module.log_scale) for module in student.modules() if isinstance(module, FakeQuantize)
    }
    weights = [p for p in trained_parameters(student) if id(p) not in scales]
    groups: list[dict[str, Any]] = [
        {"params": [p for p in weights if p.ndim >= 2], "weight_decay": phase.weight_decay},
        {"params": [p for p in weights if p.ndim < 2], "weight_decay": 0.0},
    ]
    if isinstance(phase, QuantizePhase):
        learned = [p for p in trained_parameters(student) if id(p) in scales]
        groups.append({"params": learned, "weight_decay": 0.0, "lr": phase.scale_lr})
    groups = [group for group in groups if group["params"]]
    if phase.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=phase.lr, momentum=phase.momentum)
    return torch.optim.AdamW(groups, lr=phase.lr)


def learning_rate_factor(phase: Phase, step: int, total: int) -> float:
    """The learning rate at `step` (from 0) of `total`, as a share of its highest value."""
    if step < phase.warmup_steps:
        return (step + 1) / (phase.warmup_steps + 1)
    if phase.schedule == "constant":
        return 1.0
    progress = (step - phase.warmup_steps) / max(1, total - phase.warmup_steps)
    return 0.5 * (1.0 + math.cos(math.pi * min(1.0, progress)))


class Limits:
    """Whether the smoothed loss met the threshold or stopped improving."""

    def __init__(self, phase: Phase) -> None:
        self.threshold = phase.threshold
        self.patience = phase.patience
        self.smoothed: float | None = None
        self.best = float("inf")
        self.waited = 0

    def met(self, loss: float) -> str | None:
        """`threshold`, `plateau`, or None when training goes on."""
        past = loss if self.smoothed is None else self.smoothed
        self.smoothed = SMOOTHING * past + (1.0 - SMOOTHING) * loss
        if self.threshold is not None and self.smoothed <= self.threshold:
            return "threshold"
        if self.smoothed < self.best * (1.0 - MIN_IMPROVEMENT):
            self.best = self.smoothed
            self.waited = 0
        else:
            self.waited += 1
        if self.patience is not None and self.waited >= self.patience:
            return "plateau"
        return None


def describe(values: dict[str, float]) -> str:
    return (
        f"loss {values['total']:.4f} = hard {values['hard']:.3f}, "
        f"soft {values['soft']:.4f}, feature {values['feature']:.4f}"
    )


def thinned(curve: list[dict[str, float]]) -> list[dict[str, float]]:
    """At most `CURVE_POINTS` points, the first and the last among them."""
    if len(curve) <= CURVE_POINTS:
        return curve
    last = len(curve) - 1
    picks = sorted({round(i * last / (CURVE_POINTS - 1)) for i in range(CURVE_POINTS)})
    return [curve[index] for index in picks]
