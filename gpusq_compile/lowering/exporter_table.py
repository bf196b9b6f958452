"""The ONNX exporter's table of translations, made once.

The exporter makes it for every export, reading the sources of a thousand functions, which takes it
half a second. A compile exports twice, to see early what cannot be translated.
"""

from __future__ import annotations

import contextlib
import copy
import sys
from collections.abc import Iterator
from functools import cache
from typing import Any

from torch.onnx._internal.exporter._registration import ONNXRegistry

OPSET = 21


def translations() -> ONNXRegistry:
    """The exporter's own translations for our opset; nobody may add to them."""
    return _translations("torchvision" in sys.modules)


@cache
def _translations(_: bool) -> ONNXRegistry:
    """One table with torchvision's operators and one without: those that are not there when it is
    made are left out."""
    return ONNXRegistry.from_torchlib(OPSET)


@contextlib.contextmanager
def made_once() -> Iterator[None]:
    """Let exports take copies of `translations`."""
    known, make = translations(), ONNXRegistry.from_torchlib

    def made(*args: Any, **asked: Any) -> ONNXRegistry:
        if args or asked != {"opset_version": OPSET}:
            return make(*args, **asked)
        # An export adds the translations that are its own.
        table = copy.copy(known)
        table.functions = {target: list(found) for target, found in known.functions.items()}
        return table

    own = vars(ONNXRegistry)["from_torchlib"]
    ONNXRegistry.from_torchlib = staticmethod(made)  # type: ignore[method-assign]
    try:
        yield
    finally:
        ONNXRegistry.from_torchlib = own  # type: ignore[method-assign]
