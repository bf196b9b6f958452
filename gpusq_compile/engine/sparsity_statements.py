"""The builder's two statements on sparse kernels: which layers were eligible, which it picked.

TensorRT 8 lists names, TensorRT 10 counts, and some of its versions list names after the count.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

ELIGIBLE = (
    re.compile(r"\(Sparsity\) Layers eligible for sparse math:(?P<names>.*)$"),
    re.compile(
        r"\(Sparsity\) Found (?P<count>\d+) layer\(s\) eligible to use sparse tactics"
        r"(?::(?P<names>.*))?$"
    ),
)
PICKED = (
    re.compile(
        r"\(Sparsity\) TRT inference plan picked sparse implementation for layers:(?P<names>.*)$"
    ),
    re.compile(
        r"\(Sparsity\) Chose (?P<count>\d+) layer\(s\) using sparse tactics(?::(?P<names>.*))?$"
    ),
)


@dataclass(frozen=True)
class SparsityNames:
    """One of the builder's two sparsity statements: how many layers, and which where it says."""

    count: int
    names: tuple[str, ...] | None


def read_statement(line: str, patterns: Sequence[re.Pattern[str]]) -> SparsityNames | None:
    """The statement of a line in one of the forms of `patterns`, None where it is none."""
    for pattern in patterns:
        if match := pattern.search(line):
            groups = match.groupdict()
            listed = groups["names"]
            names = None
            if listed is not None:
                names = tuple(n.strip() for n in listed.split(", ") if n.strip())
            count = groups.get("count")
            return SparsityNames(int(count) if count is not None else len(names or ()), names)
    return None
