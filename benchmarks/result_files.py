"""The two files of a benchmark's results: JSON for programs, Markdown for people."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def write_results(folder: Path, name: str, results: dict[str, Any], text: str) -> None:
    """Write `name`.json and `name`.md to a folder, each whole or not at all.

    A long run writes them after every row, and may be stopped while it does.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for path, content in (
        (folder / f"{name}.json", json.dumps(results, indent=1) + "\n"),
        (folder / f"{name}.md", text),
    ):
        temporary = path.with_name(f"{path.name}.writing")
        temporary.write_text(content)
        temporary.replace(path)


def read_rows(path: Path, **about: Any) -> dict[str, Any]:
    """The results so far with their `rows`, by which a run goes on.

    Without rows where there is no such file, or where it is `about` something else: another
    version of its schema, other options.
    """
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError):
        found = {}
    if any(found.get(key) != value for key, value in about.items()):
        found = {}
    return {**about, "rows": {}, **found}
