"""The whole graph of a tiny vision transformer after three passes, against files kept in golden/.

After a change that is meant, write them anew and read the difference:

    GPUSQ_UPDATE_GOLDEN=1 python -m pytest tests/test_golden_graphs.py

Values are numbered in order of appearance and scaffolding of the trace is left out, so that the
files say what our passes do and little about the version of torch.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest

from gpusq_compile.compilation import Compilation
from gpusq_compile.graph.text import graph_text
from tests.compilations import begin, fork, run_until
from tests.models import Shape, TinyViT, images, seeded

GOLDEN = Path(__file__).with_name("golden")
UPDATE = "GPUSQ_UPDATE_GOLDEN"
# Nodes that only carry the dynamic batch size around; torch words them differently over time.
SIZES = re.compile(r"^%\w+ = (aten\.sym_size|sym_|_operator|mul\b|floordiv)")


def stable(text: str) -> str:
    """`text` with values numbered and size arithmetic left out."""
    lines = [line for line in text.splitlines() if not SIZES.match(line)]
    numbers: dict[str, str] = {}
    known = {match.group(1) for line in lines if (match := re.match(r"%(\w+) =", line))}

    def number(match: re.Match[str]) -> str:
        name = match.group(1)
        return numbers.setdefault(name, f"%{len(numbers)}") if name in known else "%batch"

    return "\n".join(re.sub(r"%(\w+)", number, line) for line in lines) + "\n"


@pytest.fixture(scope="module")
def marked() -> Compilation:
    return run_until(begin(seeded(TinyViT, Shape(depth=1)), images(2), "int8"), "mark")


@pytest.mark.parametrize("step", ["canonicalize", "quantize", "fold"])
def test_the_graph_after_a_pass_is_the_one_kept_in_golden(marked: Compilation, step: str) -> None:
    compilation = fork(marked)
    if step != "canonicalize":  # Marking writes plans and changes no operator.
        run_until(compilation, step)
    found = stable(graph_text(compilation.ir))
    file = GOLDEN / f"tiny_vit_{step}.txt"
    if os.environ.get(UPDATE):
        file.parent.mkdir(exist_ok=True)
        file.write_text(found)
    assert file.exists(), f"no {file}; write it with {UPDATE}=1"
    assert found == file.read_text(), f"{file.name} differs; {UPDATE}=1 writes it anew"
