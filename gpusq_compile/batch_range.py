"""The batch sizes that an engine is built for."""

from __future__ import annotations

from typing import Any

import torch.fx
from torch.utils._sympy.value_ranges import bound_sympy

from gpusq_compile.engine.report import BatchRange
from gpusq_compile.graph.query import shape_of

TRACED_FROM = 2
"""The least size of a dynamic dimension in a trace, whatever it may be: 0 and 1 are special."""


def batch_range(graph: torch.fx.Graph, constraints: dict[Any, Any]) -> BatchRange:
    """The default batch sizes, within the limits of the inputs' first dimensions.

    A model that takes no batch as small as the default's largest gets an engine for its smallest.

    Args:
        constraints: the ranges of the symbols that sizes are given in, of the exported program.

    Source: torch.export, `Dim(name, min, max)`.
    """
    default = BatchRange()
    low, high = default.min, None
    for node in graph.find_nodes(op="placeholder"):
        sizes = shape_of(node)
        if not sizes or isinstance(sizes[0], int):
            continue
        bounds = bound_sympy(sizes[0].node.expr, constraints)
        if bounds.lower > TRACED_FROM:
            low = max(low, int(bounds.lower))
        if bounds.upper.is_Integer:
            high = min(int(bounds.upper), high or int(bounds.upper))
    most = max(low, default.max)
    most = most if high is None else min(most, high)
    return BatchRange(low, max(low, min(default.opt, most)), most)
