"""Operators that write to their input (`relu_`, `x[..., :2] += y`) -> ones that return a value.

Passes move nodes, which is legal only where no operator writes. `torch.export` can rewrite a whole
program so, by tracing it a second time, which takes longer than the first. Here each such operator
is replaced where it stands: its functional form gives a new value, a write to a view becomes a
scatter into what it is a view of, and what comes after reads the new values.
"""

from __future__ import annotations

from collections import defaultdict
from itertools import pairwise
from typing import Any

import torch
import torch.fx
from torch.utils._pytree import tree_leaves

from gpusq_compile.graph.edit import insert_call, replace

aten = torch.ops.aten

WRITTEN_BACK_BY = {
    aten.slice.Tensor: aten.slice_scatter.default,
    aten.select.int: aten.select_scatter.default,
    aten.transpose.int: None,
    aten.alias.default: None,
    aten.detach.default: None,
}
"""Views, and the operator that writes a view's new value into what it is a view of."""

Storages = dict[int, list[torch.fx.Node]]


def make_functional(graph_module: torch.fx.GraphModule) -> bool:
    """Replace every operator that writes to its input; the graph computes the same.

    Returns:
        False where one writes to an input, a parameter or a buffer, has no functional form, or
        where values that share its memory in another way are read afterwards. The graph is then
        of no use, and the program has to be traced again.
    """
    graph = graph_module.graph
    sharing: Storages = defaultdict(list)
    for node in graph.nodes:
        for storage in _storages(node):
            sharing[storage].append(node)
    for node in list(graph.nodes):
        if is_write(node) and not _replace(node, sharing):
            return False
    graph.eliminate_dead_code()
    graph_module.recompile()
    return True


def is_write(node: torch.fx.Node) -> bool:
    """Whether a node's operator writes to one of its inputs."""
    return isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable


def _storages(node: torch.fx.Node) -> set[int]:
    """The memory that a node's value lies in, as it was traced."""
    leaves = tree_leaves(node.meta.get("val"))
    tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
    return {tensor.untyped_storage()._cdata for tensor in tensors}


def _replace(node: torch.fx.Node, sharing: Storages) -> bool:
    functional = _functional(node)
    written = node.args[0]
    if functional is None or not isinstance(written, torch.fx.Node):
        return False
    chain = [written]
    while chain[-1].target in WRITTEN_BACK_BY:
        parent = chain[-1].args[0]
        assert isinstance(parent, torch.fx.Node)
        chain.append(parent)
    sharers = {other for storage in _storages(node) for other in sharing[storage]}
    if any(other.op in ("placeholder", "get_attr") for other in sharers):
        return False
    others = sharers - {*chain, node}
    if any(other < node and user > node for other in others for user in other.users):
        return False
    graph = node.graph
    with graph.inserting_before(node):
        value = insert_call(graph, functional, node.args, provenance=node, kwargs=dict(node.kwargs))
        if value.meta["val"].dtype != node.meta["val"].dtype:
            return False  # What is written is cast to the type of what it is written to.
        fresh = [value]
        for child, parent in pairwise(chain):
            value = _written_back(child, parent, value)
            fresh.append(value)
    for old, new in zip(chain, fresh, strict=True):
        # Its own memory from now on, but later writes to it reach the same values as before.
        new.meta["val"] = old.meta["val"]
        for storage in _storages(old):
            sharing[storage].append(new)
        old.replace_all_uses_with(new, delete_user_cb=lambda user: user > node)
    replace(node, fresh[0])
    return True


def _functional(node: torch.fx.Node) -> Any:
    """The operator that returns what the node writes to its first input; None if there is none."""
    assert isinstance(node.target, torch._ops.OpOverload)
    schema = node.target._schema
    written = [arg for arg in schema.arguments if arg.alias_info and arg.alias_info.is_write]
    name = schema.name.split("::")[1]
    if len(written) != 1 or written[0] != schema.arguments[0] or not name.endswith("_"):
        return None
    packet = getattr(getattr(torch.ops, node.target.namespace), name.removesuffix("_"), None)
    return getattr(packet, node.target._overloadname, None)


def _written_back(
    child: torch.fx.Node, parent: torch.fx.Node, value: torch.fx.Node
) -> torch.fx.Node:
    """`parent` with the new `value` of its view `child`."""
    graph = child.graph
    if child.target is aten.transpose.int:
        return insert_call(graph, child.target, (value, *child.args[1:]), provenance=child)
    assert isinstance(child.target, torch._ops.OpOverload)
    scatter = WRITTEN_BACK_BY[child.target]
    if scatter is None:
        return value
    return insert_call(graph, scatter, (parent, value, *child.args[1:]), provenance=child)
