"""The remarks of the passes by kind and pass: `--remarks missed`, `--remarks all=quantize`."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from gpusq_compile.errors import InputError, did_you_mean
from gpusq_compile.report.names import listed

KINDS = ("passed", "missed", "analysis", "all")


@dataclass(frozen=True)
class Choice:
    """Which remarks to show: those of a kind (`all`: of every kind) of one pass, or of any."""

    kind: str
    step: str | None = None

    def holds(self, step: str, remark: Mapping[str, Any]) -> bool:
        return self.kind in ("all", remark["kind"]) and self.step in (None, step)


def parse_choice(text: str, passes: Collection[str]) -> Choice:
    """`KIND` or `KIND=PASS`.

    Raises:
        InputError: there is no such kind, or no such pass.
    """
    kind, equals, step = text.partition("=")
    if kind not in KINDS:
        raise InputError(
            "unknown-remarks",
            f"--remarks {text}: no remark is '{kind}'",
            hint=f"{did_you_mean(kind, KINDS)}; KIND=PASS shows those of one pass",
        )
    if equals and step not in passes:
        raise InputError(
            "unknown-pass", f"--remarks {text}: no pass '{step}'", hint=did_you_mean(step, passes)
        )
    return Choice(kind, step if equals else None)


def chosen(report: Mapping[str, Any], choice: Choice) -> list[dict[str, Any]]:
    """The remarks that were chosen, each with its pass, in the order of the passes."""
    return [
        {"pass": step["name"], **remark}
        for step in report["passes"]
        for remark in step["remarks"]
        if choice.holds(step["name"], remark)
    ]


def remark_lines(report: Mapping[str, Any], choice: Choice) -> list[str]:
    """`PASS: KIND [CODE]: LAYERS: REASON`; one reason on several layers once."""
    layers: dict[tuple[str, str, str, str], list[str]] = {}
    for remark in chosen(report, choice):
        key = (remark["pass"], remark["kind"], remark["code"], remark["reason"])
        layers.setdefault(key, []).extend([remark["layer"]] if remark["layer"] else [])
    lines = []
    for (step, kind, code, reason), names in layers.items():
        where = f"{len(names)} layers, {listed(names)}" if len(names) > 1 else "".join(names)
        lines.append(f"{step}: {kind} [{code}]: {where + ': ' if where else ''}{reason}")
    if not lines:
        of = f" of pass '{choice.step}'" if choice.step else ""
        kind = "" if choice.kind == "all" else f" '{choice.kind}'"
        lines.append(f"no remark{kind}{of}")
    return lines
