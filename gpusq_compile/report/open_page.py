"""`gpusq-report DIR --open` and `--page FILE`: the page of a finished run, or of two beside."""

from __future__ import annotations

import json
import webbrowser
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click
from jinja2 import UndefinedError

from gpusq_compile.errors import InputError
from gpusq_compile.report.beside import Run, beside_page
from gpusq_compile.report.html import PAGE, run_page, write_whole

Report = Mapping[str, Any]

EVIDENCE = "evidence.json"
PAGE_WITH_LOGS = "report-with-logs.html"
"""The page of a report to which logs were added; the run's own is what the manifest lists."""


def make_page(
    first: tuple[Path, Report], second: tuple[Path, Report] | None = None, file: Path | None = None
) -> Path:
    """Write the page of a run, or of two beside each other, and say where it stands.

    Args:
        first, second: the output folder of each run, and its report.
        file: where to write; None stands for a name beside the first report. There the page that
            the run itself wrote is left as it is, unless logs were added to its report.

    Raises:
        InputError: the page cannot be written.
        ValueError, LookupError, TypeError, AttributeError: a report is not as this version writes.
    """
    folder, report = first
    logs = bool(report.get("engine_logs"))
    name = PAGE_WITH_LOGS if logs else PAGE
    if second is not None:
        name = f"report-beside-{second[0].resolve().name}.html"
    path = (file or folder / name).resolve()
    if file is None and second is None and not logs and path.is_file():
        return path
    runs = [Run(*run, read_evidence(run[0])) for run in (first, second) if run]
    try:
        text = beside_page(*runs) if len(runs) > 1 else run_page(report, runs[0].evidence)
    except UndefinedError as error:
        raise ValueError(str(error)) from None
    try:
        write_whole(path, text)
    except OSError as error:
        raise InputError("page-not-writable", f"cannot write {path}: {error.strerror}") from None
    return path


def show_page(path: Path) -> None:
    """Open a page in a browser.

    Raises:
        InputError: there is none.
    """
    if not webbrowser.open(path.as_uri()):
        raise InputError("no-browser", f"no browser was found to open {path}")


def read_evidence(folder: Path) -> dict[str, Any] | None:
    """The content of evidence.json; None, with a warning, where it is missing or damaged."""
    path = folder / EVIDENCE
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except OSError:
        click.echo(f"warning[no-evidence]: {path} is missing: no errors, maps or masks", err=True)
        return None
    except (ValueError, RecursionError) as error:
        click.echo(f"warning[evidence-damaged]: {path} is no JSON: {error}", err=True)
        return None
    if not isinstance(found, dict) or found.get("schema_version") != 1:
        click.echo(f"warning[evidence-damaged]: {path} is of another version", err=True)
        return None
    return found
