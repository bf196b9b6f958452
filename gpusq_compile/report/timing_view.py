"""Where the time of a compile went."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.table import Table

BAR = 24
"""Characters of the longest bar."""


def timing_entries(report: Mapping[str, Any]) -> list[tuple[str, float]]:
    """Seconds of each pass, the longest first, then of everything between the passes: loading,
    evaluation, the report itself."""
    entries = [(step["name"], step["seconds"]) for step in report["passes"]]
    entries.sort(key=lambda entry: entry[1], reverse=True)
    total = report.get("seconds")
    if total is not None:
        entries.append(("between the passes", max(0.0, total - sum(s for _, s in entries))))
    return entries


def timing_table(report: Mapping[str, Any]) -> Table:
    entries = timing_entries(report)
    total = sum(seconds for _, seconds in entries) or 1.0
    longest = max((seconds for _, seconds in entries), default=0.0) or 1.0
    table = Table(title="time", title_justify="left")
    table.add_column("pass")
    table.add_column("seconds", justify="right")
    table.add_column("share", justify="right")
    table.add_column("", no_wrap=True)
    for name, seconds in entries:
        bar = "#" * round(BAR * seconds / longest)
        table.add_row(name, f"{seconds:.2f}", f"{seconds / total:.1%}", bar)
    table.add_section()
    table.add_row("all", f"{total:.2f}", "", "")
    return table


def rate_lines(report: Mapping[str, Any]) -> list[str]:
    """What a step of each phase of the fine-tune took."""
    return [
        f"fine-tune {name}: {1000 * phase['seconds'] / phase['steps']:.0f} ms a step, "
        f"{phase['images'] / phase['seconds']:.0f} images a second"
        for name, phase in report["finetune"].items()
        if phase["steps"] and phase["seconds"]
    ]
