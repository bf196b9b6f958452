"""Block-wise reconstruction: fit each sparse quantized block to the dense one by itself.

After BRECQ ("BRECQ: Pushing the Limit of Post-Training Quantization by Block Reconstruction", Li
et al., ICLR 2021, section 3.2): the blocks are fitted in order, each from the inputs that the
fitted blocks before it give, so that it learns to mend their errors too. Where BRECQ learns which
way to round, here the weights themselves and the scale factors are trained through the rounding.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.fx
from torch import Tensor, nn
from torch.nn import functional as F

from gpusq_compile.compilation import Compilation
from gpusq_compile.console import Advance
from gpusq_compile.errors import CheckFailed
from gpusq_compile.finetune.optimizer import unfreeze
from gpusq_compile.graph.blocks import Block, block_module, find_blocks, owned_parameters
from gpusq_compile.graph.query import output_nodes, static_shape
from gpusq_compile.graph.walk import Call, Walk
from gpusq_compile.language.training import Reconstruct
from gpusq_compile.numerics import spread
from gpusq_compile.plan import PLAN, Treatment
from gpusq_compile.quantization.fake_quantize import FakeQuantize


@dataclass(frozen=True)
class Reconstruction:
    """What became of one block.

    `layers` are its compressed layers in graph order. Errors are mean squared differences from
    the dense block's output on the calibration data, as a share of that output's variance:
    `before`, and `reached` after `steps` optimizer steps.
    """

    layers: tuple[str, ...]
    before: float
    reached: float
    steps: int
    seconds: float

    @property
    def name(self) -> str:
        return name_of(self.layers)

    @property
    def kept(self) -> bool:
        """Whether the block came closer to the dense one; else it is as it was."""
        return self.reached < self.before

    @property
    def after(self) -> float:
        return self.reached if self.kept else self.before

    def as_dict(self) -> dict[str, Any]:
        return {
            "layers": list(self.layers),
            "before": self.before,
            "after": self.after,
            "steps": self.steps,
            "seconds": round(self.seconds, 3),
        }


def reconstruct(
    compilation: Compilation, calls: Sequence[Call], settings: Reconstruct
) -> list[Reconstruction]:
    """Fit the blocks of the compilation's graph to those of its dense teacher, in graph order.

    Blocks without a compressed layer, and parameters that several blocks share, stay as they are.
    Afterwards nothing is trainable.

    Args:
        calls: the calibration data, one call of the graph per batch.

    Raises:
        CheckFailed: a block's outputs are not finite before it is fitted.
    """
    student, teacher = compilation.ir, compilation.dense_teacher
    assert teacher is not None
    unfreeze(student, compilation.frozen)
    trainable = {name for name, value in student.named_parameters() if value.requires_grad}
    student.requires_grad_(False)
    counterparts = counterparts_of(student, teacher)
    blocks = find_blocks(student, lambda node: node in counterparts)
    blocks = [block for block in blocks if compressed_layers(block)]
    ours, dense = Walk(student, calls), Walk(teacher, calls)
    found = []
    with compilation.console.progress("reconstruct", len(blocks) * settings.steps) as advance:
        for block in blocks:
            wanted = [counterparts[target] for target in block.targets]
            advance_to(ours, block.inputs)
            advance_to(dense, wanted)
            owned = owned_parameters(student, block)
            found.append(
                fit(
                    block_module(student, block),
                    {name: value for name, value in owned.items() if name in trainable},
                    inputs=per_batch(ours, block.inputs),
                    targets=per_batch(dense, wanted),
                    settings=settings,
                    layers=compressed_layers(block),
                    advance=advance,
                )
            )
    return found


def name_of(layers: Sequence[str]) -> str:
    """What messages call a block: the first and the last of its layers."""
    return " .. ".join(dict.fromkeys((layers[0], layers[-1])))


def counterparts_of(
    student: torch.fx.GraphModule, teacher: torch.fx.GraphModule
) -> dict[torch.fx.Node, torch.fx.Node]:
    """The teacher's node for each of the student's operators and outputs that it has too.

    The teacher is a copy of the student's graph from before modules were inserted, and a copy
    keeps the names. A pass that rewrote the operators since then leaves those without a
    counterpart whose name, operator or shape it changed.
    """
    by_name = {node.name: node for node in teacher.graph.nodes}
    found: dict[torch.fx.Node, torch.fx.Node] = {}
    for node in student.graph.nodes:
        other = by_name.get(node.name)
        if (
            node.op == "call_function"
            and other is not None
            and other.target == node.target
            and static_shape(other) == static_shape(node)
        ):
            found[node] = other
    found.update(zip(output_nodes(student.graph), output_nodes(teacher.graph), strict=True))
    return found


def compressed_layers(block: Block) -> tuple[str, ...]:
    """The names of the sparse or quantized layers of a block."""
    plans = (node.meta.get(PLAN) for node in block.nodes)
    return tuple(plan.name for plan in plans if plan and plan.applied != Treatment())


def advance_to(walk: Walk, nodes: Sequence[torch.fx.Node]) -> None:
    """Run the walk until the values of all `nodes` are there."""
    last = max(nodes)
    if not walk.has_passed(last):
        walk.run_past(last)


def per_batch(walk: Walk, nodes: Sequence[torch.fx.Node]) -> list[tuple[Any, ...]]:
    """The values of `nodes`, batch by batch."""
    return list(zip(*(walk.values_of(node) for node in nodes), strict=True))


def fit(
    module: torch.fx.GraphModule,
    parameters: Mapping[str, nn.Parameter],
    *,
    inputs: Sequence[tuple[Any, ...]],
    targets: Sequence[tuple[Tensor, ...]],
    settings: Reconstruct,
    layers: tuple[str, ...],
    advance: Advance,
) -> Reconstruction:
    """Train a block towards its targets; undone where it did not come closer to them.

    Args:
        module: the block; maps the inputs of a batch to a tuple like that batch's targets.
        parameters: what trains, by dotted name.

    Raises:
        CheckFailed: the block's outputs are not finite to begin with.
    """
    started = time.monotonic()
    loss_on, error = errors_of(module, inputs, targets)
    before = error()
    name = name_of(layers)
    if not math.isfinite(before):
        raise CheckFailed(
            "loss-not-finite",
            f"reconstruct: block {name} gives NaN or infinite values on the calibration data",
        )
    initial = {path: value.detach().clone() for path, value in parameters.items()}
    steps = settings.steps if parameters and before else 0
    done = 0
    for value in parameters.values():
        value.requires_grad_(True)
    if steps:
        optimizer = torch.optim.Adam(parameter_groups(module, parameters, settings))
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    while done < steps:
        loss = loss_on(done % len(inputs))
        if not math.isfinite(float(loss.detach())):
            break
        optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        schedule.step()
        done += 1
        advance(f"{name}: error {float(loss.detach()):.2e}")
    for value in parameters.values():
        value.requires_grad_(False).grad = None
    found = Reconstruction(layers, before, error(), done, time.monotonic() - started)
    if not found.kept:
        with torch.no_grad():
            for path, value in parameters.items():
                value.copy_(initial[path])
    return found


def errors_of(
    module: nn.Module, inputs: Sequence[tuple[Any, ...]], targets: Sequence[tuple[Tensor, ...]]
) -> tuple[Callable[[int], Tensor], Callable[[], float]]:
    """The error on the batch of an index, and the error on all of them.

    Of several targets each counts alike, whatever their variances are.
    """
    variances = [
        math.fsum(spread(target) ** 2 for target in batches) / len(batches)
        for batches in zip(*targets, strict=True)
    ]
    sizes = [batch[0].numel() for batch in targets]

    def loss_on(index: int) -> Tensor:
        pairs = zip(module(*inputs[index]), targets[index], variances, strict=True)
        errors = [F.mse_loss(output, target) / variance for output, target, variance in pairs]
        return torch.stack(errors).mean()

    def error() -> float:
        with torch.no_grad():
            shares = [size * float(loss_on(index)) for index, size in enumerate(sizes)]
        return math.fsum(shares) / sum(sizes)

    return loss_on, error


def parameter_groups(
    module: nn.Module, parameters: Mapping[str, nn.Parameter], settings: Reconstruct
) -> list[dict[str, Any]]:
    """Weights and scale factors, each with its learning rate."""
    scales = {part.log_scale for part in module.modules() if isinstance(part, FakeQuantize)}
    weights = [value for value in parameters.values() if value not in scales]
    learned = [value for value in parameters.values() if value in scales]
    groups = [
        {"params": weights, "lr": settings.lr},
        {"params": learned, "lr": settings.scale_lr},
    ]
    return [group for group in groups if group["params"]]
