"""Steps of NVIDIA Model Optimizer for benchmarks/train_step.py, in its own virtual environment.

2:4 masks by magnitude, live as its own training wants them, INT8 quantizers, and its distillation
from the logits of the sparse model, through its documented calls. The plain step is its
distillation of the unmodified model.
"""

from __future__ import annotations

import copy
import sys
import warnings
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import modelopt
import modelopt.torch.distill as mtd
import modelopt.torch.quantization as mtq
import modelopt.torch.sparsity as mts
import torch
import torch.nn.functional as F
from torch import nn

import train_step
from train_step import Clock, Settings, Step


def peer_steps(settings: Settings) -> dict[str, Step]:
    images, labels = settings.data()
    teacher = mts.export(mts.sparsify(settings.network(), mode="sparse_magnitude"))
    teacher.requires_grad_(False)

    def quantized() -> nn.Module:
        model = mts.sparsify(settings.network(), mode="sparse_magnitude")
        with torch.no_grad():
            return mtq.quantize(model, mtq.INT8_DEFAULT_CFG, forward_loop=lambda m: m(images))

    def make(student: nn.Module) -> Step:
        config = {
            "teacher_model": copy.deepcopy(teacher),
            "criterion": mtd.LogitsDistillationLoss(temperature=1.0, reduction="batchmean"),
            "loss_balancer": mtd.StaticLossBalancer(0.5),
        }
        student = mtd.convert(student, mode=[("kd_loss", config)])
        trained = [parameter for parameter in student.parameters() if parameter.requires_grad]
        groups = [
            {
                "params": [p for p in trained if p.ndim >= 2],
                "weight_decay": train_step.WEIGHT_DECAY,
            },
            {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
        ]
        optimizer = torch.optim.AdamW(groups, lr=train_step.LEARNING_RATE)
        if settings.compile:
            student.compile()

        def step(clock: Clock) -> None:
            with settings.precision():
                logits = student(images)
                clock.mark("teacher and student")
                loss = student.compute_kd_loss(student_loss=F.cross_entropy(logits, labels))
            clock.mark("loss")
            train_step.update(optimizer, loss, clock)

        return step

    models = {"plain": settings.network, "qat": quantized}
    return {name: make(models[name]()) for name in settings.variants}


def main() -> None:
    warnings.simplefilter("ignore")
    settings = train_step.parse_worker((__doc__ or "").splitlines()[0])
    train_step.work(settings, peer_steps, modelopt.__version__)


if __name__ == "__main__":
    main()
