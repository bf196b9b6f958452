"""Regions of a graph that PyTorch keeps as graphs of their own, put back in line."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import torch
import torch.fx
from torch.fx.node import map_arg

AUTOCAST = torch.ops.higher_order.wrap_with_autocast


def inline_disabled_autocast(graph_module: torch.fx.GraphModule) -> None:
    """Put `with torch.autocast(..., enabled=False):` in line: it changes no type here.

    A region within another one goes first. One that reads tensors or graphs of its own is left as
    it is.
    """
    for node in list(graph_module.graph.nodes):
        if node.op != "call_function" or node.target is not AUTOCAST:
            continue
        _, _, enabled, _, region, *operands = node.args
        if enabled or not isinstance(region, torch.fx.Node) or region.op != "get_attr":
            continue
        inner = graph_module.get_submodule(str(region.target))
        assert isinstance(inner, torch.fx.GraphModule)
        inline_disabled_autocast(inner)
        if not any(part.op in ("get_attr", "call_module") for part in inner.graph.nodes):
            put_in_line(node, inner.graph, operands)
            if not region.users:
                graph_module.graph.erase_node(region)


def put_in_line(
    node: torch.fx.Node, inner: torch.fx.Graph, operands: Sequence[Any]
) -> list[torch.fx.Node]:
    """Put the operators of `inner`, whose inputs are `operands`, in the place of a node.

    Returns:
        The operators as they stand there now.
    """
    values: dict[torch.fx.Node, Any] = {}
    made: list[torch.fx.Node] = []
    sources = iter(operands)
    result: Any = None
    with node.graph.inserting_before(node):
        for part in inner.nodes:
            if part.op == "placeholder":
                values[part] = next(sources)
            elif part.op == "output":
                result = map_arg(part.args[0], lambda leaf: values[leaf])
            else:
                values[part] = node.graph.node_copy(part, lambda leaf: values[leaf])
                made.append(values[part])
    if isinstance(result, torch.fx.Node):
        node.replace_all_uses_with(result)
    else:
        for user in list(node.users):
            # What has several results is read by `getitem` alone.
            assert user.target is operator.getitem
            index: Any = user.args[1]
            user.replace_all_uses_with(result[index])
            node.graph.erase_node(user)
    node.graph.erase_node(node)
    return made
