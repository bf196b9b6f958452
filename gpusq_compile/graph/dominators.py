"""Dominators: the places that everything on the way to a node goes through."""

from __future__ import annotations

from collections.abc import Iterator

import torch.fx


class Dominators:
    """Of each node of `dependent`, which nodes all paths to it from the graph's inputs share.

    Built in one sweep over the graph, whose order is topological, as in Cooper, Harvey and Kennedy,
    "A Simple, Fast Dominance Algorithm" (2001), for a graph without cycles.
    """

    def __init__(self, graph: torch.fx.Graph, dependent: set[torch.fx.Node]) -> None:
        self._above: dict[torch.fx.Node, torch.fx.Node | None] = {}
        self._depth: dict[torch.fx.Node | None, int] = {None: 0}
        for node in graph.nodes:
            if node not in dependent:
                continue
            sources = [source for source in node.all_input_nodes if source in dependent]
            above: torch.fx.Node | None = sources[0] if sources else None
            for source in sources[1:]:
                above = self._common(above, source)
            self._above[node] = above
            self._depth[node] = self._depth[above] + 1

    def of(self, node: torch.fx.Node) -> Iterator[torch.fx.Node]:
        """The nodes that every path to `node` goes through, the nearest first."""
        above = self._above.get(node)
        while above is not None:
            yield above
            above = self._above[above]

    def _common(
        self, first: torch.fx.Node | None, second: torch.fx.Node | None
    ) -> torch.fx.Node | None:
        while first is not second:
            if self._depth[first] < self._depth[second]:
                first, second = second, first
            assert first is not None
            first = self._above[first]
        return first
