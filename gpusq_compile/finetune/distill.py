"""The loss of one batch: the student's own, and its distance from the teacher."""

from __future__ import annotations

import torch
import torch.fx

from gpusq_compile.compilation import Compilation
from gpusq_compile.data import Batch, check_labels, check_required_labels, logits_of
from gpusq_compile.finetune.decisions import following
from gpusq_compile.finetune.losses import (
    LossParts,
    combine,
    hard_label_loss,
    soft_logits_loss,
    tap_losses,
)
from gpusq_compile.finetune.taps import features_of, taps_of
from gpusq_compile.finetune.user_loss import has_logits, user_loss


def distillation_loss(
    compilation: Compilation,
    student: torch.fx.GraphModule,
    teacher: torch.fx.GraphModule,
    batch: Batch,
    tap_weights: list[float],
    where: str,
) -> LossParts:
    """alpha * hard label + beta * soft logits + gamma * features of one batch.

    With a `loss` of the user's, that is the hard-label part, and the soft part is left out where
    the compiled module's outputs hold no logits. The teacher runs first, without gradients, and the
    student takes over its decisions. Losses are float32 whatever the forward passes compute in.

    Args:
        where: what messages call the batch.

    Raises:
        InputError: labels are missing or outside the model's classes, or the user's loss fails.
    """
    settings = compilation.rules.finetune
    own = compilation.source.loss is not None
    losses = _users_loss if own else _classification_loss
    with following(student, teacher):
        hard, soft = losses(compilation, student, teacher, batch, where)
    taps = tap_losses(
        [feature.float() for feature in features_of(taps_of(student))],
        [feature.float() for feature in features_of(taps_of(teacher))],
        settings.normalize,
    )
    return combine(settings.loss, hard, soft, taps, tap_weights)


def run_to_taps(compilation: Compilation, model: torch.fx.GraphModule, batch: Batch) -> None:
    """Run the user's model on a batch with `model` in its place, for what its taps see."""
    if compilation.source.loss is None:
        compilation.network.run(model, batch.inputs)
    else:
        user_loss(compilation, model, batch, "train_data() batch")


def _classification_loss(
    compilation: Compilation,
    student: torch.fx.GraphModule,
    teacher: torch.fx.GraphModule,
    batch: Batch,
    where: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    settings = compilation.rules.finetune
    find_logits = compilation.source.logits
    if settings.labels == "required":
        check_required_labels(batch, where, compilation.source.place("train_data"))
    with torch.no_grad():
        theirs = logits_of(compilation.network.run(teacher, batch.inputs), find_logits).float()
    ours = logits_of(compilation.network.run(student, batch.inputs), find_logits).float()
    if batch.labels is not None:
        check_labels(batch.labels, ours.shape[1], where)
    stand_in = "soft" if settings.labels == "soft" else "hard"
    return (
        hard_label_loss(ours, theirs, batch.labels, stand_in),
        soft_logits_loss(ours, theirs, settings.loss.temperature),
    )


def _users_loss(
    compilation: Compilation,
    student: torch.fx.GraphModule,
    teacher: torch.fx.GraphModule,
    batch: Batch,
    where: str,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    with torch.no_grad():
        theirs = user_loss(compilation, teacher, batch, where)
    ours = user_loss(compilation, student, batch, where)
    hard = ours.loss.float()
    if not has_logits(compilation, ours.outputs):
        return hard, None
    find_logits = compilation.source.logits
    soft = soft_logits_loss(
        logits_of(ours.outputs, find_logits).float(),
        logits_of(theirs.outputs, find_logits).float(),
        compilation.rules.finetune.loss.temperature,
    )
    return hard, soft
