"""Gates: what must hold for exit code 0 beside the verification."""

from __future__ import annotations

import math
from dataclasses import dataclass

from gpusq_compile.compilation import Compilation
from gpusq_compile.driver import missed_remarks
from gpusq_compile.errors import CheckFailed, InputError


@dataclass(frozen=True)
class Gates:
    """What must hold for exit code 0 beside the verification.

    `max_drop` is the largest loss of top-1 from the dense model to the ONNX file, in percentage
    points; `strict` allows nothing that was asked for and not done.
    """

    max_drop: float | None = None
    strict: bool = False

    def __post_init__(self) -> None:
        if self.max_drop is not None and not 0 <= self.max_drop < math.inf:
            raise InputError(
                "max-drop",
                f"a largest drop of {self.max_drop:g}: expected percentage points of 0 or more",
            )


def no_top1(compilation: Compilation) -> str:
    """Why there is no top-1 to compare."""
    if not compilation.metrics:
        return "there is no labelled eval_data to measure it on"
    names = ", ".join(next(iter(compilation.metrics.values())))
    return (
        "eval_data has no class labels or the model no logits to measure it on; "
        f"metrics() ({names}) are reported, and no gate compares them"
    )


def check_gates(compilation: Compilation, gates: Gates) -> None:
    """Raise CheckFailed for the first gate that does not hold, with by how much."""
    accuracy = compilation.accuracy
    if gates.max_drop is not None:
        dense, final = accuracy.get("dense"), accuracy.get("onnx")
        if dense is None or final is None:
            raise CheckFailed("max-drop", f"--max-drop compares top-1, but {no_top1(compilation)}")
        drop = 100.0 * (dense - final)
        if drop > gates.max_drop:
            raise CheckFailed(
                "max-drop",
                f"top-1 fell by {drop:.2f} points, from {dense:.2%} to {final:.2%}; "
                f"the gate allows {gates.max_drop:g}",
            )
    if gates.strict and (left := missed_remarks(compilation)):
        more = f" (and {len(left) - 1} more)" if len(left) > 1 else ""
        raise CheckFailed("strict", f"{left[0]}{more}")
