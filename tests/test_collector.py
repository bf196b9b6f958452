"""The command looks for cycles rarely; a process that imports the package keeps its own ways."""

from __future__ import annotations

import subprocess
import sys

SCRIPT = """
import gc, sys
before = gc.get_threshold()
import gpusq_compile.api
from gpusq_compile.collector import collect_rarely

if sys.argv[1] == "rarely":
    collect_rarely()
print(gc.get_freeze_count() > 100_000, gc.get_threshold() == before)
"""


def frozen_and_default(how: str) -> list[str]:
    """Whether the libraries' objects are left alone, and whether the thresholds are Python's."""
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, how], capture_output=True, text=True, check=True
    )
    return done.stdout.split()


def test_the_libraries_objects_are_left_alone_once_asked_for() -> None:
    assert frozen_and_default("rarely") == ["True", "False"]


def test_the_package_changes_nothing_by_itself() -> None:
    assert frozen_and_default("never") == ["False", "True"]
