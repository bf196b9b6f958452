"""Layers that compute the same twice, as where a model calls a module again on the same input.

The exporter computes equal operators once. A layer that went so would have a plan and no GEMM, so
equal layers become one here, before there are plans.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.fx

from gpusq_compile.graph.edit import replace
from gpusq_compile.graph.query import is_weighted, module_path, weight_source


def merge_equal_layers(graph_module: torch.fx.GraphModule) -> list[str]:
    """Let a linear or a convolution that equals an earlier one, and all that is equal behind it, be
    computed once.

    Returns:
        The names of the layers that are computed once less; where there is none, nothing was
        changed.
    """
    firsts = _firsts(graph_module.graph)
    merged = [
        _name(node) for node, first in firsts.items() if is_weighted(node) and node is not first
    ]
    for node, first in firsts.items() if merged else ():
        if node is not first:
            replace(node, first)
    return merged


def _name(node: torch.fx.Node) -> str:
    weight = weight_source(node)
    return module_path(node) if weight is None else str(weight.target).removesuffix(".weight")


def _firsts(graph: torch.fx.Graph) -> dict[torch.fx.Node, torch.fx.Node]:
    """For each operator the first one of the graph that gives the same value: mostly itself."""
    known: dict[object, torch.fx.Node] = {}
    first: dict[torch.fx.Node, torch.fx.Node] = {}
    for node in graph.nodes:
        key: object = node
        if node.op == "get_attr":
            key = (node.op, node.target)
        elif node.op == "call_function" and not _is_random(node):
            key = (node.op, node.target, _frozen(node.args, first), _frozen(node.kwargs, first))
        first[node] = known.setdefault(key, node)
    return first


def _is_random(node: torch.fx.Node) -> bool:
    return torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ())


def _frozen(value: Any, first: dict[torch.fx.Node, torch.fx.Node]) -> object:
    """Arguments as something to compare: equal where they are of equal types and values."""
    if isinstance(value, torch.fx.Node):
        return first[value]
    if isinstance(value, (list, tuple)):
        return tuple(_frozen(item, first) for item in value)
    if isinstance(value, dict):
        return tuple((name, _frozen(item, first)) for name, item in sorted(value.items()))
    if isinstance(value, slice):
        return ("slice", *(_frozen(item, first) for item in (value.start, value.stop, value.step)))
    # 1, 1.0 and True are equal, and mean different types of results.
    return type(value).__name__, repr(value) if isinstance(value, float) else value
