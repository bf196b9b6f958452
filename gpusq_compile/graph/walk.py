"""Run a graph node by node on several batches side by side.

Passes that look at a layer's input and then change the layer (wanda, obs, gptq, reconstruction)
walk the graph once: when a node is reached, every batch's inputs of it are there, computed by the
layers before as those were left, and each value is dropped after its last use.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.fx
from torch.utils._pytree import tree_leaves

Call = tuple[tuple[Any, ...], dict[str, Any]]
"""The (args, kwargs) of one batch for the graph."""


class Walk:
    """The values of all batches at one place of the graph, moved on by `run_to`."""

    def __init__(self, graph_module: torch.fx.GraphModule, calls: Sequence[Call]) -> None:
        self.nodes = list(graph_module.graph.nodes)
        self.position = 0
        self.runs = [_Run(graph_module, call) for call in calls]
        self.last_uses = _last_uses(self.nodes)

    def inputs_of(self, node: torch.fx.Node, index: int = 0) -> list[Any]:
        """The value of argument `index` of the node, one per batch; runs all nodes before it."""
        self.run_to(node)
        argument = node.args[index]
        assert isinstance(argument, torch.fx.Node)
        return [run.env[argument] for run in self.runs]

    def values_of(self, node: torch.fx.Node) -> list[Any]:
        """The value of a node that has just been passed and is still in use, one per batch."""
        return [run.env[node] for run in self.runs]

    def replace_values(self, node: torch.fx.Node, values: Sequence[Any]) -> None:
        """Go on from other values of a node that is still in use."""
        for run, value in zip(self.runs, values, strict=True):
            run.env[node] = value

    def run_to(self, node: torch.fx.Node) -> None:
        """Run every node before `node`; `node` itself is run by the next call."""
        end = self.nodes.index(node)
        if end < self.position:
            raise ValueError(f"{node} has been passed")
        while self.position < end:
            self._step()

    def run_past(self, node: torch.fx.Node) -> None:
        """Run every node up to and including `node`."""
        self.run_to(node)
        self._step()

    def _step(self) -> None:
        node = self.nodes[self.position]
        with torch.no_grad():
            for run in self.runs:
                run.env[node] = run.run_node(node)
                for dead in self.last_uses.get(node, ()):
                    del run.env[dead]
        self.position += 1


class _Run(torch.fx.Interpreter):
    """One batch's values. Its inputs, flattened, are the placeholders in order."""

    def __init__(self, graph_module: torch.fx.GraphModule, call: Call) -> None:
        super().__init__(graph_module, garbage_collect_values=False)
        self.args_iter = iter(tree_leaves(call))


def _last_uses(nodes: Sequence[torch.fx.Node]) -> dict[torch.fx.Node, list[torch.fx.Node]]:
    """For each node the values that nothing after it reads."""
    last: dict[torch.fx.Node, torch.fx.Node] = {}
    for node in nodes:
        last[node] = node
        for source in node.all_input_nodes:
            last[source] = node
    found: dict[torch.fx.Node, list[torch.fx.Node]] = {}
    for value, user in last.items():
        found.setdefault(user, []).append(value)
    return found
