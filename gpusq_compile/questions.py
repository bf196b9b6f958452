"""Questions about a run: the options that `gpusq-compile` and `gpusq-report` share, and their
answers on the terminal."""

from __future__ import annotations

import sys
import textwrap
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import click
import rich.console

from gpusq_compile.report.remarks_view import Choice, chosen, remark_lines
from gpusq_compile.report.timing_view import rate_lines, timing_entries, timing_table
from gpusq_compile.report.why import answer_lines, explain

Command = TypeVar("Command", bound=Callable[..., Any])


@dataclass(frozen=True)
class Questions:
    """What a person asked: the layers to explain, the remarks to list, where the time went."""

    why: tuple[str, ...] = ()
    remarks: Choice | None = None
    timing: bool = False

    def __bool__(self) -> bool:
        return bool(self.why or self.remarks or self.timing)


def question_options(command: Command) -> Command:
    """The options `--why`, `--remarks` and `--timing` of a click command."""
    for option in (
        click.option("--timing", is_flag=True, help="Where the time went, by pass."),
        click.option(
            "--remarks",
            metavar="KIND[=PASS]",
            help="The remarks that are passed, missed, analysis or all, of one pass or of every.",
        ),
        click.option(
            "--why",
            multiple=True,
            metavar="LAYER",
            help="Which rules decided on a layer, what was refused, what each pass and the engine "
            'did. A name, or a glob such as "**.qkv".',
        ),
    ):
        command = option(command)
    return command


def explain_option(command: Command) -> Command:
    """The option `--explain`, which needs nothing else of a command line."""

    def print_page(context: click.Context, _: click.Parameter, code: str | None) -> None:
        if code is not None:
            from gpusq_compile.codes import page, shown

            click.echo(shown(page(code)), nl=False)
            context.exit()

    return click.option(
        "--explain",
        metavar="CODE",
        is_eager=True,
        expose_value=False,
        callback=print_page,
        help="What the code of an error or remark means, and the way out.",
    )(command)


def gate_options(command: Command) -> Command:
    """The options of the gates, each with exit code 1 where it does not hold."""
    for option in (
        click.option("--strict", is_flag=True, help="Fail if anything asked for was not done."),
        click.option(
            "--require-sparse",
            type=float,
            metavar="SHARE",
            help="Fail if less than this share (0 to 1) of the weights that sparse kernels could "
            "take has them; where an engine says which it picked, only those count.",
        ),
        click.option(
            "--max-drop",
            type=float,
            metavar="POINTS",
            help="Fail if top-1 falls by more points than this.",
        ),
    ):
        command = option(command)
    return command


def show_answers(
    report: Mapping[str, Any], questions: Questions, console: rich.console.Console
) -> None:
    """Print the answer to each question.

    Raises:
        InputError: no layer is called as `--why` says.
    """
    for wanted in questions.why:
        print_lines(console, answer_lines(explain(report, wanted)))
    if questions.remarks is not None:
        print_lines(console, remark_lines(report, questions.remarks))
    if questions.timing:
        console.print(timing_table(report))
        print_lines(console, rate_lines(report))


def answers(report: Mapping[str, Any], questions: Questions) -> dict[str, Any]:
    """The answers as plain values, under the names of the questions."""
    found: dict[str, Any] = {}
    if questions.why:
        found["why"] = [answer for wanted in questions.why for answer in explain(report, wanted)]
    if questions.remarks is not None:
        found["remarks"] = chosen(report, questions.remarks)
    if questions.timing:
        found["timing"] = [
            {"pass": name, "seconds": round(seconds, 4)} for name, seconds in timing_entries(report)
        ]
    return found


def print_lines(console: rich.console.Console, lines: Iterable[str]) -> None:
    """Wrapped under their own indentation on a terminal; elsewhere one line each, for `grep`."""
    for line in lines:
        shown = line
        if console.is_terminal:
            indent = " " * (len(line) - len(line.lstrip()) + 4)
            shown = textwrap.fill(
                line,
                max(20, console.width),
                subsequent_indent=indent,
                break_long_words=False,
                break_on_hyphens=False,
            )
        console.print(shown, markup=False, highlight=False, soft_wrap=True)


def answers_console() -> rich.console.Console:
    """stderr, whatever `--quiet` says: an answer is what was asked for."""
    return rich.console.Console(file=sys.stderr, highlight=False)
