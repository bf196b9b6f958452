"""Discrete decisions in the graph, and how the student takes them over from its teacher.

A model may decide by comparing what it computed: which tokens stop (A-ViT), which are kept, which
expert an image goes to. No gradient crosses such a decision, and where teacher and student decide
differently, their feature maps are of different things. During the fine-tune the student therefore
computes with the teacher's decisions; evaluated and deployed, it makes its own.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.fx
from torch import nn

from gpusq_compile.errors import InputError
from gpusq_compile.graph.query import input_dependent, is_weighted, module_calls, module_path

aten = torch.ops.aten

SELECTS = {
    aten.where.self,
    aten.where.Scalar,
    aten.where.ScalarOther,
    aten.where.ScalarSelf,
    aten.masked_fill.Scalar,
    aten.masked_fill.Tensor,
}


class Decision(nn.Module):
    """Returns its input unchanged; under `following` a student's returns its teacher's instead."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name
        self.outcomes: deque[torch.Tensor] | None = None
        self.leads = False

    def forward(self, value: torch.Tensor) -> torch.Tensor:
        if self.outcomes is None:
            return value
        if self.leads:
            self.outcomes.append(value)
            return value
        theirs = self.outcomes.popleft() if self.outcomes else None
        if theirs is None or theirs.shape != value.shape:
            what = "none" if theirs is None else f"one of shape {list(theirs.shape)}"
            raise InputError(
                "decision-apart",
                f"decision {self.name}: the student makes one of shape {list(value.shape)}, and "
                f"the teacher made {what}",
                hint="loss() has to call the model alike each time; `decisions: own` in the rules' "
                "finetune section lets the student decide for itself",
            )
        return theirs

    def extra_repr(self) -> str:
        return self.name


def decisions_of(graph_module: torch.fx.GraphModule) -> list[Decision]:
    """The graph's `Decision` modules, in the order in which it reaches them."""
    return [module for _, module in module_calls(graph_module) if isinstance(module, Decision)]


@contextmanager
def following(student: torch.fx.GraphModule, teacher: torch.fx.GraphModule) -> Iterator[None]:
    """What the teacher decides inside, the student decides too, if the teacher runs first.

    Args:
        student, teacher: graphs with the same `Decision` modules.
    """
    pairs = list(zip(decisions_of(teacher), decisions_of(student), strict=True))
    for leader, follower in pairs:
        leader.outcomes = follower.outcomes = deque()
        leader.leads = True
    try:
        yield
    finally:
        for leader, follower in pairs:
            leader.outcomes = follower.outcomes = None
            leader.leads = False


def find_decisions(graph: torch.fx.Graph) -> list[tuple[str, torch.fx.Node]]:
    """The nodes that turn what the model computed into a discrete value, by a name of their own.

    These are boolean and integer tensors made from floating-point ones behind a weighted operator:
    comparisons, the indices of `topk` and `argmax`, casts. Not among them is a comparison that only
    says which side of it a value itself lies on (`where(x > 0, x, a * x)` is an activation).
    """
    dependent = input_dependent(graph)
    weighted: set[torch.fx.Node] = set()
    for node in graph.nodes:
        if node in dependent and (
            is_weighted(node) or any(source in weighted for source in node.all_input_nodes)
        ):
            weighted.add(node)
    return [
        (".".join(filter(None, (module_path(node), node.name))), node)
        for node in graph.nodes
        if node in weighted and _is_discrete(node) and _decides(node)
    ]


def _is_discrete(node: torch.fx.Node) -> bool:
    value = node.meta.get("val")
    return isinstance(value, torch.Tensor) and not (value.is_floating_point() or value.is_complex())


def _decides(node: torch.fx.Node) -> bool:
    sources = [source for source in node.all_input_nodes if _holds_floats(source)]
    return bool(sources) and not _is_activation(node, sources)


def _holds_floats(node: torch.fx.Node) -> bool:
    value = node.meta.get("val")
    parts = value if isinstance(value, (tuple, list)) else (value,)
    return any(isinstance(part, torch.Tensor) and part.is_floating_point() for part in parts)


def _is_activation(node: torch.fx.Node, sources: list[torch.fx.Node]) -> bool:
    def chooses_from_a_source(user: torch.fx.Node) -> bool:
        chosen = [argument for argument in user.all_input_nodes if argument is not node]
        near = {*chosen, *(source for one in chosen for source in one.all_input_nodes)}
        return user.target in SELECTS and any(source in near for source in sources)

    return bool(node.users) and all(chooses_from_a_source(user) for user in node.users)
