"""The user's own `loss(model, batch)`, with the compiled graph inside his model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from copy import copy
from dataclasses import dataclass
from typing import Any

import torch
import torch.fx
from torch import nn
from torch.utils._pytree import tree_map

from gpusq_compile import data
from gpusq_compile.batch import describe
from gpusq_compile.compilation import Compilation
from gpusq_compile.data import Batch
from gpusq_compile.errors import InputError
from gpusq_compile.model_source import ModelSource
from gpusq_compile.randomness import isolated_random
from gpusq_compile.user_code import call_user, defined_at, described


@dataclass(frozen=True)
class UserLoss:
    """`loss` is a scalar, and `outputs` what the model gave in the last call that `loss()` made.

    `outputs` is None where `loss()` called parts of the model alone.
    """

    loss: torch.Tensor
    outputs: Any


def user_loss(
    compilation: Compilation, stand_in: torch.fx.GraphModule, batch: Batch, where: str
) -> UserLoss:
    """Call the user's `loss(model, batch)` with `stand_in` at the compiled scope of his model.

    With no scope, the model that `loss` gets is `stand_in` itself. Whatever `loss` does, the model
    around the graph stays as it was: its training flags and buffers (the running statistics of a
    batch norm) are put back. The graph computes as in eval mode even under `model.train()`.

    Under `no_grad` the random state is put back too, so that a call for the student draws the
    same numbers as the one for the teacher before it (the proposals that a detector samples, a
    mix-up of the batch).

    Args:
        where: what messages call the batch.

    Raises:
        InputError: `loss` raised, returned anything but a scalar tensor that depends on the
            graph's parameters, or never called the graph. The value may be NaN or infinite.
    """
    source = compilation.source
    assert source.loss is not None
    teaching = not torch.is_grad_enabled()
    outputs: list[Any] = []
    calls: list[None] = []
    with (
        isolated_random(compilation.device) if teaching else nullcontext(),
        compilation.network.placed(stand_in) as model,
        unchanged(model, apart=stand_in),
        model.register_forward_hook(lambda _, __, output: outputs.append(output)),
        stand_in.register_forward_hook(lambda *_: calls.append(None)),
    ):
        try:
            raw = own_containers(batch.raw)
            found = call_user(source.loss, source.file, f"loss() on {where}", model, raw)
        except InputError as error:
            cause = error.__cause__
            if isinstance(cause, AttributeError) and cause.obj is stand_in:
                error.hint = (
                    "the compiled graph has forward() alone; with --scope PATH of a submodule the "
                    "model around it stays your own"
                )
            raise
    if not calls:
        scope = compilation.network.scope
        raise InputError(
            "loss-without-model",
            f"loss() on {where} never calls {f'the submodule {scope!r}' if scope else 'the model'}",
            location=defined_at(source.loss),
            hint="compute the loss from what the `model` that loss() is given returns",
        )
    return UserLoss(scalar(source, found, where), outputs[-1] if outputs else None)


def own_containers(raw: Any) -> Any:
    """The same tensors in lists and dictionaries of their own, for a `loss` that calls `pop()`."""
    return tree_map(lambda leaf: copy(leaf) if isinstance(leaf, Mapping) else leaf, raw)


def has_logits(compilation: Compilation, outputs: Any) -> bool:
    """Whether the outputs of a `UserLoss` hold logits to distil."""
    return data.has_logits(outputs, compilation.source.logits)


def scalar(source: ModelSource, found: Any, where: str) -> torch.Tensor:
    """What `loss` returned as a tensor [] that can be minimized, or InputError."""
    if isinstance(found, torch.Tensor) and found.is_floating_point() and found.numel() == 1:
        loss = found.reshape(())
        if loss.requires_grad or not torch.is_grad_enabled():
            return loss
        what = "a tensor without a gradient"
        hint = "item(), detach(), argmax() and torch.no_grad() cut the loss off from the model"
    else:
        what, hint = _mistaken(found)
    assert source.loss is not None
    raise InputError(
        "loss-kind",
        f"loss() on {where} returned {what}, expected a scalar tensor with a gradient",
        location=defined_at(source.loss),
        hint=hint,
    )


def _mistaken(found: Any) -> tuple[str, str]:
    """What came in place of a loss, and what was probably meant."""
    if isinstance(found, torch.Tensor):
        if found.numel() == 1:
            return f"a tensor of {describe(found)}", "a loss is a floating-point number"
        return f"a tensor of {describe(found)}", "return loss.mean() or loss.sum()"
    if isinstance(found, Mapping):
        names = ", ".join(map(str, list(found)[:6]))
        return f"{described(found)} of {names}", "return sum(losses.values())"
    if found is None:
        return "None", "loss() has no `return`, or returns nothing"
    if isinstance(found, (list, tuple)):
        return f"{described(found)} of {len(found)} items", "return the sum of its losses alone"
    if isinstance(found, (int, float)):
        return described(found), "return the tensor itself: item() and float() cut the gradient"
    hint = "return outputs.loss" if hasattr(found, "loss") else "return the loss tensor alone"
    return described(found), hint


@contextmanager
def unchanged(model: nn.Module, *, apart: nn.Module) -> Iterator[None]:
    """Afterwards the training flags of `model`, and its buffers outside `apart`, are as before.

    Inside, the buffers are copies: autograd may still need the ones that `loss` has written to.
    """
    inside = set(apart.modules())
    modes = [(module, module.training) for module in model.modules()]
    kept = [
        (module, name, buffer)
        for module in model.modules()
        if module not in inside
        for name, buffer in module._buffers.items()
        if buffer is not None
    ]
    copies = {id(buffer): buffer.clone() for _, _, buffer in kept}
    for module, name, buffer in kept:
        module._buffers[name] = copies[id(buffer)]
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
        for module, name, buffer in kept:
            module._buffers[name] = buffer
