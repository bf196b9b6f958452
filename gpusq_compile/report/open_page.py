"""`gpusq-report DIR --open`: the page of a finished run in a browser."""

from __future__ import annotations

import json
import webbrowser
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click
from jinja2 import UndefinedError

from gpusq_compile.errors import InputError
from gpusq_compile.report.html import PAGE, write_page

EVIDENCE = "evidence.json"
PAGE_WITH_LOGS = "report-with-logs.html"
"""The page of a report to which logs were added; the run's own is what the manifest lists."""


def open_page(folder: Path, report: Mapping[str, Any]) -> Path:
    """Open the run's page, made from `report` where it is missing or logs were added to it.

    Raises:
        InputError: it cannot be written, or there is no browser.
        ValueError: the report is not as this version writes it.
    """
    path = (folder / (PAGE_WITH_LOGS if report.get("engine_logs") else PAGE)).resolve()
    if report.get("engine_logs") or not path.is_file():
        try:
            write_page(path, report, read_evidence(folder))
        except OSError as error:
            raise InputError(
                "page-not-writable", f"cannot write {path}: {error.strerror}"
            ) from None
        except UndefinedError as error:
            raise ValueError(str(error)) from None
    if not webbrowser.open(path.as_uri()):
        raise InputError("no-browser", f"no browser was found to open {path}")
    return path


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
