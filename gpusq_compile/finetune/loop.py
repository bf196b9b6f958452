"""One fine-tune phase: train the student graph towards a frozen teacher."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.fx

from gpusq_compile.accuracy import criterion, evaluate
from gpusq_compile.compilation import Compilation
from gpusq_compile.data import batches, require_train_data
from gpusq_compile.errors import CheckFailed, InputError
from gpusq_compile.finetune import checkpoint
from gpusq_compile.finetune.decisions import following
from gpusq_compile.finetune.distill import distillation_loss, run_to_taps
from gpusq_compile.finetune.feed import Feed, Position
from gpusq_compile.finetune.limits import Limits
from gpusq_compile.finetune.losses import prune_loss_shares, tap_losses
from gpusq_compile.finetune.optimizer import make_optimizer, trained_parameters, unfreeze
from gpusq_compile.finetune.schedule import learning_rate_factor, plan_budget
from gpusq_compile.finetune.taps import features_of, listen, taps_of
from gpusq_compile.language.training import Phase
from gpusq_compile.randomness import derived_seed, seed_everything
from gpusq_compile.remarks import Remark, analysis, missed

CURVE_POINTS = 200
"""Most points of the loss curve that the report keeps."""
LOSS_NOT_FINITE = "loss-not-finite"
PARTS = ("total", "hard", "soft", "feature")
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass
class Best:
    """The best evaluation so far, and the weights that it was measured with."""

    score: float
    step: int
    weights: dict[str, torch.Tensor]


@dataclass
class PhaseReport:
    """What the report says of one phase. `curve` holds loss parts by step (from 1)."""

    steps: int = 0
    seconds: float = 0.0
    images: int = 0
    stopped_by: str = "budget"
    curve: list[dict[str, float]] = field(default_factory=list)
    evaluations: list[dict[str, float]] = field(default_factory=list)
    kept_step: int | None = None
    resumed_at: int | None = None
    settings: dict[str, Any] = field(default_factory=dict)
    remarks: list[Remark] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        return {
            "steps": self.steps,
            "seconds": round(self.seconds, 3),
            "images": self.images,
            "stopped_by": self.stopped_by,
            "loss": thinned(self.curve),
            "evaluations": self.evaluations,
            "kept_step": self.kept_step,
            "resumed_at": self.resumed_at,
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
        name: what progress, messages and checkpoints call the phase: `sparse` or `quantize`.
        tap_weights: weight of each tap's loss, in the order of the taps.

    Raises:
        InputError: no training data, labels outside the model's classes, or a checkpoint that
            cannot be resumed from.
        CheckFailed: the loss became NaN or infinite; the message names the step and the tap.
    """
    run = _Run(compilation, teacher, phase, name, tap_weights)
    with listening(run.student, teacher):
        run.train()
    run.student.requires_grad_(False)
    return run.report


class _Run:
    """A phase under way: everything that a checkpoint has to hold."""

    def __init__(
        self,
        compilation: Compilation,
        teacher: torch.fx.GraphModule,
        phase: Phase,
        name: str,
        tap_weights: list[float],
    ) -> None:
        self.compilation = compilation
        self.teacher = teacher
        self.phase = phase
        self.name = name
        self.tap_weights = tap_weights
        self.student = compilation.ir
        self.device = compilation.device
        self.factory = require_train_data(compilation.source, name)
        self.budget = plan_budget(compilation, phase, self.factory)
        # What stands around the scope does not train, and needs no gradients of its own.
        compilation.network.root.requires_grad_(False)
        unfreeze(self.student, compilation.frozen)
        self.parameters = trained_parameters(self.student)
        self.optimizer = make_optimizer(self.student, phase)
        self.rates = [group["lr"] for group in self.optimizer.param_groups]
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=phase.autocast == "float16")
        # A process whose share of the first batch is empty would never start it.
        self.scaler.scale(torch.zeros((), device=self.device))
        self.limits = Limits(phase)
        self.best: Best | None = None
        self.report = PhaseReport(settings=phase.model_dump(mode="json"))
        self.over = False  # No step is left to do.
        self.concluded = False  # And the weights that the phase ends with are in place.
        self.said_no_logits = False
        self.evaluates = self._evaluates()
        self.feed = self._feed(self._restore())
        self._check_together()

    def train(self) -> None:
        started = time.monotonic() - self.report.seconds
        report, steps = self.report, self.budget.steps
        label = f"fine-tune {self.name}"
        with self.compilation.console.progress(label, steps) as advance:
            if report.steps:
                advance(f"resumed at step {report.steps}", report.steps)
            while report.steps < steps and not self.over:
                values = self.step(report.steps + 1)
                report.steps += 1
                report.seconds = time.monotonic() - started
                advance(describe(values))
                met = self.limits.met(values["total"])
                if met is not None:
                    report.stopped_by = met
                    self.over = True
                if self.evaluates and self._evaluation_due(report.steps):
                    self.evaluate(report.steps)
                kept = self.compilation.checkpoints
                if kept is not None and kept.due(report.steps):
                    self.save()
        report.seconds = time.monotonic() - started
        if not self.concluded:
            self.conclude()
        self.optimizer.zero_grad(set_to_none=True)

    def step(self, number: int) -> dict[str, float]:
        """One optimizer step over the batches it accumulates; its loss parts."""
        factor = learning_rate_factor(self.phase, number - 1, self.budget)
        for group, rate in zip(self.optimizer.param_groups, self.rates, strict=True):
            group["lr"] = rate * factor
        self.optimizer.zero_grad(set_to_none=True)
        taken = [self.feed.next() for _ in range(self.budget.accumulate)]
        shares = [batch for batch in taken if batch is not None]
        images = sum(batch.size for batch in shares)
        sums = torch.zeros(len(PARTS) + len(self.tap_weights), device=self.device)
        for batch in shares:
            with self.autocast():
                parts = distillation_loss(
                    self.compilation,
                    self.student,
                    self.teacher,
                    batch,
                    self.tap_weights,
                    f"train_data() batch of step {number}",
                )
            if parts.soft is None:
                self._say_no_logits()
            weight = batch.size / images
            sums += parts.values() * batch.size
            total = parts.total if weight == 1.0 else parts.total * weight
            self.scaler.scale(total).backward()  # type: ignore[no-untyped-call]
        images = self._reduce(sums, images)
        values = dict(zip(PARTS, (sums[: len(PARTS)] / images).tolist(), strict=True))
        self._check_finite(number, values, (sums[len(PARTS) :] / images).tolist())
        self.scaler.unscale_(self.optimizer)
        gradients = [p.grad for p in self.parameters if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients)
        # Of float16 gradients some steps overflow; the scaler leaves those out.
        if not self.scaler.is_enabled() and not math.isfinite(norm):
            raise self._not_finite(f"the gradient of phase {self.name} is not finite", number)
        if self.phase.clip_norm is not None:
            torch.nn.utils.clip_grads_with_norm_(self.parameters, self.phase.clip_norm, norm)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.report.images += images
        self.report.curve.append({"step": number, **values})
        return values

    def _say_no_logits(self) -> None:
        if self.compilation.rules.finetune.loss.beta and not self.said_no_logits:
            self.said_no_logits = True
            text = (
                f"phase {self.name}: the model gave no logits in loss(), so the soft part (beta) "
                "is left out"
            )
            self.report.remarks.append(analysis("soft-logits-skipped", text))

    def _reduce(self, sums: torch.Tensor, images: int) -> int:
        """Gradients become the mean over all processes' images, `sums` the sums over them."""
        processes = self.compilation.processes
        if processes.world == 1:
            return images
        reached = sums.new_tensor([parameter.grad is not None for parameter in self.parameters])
        for parameter in self.parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        scaled = [p.grad.flatten() * images for p in self.parameters if p.grad is not None]
        flat = processes.sum(torch.cat([*scaled, reached, sums, sums.new_tensor([images])]))
        sizes = [p.numel() for p in self.parameters]
        lengths = [*sizes, len(reached), len(sums), 1]
        *parts, reached, summed, total = torch.split(flat, lengths)
        sums.copy_(summed)
        for parameter, part, counted in zip(self.parameters, parts, reached.tolist(), strict=True):
            parameter.grad = (part / total).view_as(parameter) if counted else None
        return round(float(total))

    def _check_finite(self, number: int, values: dict[str, float], taps: list[float]) -> None:
        if math.isfinite(values["total"]):
            return
        named = zip(taps_of(self.student), taps, strict=True)
        bad = [tap.name for tap, error in named if not math.isfinite(error)]
        where = f", first at tap {bad[0]}" if bad else ""
        raise self._not_finite(
            f"the loss of phase {self.name} became {values['total']}", number, where
        )

    def _not_finite(self, what: str, number: int, where: str = "") -> CheckFailed:
        kept = self.compilation.checkpoints
        saved = kept is not None and kept.has(self.name)
        return CheckFailed(
            LOSS_NOT_FINITE,
            f"{what} at step {number}{where}",
            hint="a smaller lr or clip_norm in the rules' finetune section keeps it finite, from "
            "the beginning on" + ("; the last good checkpoint is kept" if saved else ""),
        )

    @contextmanager
    def autocast(self) -> Iterator[None]:
        dtype = None if self.phase.autocast is None else DTYPES[self.phase.autocast]
        with torch.autocast(self.device.type, dtype, enabled=dtype is not None):
            yield

    def _evaluates(self) -> bool:
        wanted = self.phase.eval_every is not None or self.phase.keep == "best"
        if wanted and self.compilation.source.eval_data is None:
            text = "the rules evaluate during training, and there is no eval_data(): the last "
            self.report.remarks.append(missed("no-eval-data", text + "weights are kept"))
            return False
        return wanted

    def _evaluation_due(self, step: int) -> bool:
        if self.over or step == self.budget.steps:
            return True
        if self.phase.eval_every is not None:
            return step % self.phase.eval_every == 0
        epochs = self.budget.epoch_steps
        return int(step / epochs) > int((step - 1) / epochs)

    def evaluate(self, step: int) -> None:
        """Evaluate, and remember the weights where they are the best so far."""
        listen(self.student, False)
        measured = evaluate(self.compilation, self.student)
        listen(self.student)
        self.report.evaluations.append({"step": step, **measured})
        score = criterion(measured)
        if self.phase.keep != "best":
            return
        if score is None:
            if len(self.report.evaluations) == 1:
                text = "eval_data() has neither labels nor metrics, so the last weights are kept"
                self.report.remarks.append(missed("no-best", text))
            return
        if self.best is None or score > self.best.score:
            self.best = Best(score, step, copy.deepcopy(self.student.state_dict()))

    def conclude(self) -> None:
        """Put the best weights back, and keep the phase's end for a resumed run."""
        self.over = self.concluded = True
        if self.best is not None:
            self.student.load_state_dict(self.best.weights)
            self.report.kept_step = self.best.step
            self.best = None
        if self.compilation.checkpoints is not None and self.compilation.checkpoints.writes:
            self.save()

    def save(self) -> None:
        kept = self.compilation.checkpoints
        assert kept is not None
        tensors = checkpoint.prefixed("student", self.student.state_dict())
        tensors |= checkpoint.optimizer_tensors(self.optimizer)
        random_tensors, random_state = checkpoint.random_state(self.device)
        tensors |= random_tensors
        if self.best is not None:
            tensors |= checkpoint.prefixed("best", self.best.weights)
        report = self.report
        state = {
            "over": self.over,
            "concluded": self.concluded,
            "position": self.feed.position.as_dict(),
            "random": random_state,
            "scaler": self.scaler.state_dict(),
            "limits": self.limits.state(),
            "best": None if self.best is None else [self.best.score, self.best.step],
            "report": {
                "steps": report.steps,
                "seconds": report.seconds,
                "images": report.images,
                "stopped_by": report.stopped_by,
                "curve": report.curve,
                "evaluations": report.evaluations,
                "kept_step": report.kept_step,
            },
        }
        kept.save(self.name, report.steps, tensors, state, end=self.concluded)

    def _restore(self) -> dict[str, Any] | None:
        """Take up an earlier run where it left this phase; its state, None without one."""
        kept = self.compilation.checkpoints
        found = None if kept is None else kept.load(self.name)
        if kept is None or found is None:
            return None
        tensors, state = found
        weights = checkpoint.without_prefix("student", tensors)
        own = self.student.state_dict()
        if {n: v.shape for n, v in weights.items()} != {n: v.shape for n, v in own.items()}:
            raise checkpoint.damaged(kept.folder, "it is of another model")
        self.student.load_state_dict(weights)
        checkpoint.restore_optimizer(self.optimizer, tensors)
        if self.scaler.is_enabled():
            self.scaler.load_state_dict(state["scaler"])
        self.limits.restore(state["limits"])
        if state["best"] is not None:
            score, step = state["best"]
            self.best = Best(score, step, checkpoint.without_prefix("best", tensors))
        for key, value in state["report"].items():
            setattr(self.report, key, value)
        self.report.resumed_at = self.report.steps
        self.report.remarks.append(analysis("resumed", f"at step {self.report.steps}"))
        self.over, self.concluded = state["over"], state["concluded"]
        return {**state, "tensors": tensors}

    def _check_together(self) -> None:
        """Raise InputError where processes resume at different steps of different folders."""
        processes, step = self.compilation.processes, self.report.steps
        if not self.compilation.options.resume:
            return
        total = int(processes.sum(torch.tensor([step], device=self.device)))
        if total != step * processes.world:
            raise InputError(
                "resume-apart",
                f"process {processes.rank} would go on from step {step} of phase {self.name}, and "
                "another one from another step",
                hint="every machine has to see the same output folder",
            )

    def _feed(self, restored: dict[str, Any] | None) -> Feed:
        feed = Feed(
            self.factory,
            self.device,
            self.compilation.processes,
            seed=derived_seed(self.compilation.options.seed, self.name),
            length=self.budget.epoch_batches,
            start=None if restored is None else Position(**restored["position"]),
        )
        if restored is not None:
            checkpoint.restore_random_state(self.device, restored["tensors"], restored["random"])
        return feed


@contextmanager
def listening(*models: torch.fx.GraphModule) -> Iterator[None]:
    """Let the models' taps keep their feature maps for a while."""
    for model in models:
        listen(model)
    try:
        yield
    finally:
        for model in models:
            listen(model, False)


def tap_shares(
    compilation: Compilation, dense: torch.fx.GraphModule, sparse: torch.fx.GraphModule
) -> list[float]:
    """W_j over a calibration pass; both models are frozen by then, so once is enough."""
    thetas = [tap.theta for tap in taps_of(sparse)]
    sums = [0.0] * len(thetas)
    factory = require_train_data(compilation.source, "quantize")
    seed_everything(derived_seed(compilation.options.seed, "tap_shares"))
    normalize = compilation.rules.finetune.normalize
    limit = compilation.rules.calibration.batches
    with torch.no_grad(), listening(dense, sparse):
        for batch in batches(factory, "train_data", compilation.device, limit):
            with following(sparse, dense):
                for model in (dense, sparse):
                    run_to_taps(compilation, model, batch)
            ours, theirs = features_of(taps_of(sparse)), features_of(taps_of(dense))
            errors = tap_losses(ours, theirs, normalize)
            sums = [total + float(error) for total, error in zip(sums, errors, strict=True)]
    return prune_loss_shares(sums, thetas)


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
