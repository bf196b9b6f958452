"""Run a graph node by node on several batches side by side.

Passes that look at a layer's input and then change the layer (wanda, obs, gptq, reconstruction)
walk the graph once: when a node is reached, every batch's inputs of it are there, computed by the
layers before as those were left, and each value is dropped after its last use.
"""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
import torch.fx
from torch.fx._pytree import tree_flatten_spec
from torch.utils._pytree import tree_leaves

Call = tuple[tuple[Any, ...], dict[str, Any]]
"""The (args, kwargs) of one batch for the graph."""


class Walk:
    """The values of all batches at one place of the graph, moved on by `run_to`.

    Between two moves a pass may change or replace any parameter or buffer, and insert nodes behind
    the last one that has been run.

    Where the values of all batches are too many to hold, the later ones may wait for a place where
    they are fewer: `started` says how many have set out, and `start` sends more after them. They
    meet the layers before as those are by then.
    """

    def __init__(
        self, graph_module: torch.fx.GraphModule, calls: Sequence[Call], started: int | None = None
    ) -> None:
        self.graph = graph_module.graph
        self.last: torch.fx.Node | None = None
        runs = [_Run(graph_module, call) for call in calls]
        self.runs, self.waiting = runs[:started], deque(runs[len(runs[:started]) :])

    def start(self, count: int) -> None:
        """Let the first `count` batches run; as many as already do go on in any case."""
        while self.waiting and len(self.runs) < count:
            run = self.waiting.popleft()
            if self.last is not None:
                run.run_nodes(self._between(None, self.last))
            self.runs.append(run)

    def inputs_of(self, node: torch.fx.Node, index: int = 0) -> list[Any]:
        """The value of argument `index` of the node, one per batch; runs all nodes before it."""
        self.run_to(node)
        argument = node.args[index]
        assert isinstance(argument, torch.fx.Node)
        return self.values_of(argument)

    def values_of(self, node: torch.fx.Node) -> list[Any]:
        """The value of a node that has been passed and is still in use, one per batch."""
        return [run.value_of(node) for run in self.runs]

    def replace_values(self, node: torch.fx.Node, values: Sequence[Any]) -> None:
        """Go on from other values of a node that is still in use, or not run yet.

        Of a constant they count instead of what the graph module holds.
        """
        for run, value in zip(self.runs, values, strict=True):
            run.env[node] = value

    def run_to(self, node: torch.fx.Node) -> None:
        """Run every node before `node`; `node` itself is run by the next call.

        Raises:
            ValueError: the node has been passed.
        """
        self._check_ahead(node)
        self._run(node.prev)

    def run_past(self, node: torch.fx.Node) -> None:
        """Run every node up to and including `node`.

        Raises:
            ValueError: the node has been passed.
        """
        self._check_ahead(node)
        self._run(node)

    def has_passed(self, node: torch.fx.Node) -> bool:
        return self.last is not None and node <= self.last

    def _check_ahead(self, node: torch.fx.Node) -> None:
        if self.has_passed(node):
            raise ValueError(f"{node} has been passed")

    def _run(self, end: torch.fx.Node) -> None:
        """Run up to and including `end`, one batch after the other.

        So only one batch at a time holds the values in between.
        """
        nodes = self._between(self.last, end)
        for run in self.runs:
            run.run_nodes(nodes)
        if nodes:
            self.last = nodes[-1]

    def _between(self, last: torch.fx.Node | None, end: torch.fx.Node) -> list[torch.fx.Node]:
        """The nodes after `last`, from the first one on where it is None, up to `end`."""
        nodes = []
        node = next(iter(self.graph.nodes)) if last is None else last.next
        while node <= end and node.op != "root":
            nodes.append(node)
            node = node.next
        return nodes


class _Run(torch.fx.Interpreter):
    """The values of one batch.

    What `get_attr` nodes read is looked up at each use: they stand at the top of the graph, and by
    the time that a layer is reached its weight may be another. What is computed of them alone for
    one reader, as a masked weight, is computed there, too: each batch would hold its own meanwhile.
    """

    def __init__(self, graph_module: torch.fx.GraphModule, call: Call) -> None:
        super().__init__(graph_module, garbage_collect_values=False)
        self.args_iter = _handed_over(deque(flat_inputs(graph_module, call)))
        self.at_use: set[torch.fx.Node] = set()

    def value_of(self, node: torch.fx.Node) -> Any:
        with self._read([node]):
            return self.env[node]

    def run_nodes(self, nodes: Iterable[torch.fx.Node]) -> None:
        with torch.no_grad():
            for node in nodes:
                self.step(node)

    def step(self, node: torch.fx.Node) -> None:
        if node in self.env:
            self._drop_used({node, *node.all_input_nodes}, node)
        elif len(node.users) == 1 and self._reads_constants(node):
            self.at_use.add(node)
        elif node.op != "get_attr":
            with self._read(node.all_input_nodes) as read:
                self.env[node] = self.run_node(node)
            self._drop_used({node, *node.all_input_nodes} - read, node)

    def _reads_constants(self, node: torch.fx.Node) -> bool:
        return bool(node.all_input_nodes) and all(map(self._is_at_hand, node.all_input_nodes))

    def _is_at_hand(self, node: torch.fx.Node) -> bool:
        return node.op == "get_attr" or node in self.at_use

    @contextlib.contextmanager
    def _read(self, nodes: Sequence[torch.fx.Node]) -> Iterator[set[torch.fx.Node]]:
        """Have the values of constants at hand; yields those that are not held otherwise."""
        read = [node for node in nodes if node not in self.env]
        for node in read:
            if not self._is_at_hand(node):
                raise KeyError(f"the value of {node} is not held any more")
            with self._read(node.all_input_nodes):
                self.env[node] = self.run_node(node)
        yield set(read)
        for node in read:
            del self.env[node]

    def _drop_used(self, nodes: Iterable[torch.fx.Node], last: torch.fx.Node) -> None:
        """Drop the values of those that nothing behind `last` reads."""
        for node in nodes:
            if all(user <= last for user in node.users):
                self.env.pop(node, None)


def _handed_over(values: deque[Any]) -> Iterator[Any]:
    """Each value is let go as it is read."""
    while values:
        yield values.popleft()


def flat_inputs(graph_module: torch.fx.GraphModule, call: Call) -> list[Any]:
    """The inputs in the order of the graph's placeholders, however the keywords are ordered."""
    information = getattr(graph_module.graph._codegen, "pytree_info", None)
    if information is None:
        return tree_leaves(call)
    return tree_flatten_spec(call, information.in_spec)
