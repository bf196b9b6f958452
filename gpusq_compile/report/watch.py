"""Run a graph in the user's model and look at its values on the way."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

import torch
import torch.fx
from torch import nn

from gpusq_compile.graph.walk import flat_inputs

See = Callable[[torch.fx.Node, Any, Any], None]
"""`see(node, value, first argument)`, called without gradients."""


class Watch(nn.Module):
    """Stands in for a graph module and shows each value to `see`.

    At the places that are asked for, values are kept; with gradients switched on they are the
    first ones that have any, so that nothing before them is kept for a backward pass.

    Attributes:
        places: names of the nodes to keep, set before a run.
        kept: their values after it, with their graph of gradients if there is one.
        image: the first input that looks like a batch of images, None without one.
    """

    def __init__(self, graph_module: torch.fx.GraphModule, see: See) -> None:
        super().__init__()
        # A list keeps it from being registered: the graph is not this module's own.
        self.watched = [graph_module]
        self.see = see
        self.places: Collection[str] = ()
        self.kept: dict[str, torch.Tensor] = {}
        self.image: torch.Tensor | None = None

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        graph_module = self.watched[0]
        flat = flat_inputs(graph_module, (args, kwargs))
        self.kept = {}
        self.image = next((value for value in flat if looks_like_images(value)), None)
        result = _Interpreter(graph_module, self).run(*flat, enable_io_processing=False)
        return graph_module.graph.process_outputs(result)


def looks_like_images(value: Any) -> bool:
    """Whether it is a float tensor [batch, channels, height, width] of something one can see."""
    if not isinstance(value, torch.Tensor) or value.ndim != 4 or not value.is_floating_point():
        return False
    return value.shape[1] <= 16 and min(value.shape[2:]) >= 4


class _Interpreter(torch.fx.Interpreter):
    def __init__(self, graph_module: torch.fx.GraphModule, watch: Watch) -> None:
        super().__init__(graph_module)
        self.watch = watch

    def run_node(self, n: torch.fx.Node) -> Any:
        value = super().run_node(n)
        if n.name in self.watch.places and isinstance(value, torch.Tensor):
            if torch.is_grad_enabled() and not value.requires_grad and value.is_floating_point():
                value = value.detach().requires_grad_()
            self.watch.kept[n.name] = value
        if n.op in ("call_function", "call_module"):
            first = n.args[0] if n.args else None
            given = self.env.get(first) if isinstance(first, torch.fx.Node) else None
            with torch.no_grad():
                self.watch.see(n, value, given)
        return value
