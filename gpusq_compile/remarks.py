"""Remarks: what a pass did, what it could not do, and what it measured."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class Kind(StrEnum):
    """As in LLVM's optimization remarks: done, asked for but not done, or merely noted."""

    PASSED = "passed"
    MISSED = "missed"
    ANALYSIS = "analysis"


@dataclass(frozen=True)
class Remark:
    """One remark of a pass. `code` is a stable kebab-case name, `layer` the layer or None."""

    kind: Kind
    code: str
    reason: str
    layer: str | None = None

    def as_dict(self) -> dict[str, str | None]:
        return {
            "kind": self.kind.value,
            "code": self.code,
            "layer": self.layer,
            "reason": self.reason,
        }


def passed(code: str, reason: str, layer: str | None = None) -> Remark:
    return Remark(Kind.PASSED, code, reason, layer)


def missed(code: str, reason: str, layer: str | None = None) -> Remark:
    return Remark(Kind.MISSED, code, reason, layer)


def analysis(code: str, reason: str, layer: str | None = None) -> Remark:
    return Remark(Kind.ANALYSIS, code, reason, layer)
