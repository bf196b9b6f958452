"""The control of the accuracy benchmark: the same fine-tune, on a model that stays dense.

Both phases in plain PyTorch with the losses, taps, steps, rates and batches of the compressed
rows, and neither masks nor quantizers. A compressed model that beats its dense teacher may owe
that to the extra training alone; the control has had it too.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

import accuracy_recipe as recipe
import fashion_mnist

# What the shipped rules tap: patch embedding, the last block of each stage, the final norm.
TAPS = {
    "deit": ("patch_embed.proj", "blocks.4", "norm"),
    "swin": ("patch_embed.proj", "layers.0.blocks.1", "layers.1.blocks.3", "norm"),
}


class Tapped:
    """A model with hooks that keep the outputs of some of its modules, until `close`."""

    def __init__(self, model: nn.Module, names: Sequence[str]) -> None:
        self.model = model
        self.features: list[torch.Tensor] = []
        modules = [model.get_submodule(name) for name in names]
        self.handles = [module.register_forward_hook(self._keep) for module in modules]

    def _keep(self, module: nn.Module, inputs: object, output: torch.Tensor) -> None:
        self.features.append(output)

    def __call__(self, pixels: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor]]:
        self.features = []
        return self.model(pixels), self.features

    def close(self) -> None:
        for handle in self.handles:
            handle.remove()


def run(job: recipe.Job, folder: Path) -> None:
    task = recipe.Task(job)
    names = TAPS[job.teacher]
    student = fashion_mnist.load_teacher(job.teacher)
    dense = frozen(student)
    thetas = [1.0] * len(names)
    train(task, student, dense, names, thetas, job.rates[0])
    sparse_teacher = frozen(student)
    shares = tap_shares(task, dense, sparse_teacher, names)
    train(task, student, sparse_teacher, names, shares, job.rates[1])
    task.save(folder, student.eval(), {"tap_weights": dict(zip(names, shares, strict=True))})


def frozen(model: nn.Module) -> nn.Module:
    return copy.deepcopy(model).requires_grad_(False).eval()


def train(
    task: recipe.Task,
    student: nn.Module,
    teacher: nn.Module,
    names: Sequence[str],
    tap_weights: Sequence[float],
    lr: float,
) -> None:
    """One phase, towards `teacher`."""
    ours, theirs = Tapped(student, names), Tapped(teacher, names)
    optimizer = torch.optim.AdamW(decayed(student), lr=lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, recipe.STEPS)
    for pixels, labels in task.epochs:
        with torch.no_grad():
            wanted, wanted_features = theirs(pixels)
        logits, features = ours(pixels)
        errors = [F.mse_loss(a, b) for a, b in zip(features, wanted_features, strict=True)]
        loss = (
            recipe.ALPHA * F.cross_entropy(logits, labels)
            + recipe.BETA * divergence(logits, wanted)
            + recipe.GAMMA * sum(w * e for w, e in zip(tap_weights, errors, strict=True))
        )
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        schedule.step()
    ours.close()
    theirs.close()


def divergence(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    """KL(teacher || student) of logits [batch, classes], mean over the batch."""
    log_probabilities = F.log_softmax(student, 1), F.log_softmax(teacher, 1)
    return F.kl_div(*log_probabilities, reduction="batchmean", log_target=True)


def decayed(model: nn.Module) -> list[dict[str, object]]:
    """Parameter groups in which the matrices alone decay."""
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    vectors = [p for p in model.parameters() if p.ndim < 2]
    return [
        {"params": matrices, "weight_decay": recipe.WEIGHT_DECAY},
        {"params": vectors, "weight_decay": 0.0},
    ]


@torch.no_grad()
def tap_shares(
    task: recipe.Task, dense: nn.Module, tuned: nn.Module, names: Sequence[str]
) -> list[float]:
    """Each tap's share of the feature loss between the two models on a few batches."""
    sums = [0.0] * len(names)
    ours, theirs = Tapped(tuned, names), Tapped(dense, names)
    for pixels, _ in itertools.islice(task.epochs, recipe.CALIBRATION_BATCHES):
        pairs = zip(ours(pixels)[1], theirs(pixels)[1], strict=True)
        sums = [total + float(F.mse_loss(a, b)) for total, (a, b) in zip(sums, pairs, strict=True)]
    ours.close()
    theirs.close()
    return [value / sum(sums) for value in sums]
