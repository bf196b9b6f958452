"""How often Python looks for cycles of objects that nobody needs any more.

A traced model and the libraries that trace it are millions of objects that stay until the end, and
tracing, translating and simplifying make many more at once. With Python's own thresholds each such
burst has the collector walk through all of them, up to a twelfth of the time of a compile, and
find next to nothing.

Source: the documentation of Python's module gc.
"""

from __future__ import annotations

import gc

NEW_OBJECTS = 50_000
"""Objects made, less those freed, after which the collector looks at the new ones."""

ROUNDS = 20
"""Looks at one generation after which the next older one is looked at too."""


def collect_rarely() -> None:
    """Leave what has been imported alone, and look at the rest rarely.

    For a process of one's own alone, once its libraries are imported. Where much memory hangs on
    cycles, as on an ONNX model after it was edited, the compiler collects them itself.
    """
    gc.freeze()
    gc.set_threshold(NEW_OBJECTS, ROUNDS, ROUNDS)
