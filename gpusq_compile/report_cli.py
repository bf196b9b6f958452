"""`gpusq-report DIR`: look at a finished run."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import click
import rich.console

from gpusq_compile import __version__
from gpusq_compile.console import write_out
from gpusq_compile.errors import GpusqError, InputError
from gpusq_compile.output import REPORT

SUPPORTED_SCHEMA = 1
EXIT_INTERRUPTED = 130


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("folder", type=click.Path(path_type=Path))
@click.option(
    "--format", "form", type=click.Choice(["text", "json"]), default="text", show_default=True
)
@click.version_option(__version__, prog_name="gpusq-report")
def command(folder: Path, form: str) -> None:
    """Show the report of the run whose output folder is FOLDER."""
    report = read_report(folder)
    if form == "json":
        write_out(json.dumps(report, indent=2) + "\n", sys.stdout)
        return
    from gpusq_compile.report.terminal import show_report

    console = rich.console.Console(highlight=False)
    try:
        with console.capture() as shown:
            console.print(f"{report['model']}: {report['status']}", markup=False, soft_wrap=True)
            if report["error"]:
                failure = f"{report['error']['code']}: {report['error']['message']}"
                console.print(failure, markup=False, soft_wrap=True)
            show_report(report, console)
    except (LookupError, TypeError, AttributeError, ValueError) as error:
        raise InputError(
            "report-damaged",
            f"{report_file(folder)} is not as this version writes it: "
            f"{type(error).__name__}: {error}",
            hint="run gpusq-compile again, or look at the file with --format json",
        ) from None
    write_out(shown.get(), sys.stdout)


def report_file(folder: Path) -> Path:
    """The report in an output folder; a file is taken as the report itself."""
    return folder if folder.is_file() else folder / REPORT


def read_report(folder: Path) -> dict[str, Any]:
    """The report of an output folder.

    Raises:
        InputError: there is none, it is no JSON, or of another schema version.
    """
    path = report_file(folder)
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(
            "no-report",
            f"cannot read {path}: {error.strerror}",
            hint="FOLDER is what gpusq-compile was given with -o",
        ) from None
    except (ValueError, RecursionError) as error:
        raise InputError("report-damaged", f"{path} is no JSON: {error}") from None
    if not isinstance(report, dict) or "schema_version" not in report:
        raise InputError("report-damaged", f"{path} is no report of gpusq-compile")
    found = report["schema_version"]
    if found != SUPPORTED_SCHEMA:
        raise InputError(
            "report-version",
            f"{path} has schema version {found}, expected {SUPPORTED_SCHEMA}",
            hint="another version of gpusq-compile wrote it",
        )
    result: dict[str, Any] = report
    return result


def main() -> None:
    """Console entry point: errors become a message and an exit code, never a traceback."""
    try:
        command(standalone_mode=False)
    except click.exceptions.Exit as error:
        sys.exit(error.exit_code)
    except click.UsageError as error:
        fail(InputError("usage", error.format_message(), hint="gpusq-report --help"))
    except GpusqError as error:
        fail(error)
    except (KeyboardInterrupt, click.Abort):
        sys.exit(EXIT_INTERRUPTED)


def fail(error: GpusqError) -> None:
    click.echo(str(error), err=True)
    sys.exit(error.exit_code)
