"""How much memory the values take that are still needed at a place of the graph."""

from __future__ import annotations

import operator
from itertools import accumulate

import torch
import torch.fx

from gpusq_compile.graph.query import traced_bytes


def live_bytes(graph: torch.fx.Graph) -> dict[torch.fx.Node, int]:
    """At each node the bytes of computed values that are needed there or after it.

    A node's inputs are needed at it, its own value is not yet there. For the batch that the graph
    was traced with; parameters and buffers do not count, and a view counts as part of what it looks
    at. So does what a pass inserted: a tap hands on what it gets, and a mask stands right before
    the reader of a parameter.

    Args:
        graph: its nodes carry shapes (`meta["val"]`), dynamic ones with the traced size.
    """
    order = {node: index for index, node in enumerate(graph.nodes)}
    base: dict[torch.fx.Node, torch.fx.Node] = {}
    last: dict[torch.fx.Node, int] = {}
    for node in graph.nodes:
        base[node] = base[node.all_input_nodes[0]] if _is_view(node) else node
        ends = max((order[user] for user in node.users), default=order[node])
        last[base[node]] = max(last.get(base[node], 0), ends)
    change = [0] * (len(order) + 1)
    for node, end in last.items():
        if node.op != "get_attr" and end > order[node]:
            change[order[node] + 1] += traced_bytes(node)
            change[end + 1] -= traced_bytes(node)
    return dict(zip(order, accumulate(change), strict=False))


def _is_view(node: torch.fx.Node) -> bool:
    """Whether its value shares the memory of its first input's, or may."""
    if not node.all_input_nodes:
        return False
    if node.op == "call_module" or node.target is operator.getitem:
        return True
    if not isinstance(node.target, torch._ops.OpOverload):
        return False
    returned = node.target._schema.returns
    return bool(returned) and returned[0].alias_info is not None
