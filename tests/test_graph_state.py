"""A graph's state holds until something that it computes with was changed."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.fx
from torch import Tensor, nn

from gpusq_compile.finetune.optimizer import mark_as_written
from gpusq_compile.graph.edit import remove_tensor, set_tensor
from gpusq_compile.graph.state import GraphState
from tests.models import seeded


class Scaled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.BatchNorm1d(4)
        self.weight = nn.Parameter(torch.ones(4))

    def forward(self, x: Tensor) -> Tensor:
        return (self.inner(x) * self.weight).relu()


class LeafTracer(torch.fx.Tracer):
    """Keeps submodules as calls, as inserted masks and fake-quantizers are."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return True


def traced() -> torch.fx.GraphModule:
    model = seeded(Scaled).eval()
    return torch.fx.GraphModule(model, LeafTracer().trace(model))


def node(graph_module: torch.fx.GraphModule, op: str) -> torch.fx.Node:
    [found] = [n for n in graph_module.graph.nodes if n.op == op]
    return found


def set_value(graph_module: torch.fx.GraphModule) -> None:
    with torch.no_grad():
        graph_module.get_parameter("weight").mul_(2)


def replace_by_equal(graph_module: torch.fx.GraphModule) -> None:
    set_tensor(graph_module, "weight", torch.ones(4), trainable=True)


def make_a_buffer(graph_module: torch.fx.GraphModule) -> None:
    set_tensor(graph_module, "weight", torch.ones(4), trainable=False)


def write_statistics(graph_module: torch.fx.GraphModule) -> None:
    graph_module.get_buffer("inner.running_mean").add_(1)


def lose_a_buffer(graph_module: torch.fx.GraphModule) -> None:
    remove_tensor(graph_module, "inner.running_mean")


def step_fused(graph_module: torch.fx.GraphModule) -> None:
    """Fused optimizers write without a new version of the tensor, so a hook counts for them."""
    weight = graph_module.get_parameter("weight")
    weight.grad = torch.ones_like(weight)
    mark_as_written(torch.optim.SGD([weight], lr=0.1))


def rewire(graph_module: torch.fx.GraphModule) -> None:
    node(graph_module, "output").args = (node(graph_module, "call_module"),)


def retarget(graph_module: torch.fx.GraphModule) -> None:
    node(graph_module, "call_method").target = "abs"


@pytest.mark.parametrize(
    "change",
    [
        set_value,
        replace_by_equal,
        make_a_buffer,
        write_statistics,
        lose_a_buffer,
        step_fused,
        rewire,
        retarget,
    ],
)
def test_a_change_of_the_graph_is_seen(change: Callable[[torch.fx.GraphModule], None]) -> None:
    graph_module = traced()
    state = GraphState(graph_module)
    assert state.holds(graph_module)
    change(graph_module)
    assert not state.holds(graph_module)
    assert GraphState(graph_module).holds(graph_module)


def test_running_and_naming_anew_change_nothing() -> None:
    graph_module = traced()
    state = GraphState(graph_module)
    graph_module(torch.ones(2, 4))
    graph_module.recompile()
    node(graph_module, "call_module").meta["note"] = "seen"
    assert state.holds(graph_module)
