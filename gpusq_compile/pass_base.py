"""What a pass is: its promises, its function and its result."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from gpusq_compile.remarks import Remark

if TYPE_CHECKING:
    from gpusq_compile.compilation import Compilation


@dataclass
class PassResult:
    """What one run of a pass did.

    `matched` counts the places that the pass looked at because they were asked for, `changed`
    those it rewrote, `skipped` those it left, each with a remark that says why.
    """

    matched: int = 0
    changed: int = 0
    skipped: int = 0
    remarks: list[Remark] = field(default_factory=list)


@dataclass(frozen=True)
class Pass:
    """One step of the compiler.

    `requires` and `ensures` name facts about the compilation; the driver refuses to run a pass
    whose requirements no earlier pass has ensured. `preserves` is the largest relative change of
    the graph's outputs that a pass which claims to keep the function may cause; None for a pass
    that changes the function on purpose (its change is measured and reported). `removes` names
    facts that no longer hold afterwards. `forbids` maps facts that must not hold yet to the reason.
    `rewrites_onnx` says that it works on the ONNX model, which is checked and compared after it.
    """

    name: str
    summary: str
    run: Callable[[Compilation], PassResult]
    requires: tuple[str, ...] = ()
    ensures: tuple[str, ...] = ()
    removes: tuple[str, ...] = ()
    forbids: Mapping[str, str] = field(default_factory=dict)
    preserves: float | None = None
    rewrites_onnx: bool = False
