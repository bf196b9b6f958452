"""Names of layers in sentences: few in full, many with a star for what they differ in."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence

MOST_NAMES = 3
_NUMBER = re.compile(r"(?<![^.])\d+(?![^.])")


def starred(name: str) -> str:
    """The name with a star in place of each part that is a number."""
    return _NUMBER.sub("*", name)


def listed(names: Sequence[str]) -> str:
    """All of up to three names; of more those that differ in numbers alone as one."""
    if len(names) <= MOST_NAMES:
        return ", ".join(names)
    alike = Counter(starred(name) for name in names)
    shown = [name if count == 1 else f"{name} ({count})" for name, count in alike.items()]
    more = len(shown) - MOST_NAMES
    return ", ".join(shown[:MOST_NAMES]) + (f" and {more} more" if more > 0 else "")
