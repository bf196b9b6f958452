"""What trains in a phase, and the optimizer that trains it."""

from __future__ import annotations

from typing import Any

import torch
import torch.fx

from gpusq_compile.language.training import Phase, QuantizePhase
from gpusq_compile.plan import Treatment, planned
from gpusq_compile.quantization.fake_quantize import FakeQuantize

ADAM_BETA2 = 0.999


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
    # Unfused, a step over gradients that masks made half of zeros takes several times as long.
    optimizer: torch.optim.Optimizer
    if phase.optimizer == "sgd":
        optimizer = torch.optim.SGD(groups, lr=phase.lr, momentum=phase.momentum, fused=True)
    else:
        betas = (phase.momentum, ADAM_BETA2)
        optimizer = torch.optim.AdamW(groups, lr=phase.lr, betas=betas, fused=True)
    optimizer.register_step_post_hook(mark_as_written)
    return optimizer


def mark_as_written(optimizer: torch.optim.Optimizer, *_: Any) -> None:
    """Have the versions of the parameters say that a step wrote to them: a fused one does not."""
    written = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    torch.autograd.graph.increment_version(written)
