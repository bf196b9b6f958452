"""The plan of one layer: what the rules asked for, what was applied, and why not the rest.

The mark pass writes one `LayerPlan` into `node.meta["plan"]` of every weighted operator; later
passes replace it (it is frozen) and never keep a second record of the same facts.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace

import torch.fx

from gpusq_compile.language.schema import Distill, Quantize, Sparsity

PLAN = "plan"
TAP_PLAN = "tap_plan"


@dataclass(frozen=True)
class Treatment:
    """How one layer is compressed; None means left as it is."""

    sparsity: str | None = None
    weight: str | None = None
    activation: str | None = None
    output: str | None = None

    def as_dict(self) -> dict[str, str | None]:
        return {
            "sparsity": self.sparsity,
            "weight": self.weight,
            "activation": self.activation,
            "output": self.output,
        }


@dataclass(frozen=True)
class Part:
    """The `rows` of a split layer's whole `weight` and `bias` (paths) that one operator has."""

    rows: tuple[int, ...]
    weight: str
    bias: str | None


@dataclass(frozen=True)
class LayerPlan:
    """The plan of one weighted operator (a linear or a convolution).

    `weight` is the parameter's dotted path in the graph module, `shape` the weight's shape:
    [out, in] for a linear, [out, in / groups, kh, kw] for a convolution. The reduction axis of
    both is axis 1 and the output-channel axis is axis 0. `module` is the full class of the user's
    module. `part` is set where the operator is one of those that a layer was split into.
    """

    name: str
    op: str
    roles: tuple[str, ...]
    weight: str
    shape: tuple[int, ...]
    sparsity: Sparsity | None = None
    quantize: Quantize | None = None
    requested: Treatment = Treatment()
    applied: Treatment = Treatment()
    reasons: tuple[str, ...] = ()
    rules: tuple[str, ...] = ()
    part: Part | None = None
    module: str = ""

    @property
    def role(self) -> str | None:
        return self.roles[0] if self.roles else None

    def refuse(self, reason: str) -> LayerPlan:
        return replace(self, reasons=(*self.reasons, reason))

    def apply(self, **treatment: str | None) -> LayerPlan:
        return replace(self, applied=replace(self.applied, **treatment))


@dataclass(frozen=True)
class TapPlan:
    """A distillation tap asked for at this node's output."""

    name: str
    role: str
    distill: Distill
    rules: tuple[str, ...] = field(default=())


def planned(graph: torch.fx.Graph) -> Iterator[tuple[torch.fx.Node, LayerPlan]]:
    """Every node that carries a plan, in graph order."""
    for node in graph.nodes:
        plan = node.meta.get(PLAN)
        if plan is not None:
            yield node, plan


def first_readers(graph: torch.fx.Graph) -> dict[str, torch.fx.Node]:
    """For each weight the first operator with a plan that reads it.

    What is computed for a weight is computed there, once; others that read it (tied weights, a
    module that is called again) read the same.
    """
    first: dict[str, torch.fx.Node] = {}
    for node, plan in planned(graph):
        if plan.part is None:
            first.setdefault(plan.weight, node)
    return first


def unaccounted(plan: LayerPlan) -> list[str]:
    """What was requested and neither applied nor refused with a reason."""
    if plan.reasons:
        return []
    requested, applied = plan.requested.as_dict(), plan.applied.as_dict()
    return [name for name, value in requested.items() if value and applied[name] != value]


def update_plan(node: torch.fx.Node, plan: LayerPlan) -> None:
    node.meta[PLAN] = plan
