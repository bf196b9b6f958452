"""What the views of the report say alike: what is unknown, and reasons with how often they hold."""

from __future__ import annotations

from collections import Counter

UNKNOWN = "-"
MOST_REASONS = 8


def reason_lines(said: str, reasons: Counter[str]) -> list[str]:
    """`SAID n layers: REASON` for each reason, the most frequent first and not too many."""
    lines = [
        f"{said} {count} {'layer' if count == 1 else 'layers'}: {reason}"
        for reason, count in reasons.most_common()
    ]
    more = len(lines) - MOST_REASONS
    return lines[:MOST_REASONS] + ([f"... and {more} more reasons"] if more > 0 else [])
