"""The batch sizes that an engine is built for."""

from __future__ import annotations

import math
from typing import Any

import torch.fx
from torch.utils._sympy.value_ranges import ValueRanges, bound_sympy

from gpusq_compile.engine.report import BatchRange
from gpusq_compile.errors import InputError, Location
from gpusq_compile.graph.query import shape_of

TRACED_FROM = 2
"""The least size of a dynamic dimension in a trace, whatever it may be: 0 and 1 are special."""
UNBOUNDED = 2**32
"""In place of infinity."""


def batch_range(
    graph: torch.fx.Graph, constraints: dict[Any, Any], place: Location | None = None
) -> BatchRange:
    """The default batch sizes, of those that every input's first dimension may have.

    A model that takes no batch as small as the default's largest gets an engine for its smallest.

    Args:
        constraints: the ranges of the symbols that sizes are given in, of the exported program.
        place: where the model is made.

    Source: torch.export, `Dim(name, min, max)` and dimensions derived from one, such as `2 * dim`.

    Raises:
        InputError: no size is one that all inputs may have.
    """
    taken = {
        node.name: first_sizes(shape[0].node.expr, constraints)
        for node in graph.find_nodes(op="placeholder")
        if (shape := shape_of(node)) and not isinstance(shape[0], int)
    }
    default = BatchRange()
    # Where the inputs have a size in common, the least of it is at most one period above the last
    # of the starts.
    from_some_on = max((sizes.start for sizes in taken.values()), default=default.min)
    period = math.lcm(*(sizes.step for sizes in taken.values()))
    most = max(from_some_on + period, default.max + 1)
    common = [n for n in range(1, most) if all(n in sizes for sizes in taken.values())]
    if not common:
        said = ", ".join(f"'{name}' takes {said_of(sizes)}" for name, sizes in taken.items())
        raise InputError(
            "no-batch-size",
            f"no batch is right for all inputs: {said}",
            location=place,
            hint="the first dimension of every input is the batch: give it the same Dim in all of "
            "dynamic_shapes()",
        )

    def largest(limit: int) -> int:
        return max((n for n in common if n <= limit), default=common[0])

    return BatchRange(common[0], largest(default.opt), largest(default.max))


def first_sizes(size: Any, constraints: dict[Any, Any]) -> range:
    """The values of a symbolic size: a symbol, or what is linear in one."""
    if len(size.free_symbols) == 1:
        [symbol] = size.free_symbols
        step = size.diff(symbol)
        if step.is_Integer and step > 0:
            least, most = ends(bound_sympy(symbol, constraints))
            first, last = (int(size.subs(symbol, end)) for end in (least, most))
            return range(first, last + 1, int(step))
    least, most = ends(bound_sympy(size, constraints))
    return range(least, most + 1)


def ends(bounds: ValueRanges[Any]) -> tuple[int, int]:
    """The least and the largest value."""
    least = int(bounds.lower) if bounds.lower > TRACED_FROM else 1
    return least, int(bounds.upper) if bounds.upper.is_Integer else UNBOUNDED


def said_of(sizes: range) -> str:
    """Such as "6, 9, 12, ..." or "1 to 4"."""
    if sizes.step != 1:
        return ", ".join(map(str, sizes[:3])) + (", ..." if len(sizes) > 3 else "")
    return f"{sizes[0]} or more" if sizes[-1] == UNBOUNDED else f"{sizes[0]} to {sizes[-1]}"
