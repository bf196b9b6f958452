"""Distillation taps: identity modules in the graph that show a feature map to the loss."""

from __future__ import annotations

import torch
import torch.fx
from torch import nn

from gpusq_compile.graph.query import module_calls


class Tap(nn.Module):
    """Returns its input unchanged and keeps the last one while `listening`.

    A tap is a module and not an extra graph output, so that the graph stays a drop-in for the
    user's own module and can be tapped inside the user's own model and loss.
    """

    def __init__(self, name: str, role: str, theta: float) -> None:
        super().__init__()
        self.name = name
        self.role = role
        self.theta = theta
        self.listening = False
        self.feature: torch.Tensor | None = None

    def forward(self, value: torch.Tensor) -> torch.Tensor:
        if self.listening:
            self.feature = value
        return value

    def extra_repr(self) -> str:
        return f"{self.name}, role={self.role}, theta={self.theta}"


def taps_of(graph_module: torch.fx.GraphModule) -> list[Tap]:
    """The graph's taps, in the order in which it reaches them."""
    return [module for _, module in module_calls(graph_module) if isinstance(module, Tap)]


def listen(graph_module: torch.fx.GraphModule, on: bool = True) -> None:
    for tap in taps_of(graph_module):
        tap.listening = on
        tap.feature = None


def features_of(taps: list[Tap]) -> list[torch.Tensor]:
    """The feature maps of the last forward pass, one per tap; each is taken once.

    Raises:
        RuntimeError: a tap saw no forward pass since it began to listen.
    """
    features = []
    for tap in taps:
        if tap.feature is None:
            raise RuntimeError(f"tap {tap.name} saw no forward pass")
        features.append(tap.feature)
        tap.feature = None
    return features
