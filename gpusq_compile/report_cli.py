"""`gpusq-report DIR`: look at a finished run."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import click
import rich.console

from gpusq_compile import __version__
from gpusq_compile.errors import GpusqError, InputError
from gpusq_compile.output import REPORT

SUPPORTED_SCHEMA = 1


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--format", "form", type=click.Choice(["text", "json"]), default="text")
@click.version_option(__version__, prog_name="gpusq-report")
def command(folder: Path, form: str) -> None:
    """Show the report of the run whose output folder is FOLDER."""
    report = read_report(folder)
    if form == "json":
        click.echo(json.dumps(report, indent=2))
        return
    from gpusq_compile.report.terminal import show_report

    console = rich.console.Console(highlight=False)
    console.print(f"{report['model']}: {report['status']}", markup=False)
    if report["error"]:
        console.print(f"{report['error']['code']}: {report['error']['message']}", markup=False)
    show_report(report, console)


def read_report(folder: Path) -> dict[str, Any]:
    """The report of an output folder.

    Raises:
        InputError: there is none, it is no JSON, or of another schema version.
    """
    path = folder / REPORT
    try:
        report = json.loads(path.read_text())
    except OSError as error:
        raise InputError(
            "no-report",
            f"cannot read {path}: {error.strerror}",
            hint="FOLDER is what gpusq-compile was given with -o",
        ) from None
    except ValueError as error:
        raise InputError("report-damaged", f"{path} is no JSON: {error}") from None
    found = report.get("schema_version") if isinstance(report, dict) else None
    if found != SUPPORTED_SCHEMA:
        raise InputError(
            "report-version", f"{path} has schema version {found}, expected {SUPPORTED_SCHEMA}"
        )
    result: dict[str, Any] = report
    return result


def main() -> None:
    try:
        command(standalone_mode=False)
    except click.UsageError as error:
        click.echo(f"error[usage]: {error.format_message()}", err=True)
        sys.exit(2)
    except click.exceptions.Exit as error:
        sys.exit(error.exit_code)
    except GpusqError as error:
        click.echo(str(error), err=True)
        sys.exit(error.exit_code)
