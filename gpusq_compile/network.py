"""The user's whole model with the compiled graph in its place."""

from __future__ import annotations

from typing import Any

import torch
import torch.fx
from torch import nn

from gpusq_compile.errors import InputError, did_you_mean


class Network:
    """Runs the user's model with any stand-in for the submodule at `scope`.

    With no scope the stand-in is the whole model. Teacher and student share everything outside
    the scope; nothing there trains.
    """

    def __init__(self, root: nn.Module, scope: str | None) -> None:
        self.root = root
        self.scope = scope
        self.original = root if scope is None else _submodule(root, scope)

    def run(self, stand_in: nn.Module, inputs: tuple[Any, ...]) -> Any:
        """The whole model's outputs on `inputs` with `stand_in` at the scope."""
        if self.scope is None:
            return stand_in(*inputs)
        _place(self.root, self.scope, stand_in)
        try:
            return self.root(*inputs)
        finally:
            _place(self.root, self.scope, self.original)

    def scoped_inputs(self, inputs: tuple[Any, ...]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The (args, kwargs) that the scoped submodule is called with for the model's `inputs`.

        Raises:
            InputError: the model's forward never calls it.
        """
        if self.scope is None:
            return inputs, {}
        seen: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

        def keep(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            seen.append((args, kwargs))

        handle = self.original.register_forward_pre_hook(keep, with_kwargs=True)
        try:
            with torch.no_grad():
                self.root(*inputs)
        finally:
            handle.remove()
        if not seen:
            raise InputError("scope-not-called", f"forward() never calls '{self.scope}'")
        return seen[0]


def _submodule(root: nn.Module, scope: str) -> nn.Module:
    try:
        return root.get_submodule(scope)
    except AttributeError:
        names = [name for name, _ in root.named_modules() if name]
        raise InputError(
            "unknown-scope",
            f"the model has no submodule '{scope}'",
            hint=did_you_mean(scope, [name for name in names if name.count(".") <= 1]),
        ) from None


def _place(root: nn.Module, scope: str, module: nn.Module) -> None:
    parent, _, leaf = scope.rpartition(".")
    setattr(root.get_submodule(parent), leaf, module)
