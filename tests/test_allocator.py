"""Freed memory is kept for the next operator, and given back between the passes."""

from __future__ import annotations

import subprocess
import sys

import pytest

BLOCK = 64 << 20

SCRIPT = f"""
import resource, sys
import torch
from gpusq_compile.allocator import give_back, keep_freed_memory

def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize()

if sys.argv[1] == "keep":
    keep_freed_memory()
before = resident()
block = torch.ones({BLOCK}, dtype=torch.uint8)
held = resident() - before
del block
kept = resident() - before
give_back()
print(held, kept, resident() - before)
"""


def sizes(how: str) -> list[int]:
    """Resident bytes with a large block, after it is freed, and after freed memory is given back;
    each as a difference to before."""
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, how], capture_output=True, text=True, check=True
    )
    return [int(number) for number in done.stdout.split()]


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_freed_memory_is_kept_until_it_is_given_back() -> None:
    held, kept, left = sizes("keep")
    assert held > BLOCK * 0.9
    assert kept > BLOCK * 0.9
    assert left < BLOCK * 0.5


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_without_asking_for_it_a_freed_block_leaves_the_process() -> None:
    held, kept, _ = sizes("default")
    assert held > BLOCK * 0.9
    assert kept < BLOCK * 0.5
