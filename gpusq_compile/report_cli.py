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
from gpusq_compile.errors import CheckFailed, GpusqError, InputError
from gpusq_compile.gates import Gates, check_gates
from gpusq_compile.output import REPORT
from gpusq_compile.questions import (
    Questions,
    answers,
    explain_option,
    gate_options,
    print_lines,
    question_options,
    show_answers,
)
from gpusq_compile.report.annotations import error_annotations, report_annotations
from gpusq_compile.report.compare import compare, comparison_lines
from gpusq_compile.report.remarks_view import parse_choice
from gpusq_compile.report.schema import SCHEMA_PATH

SUPPORTED_SCHEMA = 1
EXIT_INTERRUPTED = 130
DAMAGE = (LookupError, TypeError, AttributeError, ValueError)
"""What a report raises that is not as this version writes it."""


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("folder", type=click.Path(path_type=Path), required=False)
@click.option(
    "--diff",
    "other",
    type=click.Path(path_type=Path),
    metavar="FOLDER2",
    help="What changed from the run in FOLDER to the one in FOLDER2. With --open or --page one "
    "page shows both, their activation maps side by side.",
)
@click.option(
    "--log",
    "logs",
    multiple=True,
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="What trtexec printed when it built the engine elsewhere, or its --exportLayerInfo. Those "
    "in FOLDER/engine are read anyway.",
)
@question_options
@gate_options
@explain_option
@click.option("--schema", is_flag=True, help="Print the JSON schema of report.json.")
@click.option(
    "--format",
    "form",
    type=click.Choice(["text", "json", "github"]),
    default="text",
    show_default=True,
    help="json prints the report, or the answer, as data; github annotations.",
)
@click.option(
    "--open",
    "opens",
    is_flag=True,
    help="Open the page of the run in a browser. It is made again where it is missing, or where "
    "logs say more.",
)
@click.option(
    "--page",
    "file",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Write the page to FILE, such as both.html. Without --open no browser is needed.",
)
@click.version_option(__version__, prog_name="gpusq-report")
def command(folder: Path | None, logs: tuple[Path, ...], form: str, **options: Any) -> None:
    """Show the report of the run whose output folder is FOLDER, or ask it a question.

    With the logs of an engine that build_engine.sh built, it says which layers got sparse kernels,
    and why others got none. report.json stays as it is. Exit code 1 where a gate does not hold.
    """
    if options["schema"]:
        write_out(SCHEMA_PATH.read_text(encoding="utf-8"), sys.stdout)
        return
    if folder is None:
        raise click.UsageError("Missing argument 'FOLDER'.")
    check_together(form, options)
    gates = Gates(options["max_drop"], options["strict"], options["require_sparse"])
    report = add_logs(read_report(folder), folder, logs)
    try:
        if options["opens"] or options["file"]:
            text = paged(report, folder, form, options)
        else:
            text = answer(report, folder, form, options)
    except DAMAGE as error:
        raise damaged(folder, error) from None
    write_out(text, sys.stdout)
    try:
        check_gates(report, gates)
    except DAMAGE as error:
        raise damaged(folder, error) from None
    except CheckFailed as failed:
        if form == "github":
            write_out("\n".join(error_annotations(failed)) + "\n", sys.stdout)
        raise


def check_together(form: str, options: dict[str, Any]) -> None:
    """Refuse what would be left undone of two things that were asked for at once.

    Raises:
        click.UsageError: naming both.
    """
    asks = bool(options["why"] or options["remarks"] or options["timing"])
    if (options["opens"] or options["file"]) and (form != "text" or asks):
        raise click.UsageError(
            "--open and --page are of the whole run: they go with none of --format, --why, "
            "--remarks and --timing."
        )
    if options["other"] and asks:
        raise click.UsageError(
            "--diff compares whole runs: it goes with none of --why, --remarks and --timing."
        )
    if form == "github" and (options["other"] or asks):
        raise click.UsageError(
            "--format github is of one whole run: it goes with none of --diff, --why, --remarks "
            "and --timing."
        )


def answer(report: dict[str, Any], folder: Path, form: str, options: dict[str, Any]) -> str:
    """What was asked of a report: the comparison, the answers, or all of it."""
    if options["other"] is not None:
        return compared(report, folder, options["other"], form)
    remarks = options["remarks"]
    passes = [step["name"] for step in report["passes"]]
    questions = Questions(
        options["why"], remarks and parse_choice(remarks, passes), options["timing"]
    )
    if form == "github":
        return "\n".join(report_annotations(report)) + "\n"
    if form == "json":
        return json.dumps(answers(report, questions) if questions else report, indent=2) + "\n"
    console = rich.console.Console(highlight=False)
    with console.capture() as shown:
        if questions:
            show_answers(report, questions, console)
        else:
            show_whole(report, console)
    return shown.get()


def show_whole(report: dict[str, Any], console: rich.console.Console) -> None:
    from gpusq_compile.report.terminal import show_report

    console.print(f"{report['model']}: {report['status']}", markup=False, soft_wrap=True)
    if report["error"]:
        failure = f"{report['error']['code']}: {report['error']['message']}"
        console.print(failure, markup=False, soft_wrap=True)
    show_report(report, console)


def paged(report: dict[str, Any], folder: Path, form: str, options: dict[str, Any]) -> str:
    """Where the page stands that was asked for; it is opened if that was asked for too."""
    from gpusq_compile.report.open_page import make_page, show_page

    second, other = None, options["other"]
    if other is not None:
        added = add_logs(read_report(other), other, ())
        check_whole((folder, report), (other, added))
        second = report_file(other).parent, added
    path = make_page((report_file(folder).parent, report), second, options["file"])
    if options["opens"]:
        show_page(path)
    return f"{path}\n"


def check_whole(*runs: tuple[Path, dict[str, Any]]) -> None:
    """Raises InputError for the first report that is not as this version writes it."""
    for path, report in runs:
        try:
            # Against nothing, so that everything in it has to be told.
            bare = {**report, "layers": [], "attentions": [], "taps": []}
            comparison_lines(compare(report, bare))
        except DAMAGE as error:
            raise damaged(path, error) from None


def compared(report: dict[str, Any], folder: Path, other: Path, form: str) -> str:
    second = add_logs(read_report(other), other, ())
    check_whole((folder, report), (other, second))
    found = compare(report, second)
    if form == "json":
        return json.dumps(found, indent=2) + "\n"
    console = rich.console.Console(highlight=False)
    with console.capture() as shown:
        print_lines(console, [f"from {folder} to {other}:", *comparison_lines(found)])
    return shown.get()


def add_logs(report: dict[str, Any], folder: Path, given: tuple[Path, ...]) -> dict[str, Any]:
    """The report with what the logs say; of a log in the folder that says nothing a warning.

    Raises:
        InputError: a log that was given cannot be read, or is of another model.
    """
    found = find_logs(report_file(folder).parent)
    if not found and not given:
        return report
    # These alone need torch, whose import takes longer than everything else here.
    from gpusq_compile.report.engine_logs import read_logs, with_logs

    try:
        builds, faults = read_logs(report, found, given)
        report = with_logs(report, builds)
    except DAMAGE as error:
        raise damaged(folder, error) from None
    for fault in faults:
        click.echo(f"warning[{fault.code}]: {fault.message}", err=True)
    return report


def find_logs(folder: Path) -> list[Path]:
    """The logs in an output folder, and layer information that has no log beside it."""
    engine = folder / "engine"
    logs = sorted(engine.glob("*.log"))
    with_log = {path.name.removesuffix(".log") for path in logs}
    infos = sorted(engine.glob("*.layers.json"))
    return [*logs, *(p for p in infos if p.name.removesuffix(".layers.json") not in with_log)]


def damaged(folder: Path, error: Exception) -> InputError:
    return InputError(
        "report-damaged",
        f"{report_file(folder)} is not as this version writes it: {type(error).__name__}: {error}",
        hint="run gpusq-compile again, or look at the file with --format json",
    )


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
        command(prog_name="gpusq-report", standalone_mode=False)
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


if __name__ == "__main__":
    main()
