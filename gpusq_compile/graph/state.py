"""Whether a graph still computes what it did."""

from __future__ import annotations

import weakref

import torch
import torch.fx

from gpusq_compile.graph.query import tensor_attribute


class GraphState:
    """What a graph computes, without its values: nodes, and which tensors at which version.

    Where it still holds, nothing was rewritten, and another run could only show the same. Called
    modules must keep what they compute with in parameters and buffers: other attributes of theirs
    are not looked at.
    """

    def __init__(self, graph_module: torch.fx.GraphModule) -> None:
        self.nodes = [(node, *_form(node)) for node in graph_module.graph.nodes]
        # A pass that replaces a tensor should be able to free it.
        self.tensors = [
            (name, weakref.ref(tensor), tensor._version)
            for name, tensor in _tensors(graph_module).items()
        ]

    def holds(self, graph_module: torch.fx.GraphModule) -> bool:
        now = _tensors(graph_module)
        return (
            self.nodes == [(node, *_form(node)) for node in graph_module.graph.nodes]
            and [name for name, _, _ in self.tensors] == list(now)
            and all(
                old() is now[name] and now[name]._version == version
                for name, old, version in self.tensors
            )
        )


def _form(node: torch.fx.Node) -> tuple[object, ...]:
    return node.op, node.target, node.args, node.kwargs


def _tensors(graph_module: torch.fx.GraphModule) -> dict[str, torch.Tensor]:
    """All tensors that the graph reads: parameters, buffers, and plain attributes."""
    found = {
        str(node.target): tensor_attribute(graph_module, str(node.target))
        for node in graph_module.graph.nodes
        if node.op == "get_attr"
    }
    return found | dict(graph_module.named_parameters()) | dict(graph_module.named_buffers())
