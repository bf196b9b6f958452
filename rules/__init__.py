"""The rule files that come with the compiler, used by name: `--rules int8`."""

from __future__ import annotations

from pathlib import Path

FOLDER = Path(__file__).resolve().parent


def shipped_rules() -> dict[str, Path]:
    """Each shipped rules file by name: `int8`, or `folder/name` for one in a folder."""
    return {
        path.relative_to(FOLDER).with_suffix("").as_posix(): path
        for path in sorted(FOLDER.rglob("*.yaml"))
    }
