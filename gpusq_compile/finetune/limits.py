"""The limits of a phase beside its budget: a loss that is low enough, or improves no more."""

from __future__ import annotations

from gpusq_compile.language.training import Phase

SMOOTHING = 0.95
"""Weight of the past in the smoothed loss that thresholds and plateaus are judged by."""
MIN_IMPROVEMENT = 1e-3
"""Relative improvement of the smoothed loss that counts against a plateau."""


class Limits:
    """Whether the smoothed loss met the threshold or stopped improving."""

    def __init__(self, phase: Phase) -> None:
        self.threshold = phase.threshold
        self.patience = phase.patience
        self.smoothed: float | None = None
        self.best: float | None = None
        self.waited = 0

    def met(self, loss: float) -> str | None:
        """`threshold`, `plateau`, or None when training goes on."""
        past = loss if self.smoothed is None else self.smoothed
        self.smoothed = SMOOTHING * past + (1.0 - SMOOTHING) * loss
        if self.threshold is not None and self.smoothed <= self.threshold:
            return "threshold"
        # The user's own loss may be negative.
        if self.best is None or self.best - self.smoothed > MIN_IMPROVEMENT * abs(self.best):
            self.best = self.smoothed
            self.waited = 0
        else:
            self.waited += 1
        if self.patience is not None and self.waited >= self.patience:
            return "plateau"
        return None

    def state(self) -> dict[str, float | int | None]:
        return {"smoothed": self.smoothed, "best": self.best, "waited": self.waited}

    def restore(self, state: dict[str, float | int | None]) -> None:
        self.smoothed = state["smoothed"]
        self.best = state["best"]
        self.waited = int(state["waited"] or 0)
