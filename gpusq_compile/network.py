"""The user's whole model with the compiled graph in its place."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.fx
from torch import nn
from torch.utils._pytree import tree_leaves

from gpusq_compile.errors import InputError, nearest
from gpusq_compile.output_cache import Cached


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
        with self.placed(stand_in) as model:
            return model(*inputs)

    @contextmanager
    def placed(self, stand_in: nn.Module) -> Iterator[nn.Module]:
        """The whole model, with `stand_in` at the scope as long as the context lasts.

        Raises:
            InputError: the model calls the compiled graph with other sizes than it was traced for.
        """
        handle = None
        graph = stand_in.module if isinstance(stand_in, Cached) else stand_in
        if isinstance(graph, torch.fx.GraphModule):
            handle = graph.register_forward_pre_hook(_check_sizes, with_kwargs=True)
        try:
            if self.scope is None:
                yield stand_in
            else:
                _place(self.root, self.scope, stand_in)
                yield self.root
        finally:
            if self.scope is not None:
                _place(self.root, self.scope, self.original)
            if handle is not None:
                handle.remove()

    def scoped_inputs(self, inputs: tuple[Any, ...]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The (args, kwargs) that the scoped submodule is called with for the model's `inputs`.

        Of several calls the first. The model runs no further: what a detector makes of its
        backbone's outputs may take more than the backbone.

        Raises:
            InputError: the model's forward never calls it.
        """
        if self.scope is None:
            return inputs, {}

        def stop(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            raise _ScopeReached(args, kwargs)

        handle = self.original.register_forward_pre_hook(stop, with_kwargs=True)
        try:
            with torch.no_grad():
                self.root(*inputs)
        except _ScopeReached as reached:
            return reached.call
        finally:
            handle.remove()
        raise InputError("scope-not-called", f"forward() never calls '{self.scope}'")


class _ScopeReached(BaseException):
    """Ends a forward at the scope; no `Exception`, which the model may catch."""

    def __init__(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        super().__init__()
        self.call = args, kwargs


def _check_sizes(graph: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Raise InputError where an input has another size than the one that was traced."""
    assert isinstance(graph, torch.fx.GraphModule)
    nodes = [node for node in graph.graph.nodes if node.op == "placeholder"]
    leaves = tree_leaves((args, kwargs))
    if len(nodes) != len(leaves):
        return
    for node, leaf in zip(nodes, leaves, strict=True):
        traced = node.meta.get("val")
        if not isinstance(traced, torch.Tensor) or not isinstance(leaf, torch.Tensor):
            continue
        fits = leaf.ndim == traced.ndim and all(
            not isinstance(size, int) or size == found
            for size, found in zip(traced.shape, leaf.shape, strict=True)
        )
        if not fits:
            sizes = ["any" if not isinstance(size, int) else size for size in traced.shape]
            raise InputError(
                "traced-sizes",
                f"the compiled module is called with {list(leaf.shape)} for '{node.name}', but "
                f"was traced for [{', '.join(map(str, sizes))}]",
                hint="give data of one size, or say in dynamic_shapes() which sizes vary",
            )


def _submodule(root: nn.Module, scope: str) -> nn.Module:
    try:
        return root.get_submodule(scope)
    except AttributeError:
        names = [name for name, _ in root.named_modules() if name]
        raise InputError(
            "unknown-scope",
            f"the model has no submodule '{scope}'",
            hint=_nearest_scopes(scope, names),
        ) from None


def _nearest_scopes(scope: str, names: list[str]) -> str:
    """The nearest submodule of any depth, and those beside what is wrong in `scope`."""
    start = scope
    while start and start not in names:
        start = start.rpartition(".")[0]
    if not start:
        # Of a whole model, the upper two levels are enough to read.
        listed = [name for name in names if name.count(".") <= 1]
    else:
        listed = [name for name in names if name.rpartition(".")[0] == start]
    close = nearest(scope, [name for name in names if name.startswith(start)])
    first = f"did you mean '{close}'? " if close else ""
    below = f" in {start}" if start else ""
    return f"{first}valid{below}: {', '.join(sorted(listed)) or 'none'}"


def _place(root: nn.Module, scope: str, module: nn.Module) -> None:
    parent, _, leaf = scope.rpartition(".")
    setattr(root.get_submodule(parent), leaf, module)
