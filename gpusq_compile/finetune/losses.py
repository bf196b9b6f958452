"""The three losses of Algorithm 1 and the sparse-distillation-aware tap weights W_j."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from gpusq_compile.language.training import Loss


@dataclass(frozen=True)
class LossParts:
    """Scalar tensors: the weighted sum, its three parts before their weights, and each tap's.

    `soft` is None where a loss of the user's leaves no logits to distil.
    """

    total: torch.Tensor
    hard: torch.Tensor
    soft: torch.Tensor | None
    feature: torch.Tensor
    taps: tuple[torch.Tensor, ...] = ()

    def values(self) -> torch.Tensor:
        """All of them, detached, as one float32 tensor [4 + taps]."""
        soft = torch.zeros_like(self.hard) if self.soft is None else self.soft
        parts = (self.total, self.hard, soft, self.feature, *self.taps)
        return torch.stack([part.detach().float() for part in parts])


def hard_label_loss(
    student: torch.Tensor, teacher: torch.Tensor, labels: torch.Tensor | None, stand_in: str
) -> torch.Tensor:
    """Cross-entropy with the labels, else with the teacher (Algorithm 1, lines 8-12 and 26-30).

    Args:
        student, teacher: logits [batch, classes].
        labels: class indices int64 [batch], or None.
        stand_in: `hard` takes the teacher's argmax, `soft` its probabilities at temperature 1.
    """
    if labels is not None:
        return F.cross_entropy(student, labels)
    target = teacher.argmax(dim=1) if stand_in == "hard" else teacher.softmax(dim=1)
    return F.cross_entropy(student, target)


def soft_logits_loss(
    student: torch.Tensor, teacher: torch.Tensor, temperature: float
) -> torch.Tensor:
    """KL(teacher || student) of logits [batch, classes], batch mean, times temperature squared.

    Algorithm 1, lines 14 and 32; the factor keeps gradients independent of the temperature
    (Hinton et al., "Distilling the Knowledge in a Neural Network", section 2.1).
    """
    divergence = F.kl_div(
        F.log_softmax(student / temperature, dim=1),
        F.log_softmax(teacher / temperature, dim=1),
        reduction="batchmean",
        log_target=True,
    )
    return divergence * temperature**2


def tap_losses(
    student: Sequence[torch.Tensor], teacher: Sequence[torch.Tensor], normalize: str
) -> list[torch.Tensor]:
    """The mean squared error at each tap, in the order of the taps.

    `normalize: teacher_variance` divides by the variance of the teacher's feature map.
    """
    losses = []
    for ours, theirs in zip(student, teacher, strict=True):
        error = F.mse_loss(ours, theirs)
        if normalize == "teacher_variance":
            error = error / theirs.var().clamp_min(1e-12)
        losses.append(error)
    return losses


def combine(
    weights: Loss,
    hard: torch.Tensor,
    soft: torch.Tensor | None,
    taps: Sequence[torch.Tensor],
    tap_weights: Sequence[float],
) -> LossParts:
    """alpha * hard + beta * soft + gamma * feature (Algorithm 1, lines 15 and 33).

    The feature loss is the sum of each tap's error times its weight (lines 6 and 24). Without
    logits there is no soft part.
    """
    feature = torch.zeros_like(hard)
    for weight, error in zip(tap_weights, taps, strict=True):
        feature = feature + weight * error
    total = weights.alpha * hard + weights.gamma * feature
    if soft is not None:
        total = total + weights.beta * soft
    return LossParts(total, hard, soft, feature, tuple(taps))


def prune_loss_shares(errors: Sequence[float], thetas: Sequence[float]) -> list[float]:
    """W_j: each tap's share of the sparse phase's feature loss (Algorithm 1, line 22).

    `errors` are the taps' mean squared errors between the dense and the sparse model. The shares
    sum to 1; when the models agree everywhere, every tap gets the same share.
    """
    parts = [theta * error for theta, error in zip(thetas, errors, strict=True)]
    total = sum(parts)
    if total <= 0.0:
        return [1.0 / len(parts)] * len(parts) if parts else []
    return [part / total for part in parts]
