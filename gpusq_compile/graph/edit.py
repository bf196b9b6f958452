"""Editing the IR: insert submodule calls and operators, and keep each node's shape metadata."""

from __future__ import annotations

from typing import Any

import torch
import torch.fx
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

NAMESPACE = "gpusq"
"""Submodules that passes add live under this attribute, apart from the user's own names."""

_PROVENANCE = ("nn_module_stack", "stack_trace", "source_fn_stack")


def inserted_path(kind: str, layer: str) -> str:
    """The dotted path of an inserted submodule, e.g. `gpusq.mask.blocks_0_attn_qkv`."""
    safe = "".join(char if char.isalnum() else "_" for char in layer)
    return f"{NAMESPACE}.{kind}.{safe}"


def fake_mode_of(graph: torch.fx.Graph) -> FakeTensorMode:
    """The fake-tensor mode the graph was traced in; shapes of new nodes are computed in it."""
    for node in graph.nodes:
        value = node.meta.get("val")
        if isinstance(value, FakeTensor):
            return value.fake_mode
    raise ValueError("the graph carries no shape metadata")


def insert_module_call(
    graph_module: torch.fx.GraphModule,
    path: str,
    module: torch.nn.Module,
    value: torch.fx.Node,
    before: torch.fx.Node | None = None,
) -> torch.fx.Node:
    """Add `module` under `path` and a node that calls it on `value`.

    The node goes right after `value`, or right before the node `before`: what is computed from a
    weight belongs next to its user, or a forward pass holds all of them at once. The module must
    keep shape and dtype (masks, fake-quantizers, taps do). Users of `value` are not rewired: the
    caller decides which of them see the new node.
    """
    while has_submodule(graph_module, path):
        path += "_"  # Different layers may have one safe name: a.b_c and a_b.c.
    if not graph_module.add_submodule(path, module):
        raise ValueError(f"cannot add a submodule at {path}")
    graph = graph_module.graph
    with graph.inserting_before(before) if before else graph.inserting_after(value):
        node = graph_module.graph.call_module(path, (value,))
    node.meta["val"] = value.meta.get("val")
    copy_provenance(value, node)
    return node


def has_submodule(graph_module: torch.fx.GraphModule, path: str) -> bool:
    try:
        graph_module.get_submodule(path)
    except AttributeError:
        return False
    return True


def insert_behind(
    graph_module: torch.fx.GraphModule,
    path: str,
    module: torch.nn.Module,
    value: torch.fx.Node,
) -> torch.fx.Node:
    """Like `insert_module_call`, and every user of `value` reads the new node instead."""
    node = insert_module_call(graph_module, path, module, value)

    def reads_old(user: torch.fx.Node) -> bool:
        return user is not node

    value.replace_all_uses_with(node, delete_user_cb=reads_old)
    return node


def bypass(node: torch.fx.Node) -> None:
    """Remove a node, its users reading its first input instead."""
    source = node.args[0]
    assert isinstance(source, torch.fx.Node)
    replace(node, source)


def replace(node: torch.fx.Node, value: torch.fx.Node) -> None:
    """Let the users of a node read `value`, and remove the node."""
    node.replace_all_uses_with(value)
    node.graph.erase_node(node)


def insert_call(
    graph: torch.fx.Graph,
    target: Any,
    args: tuple[Any, ...],
    *,
    provenance: torch.fx.Node,
    kwargs: dict[str, Any] | None = None,
) -> torch.fx.Node:
    """Add a `call_function` node at the graph's insertion point, with its shape computed."""
    node = graph.call_function(target, args, kwargs)
    copy_provenance(provenance, node)
    compute_val(graph, node)
    return node


def compute_val(graph: torch.fx.Graph, node: torch.fx.Node) -> None:
    """Set `node.meta["val"]` by running its operator on the fake values of its inputs."""
    args, kwargs = torch.fx.node.map_arg(
        (node.args, node.kwargs), lambda argument: argument.meta["val"]
    )
    with fake_mode_of(graph):
        node.meta["val"] = node.target(*args, **kwargs)  # type: ignore[operator]


def insert_get_attr(
    graph_module: torch.fx.GraphModule, path: str, *, provenance: torch.fx.Node
) -> torch.fx.Node:
    """Add a `get_attr` node at the graph's insertion point."""
    graph = graph_module.graph
    node = graph.get_attr(path)
    copy_provenance(provenance, node)
    parent, _, leaf = path.rpartition(".")
    value = getattr(graph_module.get_submodule(parent), leaf)
    node.meta["val"] = fake_mode_of(graph).from_tensor(value.detach(), static_shapes=True)
    return node


def copy_provenance(source: torch.fx.Node, target: torch.fx.Node) -> None:
    for key in _PROVENANCE:
        if key in source.meta:
            target.meta[key] = source.meta[key]


def set_tensor(
    graph_module: torch.fx.GraphModule, path: str, value: torch.Tensor, *, trainable: bool
) -> None:
    """Replace (or add) the tensor at `path`, as a parameter or a buffer."""
    parent, _, leaf = path.rpartition(".")
    owner = graph_module.get_submodule(parent)
    if hasattr(owner, leaf):
        delattr(owner, leaf)
    if trainable:
        owner.register_parameter(leaf, torch.nn.Parameter(value))
    else:
        owner.register_buffer(leaf, value)


def store_buffer(graph_module: torch.fx.GraphModule, path: str, value: torch.Tensor) -> None:
    """Store a tensor at a new `path`, with the modules that it names."""
    owner, _, leaf = path.rpartition(".")
    if not has_submodule(graph_module, owner):
        graph_module.add_submodule(owner, torch.nn.Module())
    graph_module.get_submodule(owner).register_buffer(leaf, value)


def remove_tensor(graph_module: torch.fx.GraphModule, path: str) -> None:
    """Remove the parameter or buffer at `path`, which no node reads any more."""
    owner, _, leaf = path.rpartition(".")
    delattr(graph_module.get_submodule(owner), leaf)


def finish(graph_module: torch.fx.GraphModule) -> None:
    """Drop dead nodes and unused submodules, check the graph and rebuild its code."""
    graph_module.graph.eliminate_dead_code()
    graph_module.delete_all_unused_submodules()
    graph_module.graph.lint()
    graph_module.recompile()
