"""What the views of the report say alike: what is unknown, and reasons with what they hold for."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from gpusq_compile.report.names import MOST_NAMES, listed

UNKNOWN = "-"
MOST_REASONS = 8


def reason_lines(said: str, reasons: Iterable[tuple[str, str]]) -> list[str]:
    """`SAID n layers: REASON` of pairs (name, reason): the most frequent first and not too many,
    with the layers' names where they are few."""
    found: dict[str, list[str]] = {}
    for name, reason in reasons:
        found.setdefault(reason, []).append(name)
    ordered = sorted(found.items(), key=lambda item: len(item[1]), reverse=True)
    lines = [f"{said} {_layers(names)}: {reason}" for reason, names in ordered]
    more = len(lines) - MOST_REASONS
    return lines[:MOST_REASONS] + ([f"... and {more} more reasons"] if more > 0 else [])


def _layers(names: Sequence[str]) -> str:
    count = f"{len(names)} {'layer' if len(names) == 1 else 'layers'}"
    return f"{count} ({listed(names)})" if len(names) <= MOST_NAMES else count
