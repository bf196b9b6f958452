"""What the search for roles says of a model."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from gpusq_compile.plan import TAP_PLAN
from tests.compilations import TAPS, begin, make_rules, plans_of, run_until


def layer_roles(model: nn.Module, inputs: Tensor) -> dict[str, tuple[str, ...]]:
    everything = {"id": "all", "match": {"op": ["linear", "conv2d"]}, "quantize": "none"}
    marked = run_until(begin(model, inputs, make_rules(everything)), "mark")
    return {name: plan.roles for name, plan in plans_of(marked).items()}


def tap_roles(model: nn.Module, inputs: Tensor, **distill: Any) -> list[tuple[str, str]]:
    """(tap's name up to the operator's number, role) in graph order."""
    rule = {**TAPS, "distill": {"loss": "mse", **distill}}
    marked = run_until(begin(model, inputs, make_rules(rule)), "mark")
    plans = [node.meta[TAP_PLAN] for node in marked.ir.graph.nodes if TAP_PLAN in node.meta]
    return [(plan.name.rpartition(".add")[0] or plan.name, plan.role) for plan in plans]
