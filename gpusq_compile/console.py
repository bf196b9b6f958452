"""What a person sees while the compiler runs: progress and messages, on stderr."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TextIO

import rich.console
from rich.console import RenderableType
from rich.markup import escape
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    SpinnerColumn,
    Task,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.text import Text

Advance = Callable[..., None]
"""`advance(text="", to=None)`: one step is done, or `to` of the total are; `text` is shown."""

PLAIN_INTERVAL_S = 10.0
"""Seconds between progress lines where stderr is no terminal."""


def write_out(text: str, stream: TextIO) -> None:
    """Write all of `text`; that its reader stops early, as `head` does, is no error."""
    try:
        stream.write(text)
        stream.flush()
    except BrokenPipeError:
        # Python would complain when it flushes at the end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def print_sentence(console: rich.console.Console, markup: str) -> None:
    """Wrapped between words on a terminal; elsewhere one line, for `grep`."""
    console.print(markup, soft_wrap=not console.is_terminal)


class _Rate(ProgressColumn):
    """Steps a second, or seconds a step where one takes longer."""

    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        return Text("" if not speed else rate(speed), style="progress.data.speed")


def rate(speed: float) -> str:
    """`12.3/s`, or `4.1 s each` for what takes longer than a second."""
    return f"{speed:.1f}/s" if speed >= 1 else f"{1 / speed:.1f} s each"


class _Bar(Progress):
    """A bar with its `text` field on a line below: beside the bar both would not fit 80 columns."""

    def get_renderables(self) -> Iterable[RenderableType]:
        yield from super().get_renderables()
        for task in self.tasks:
            if text := task.fields["text"]:
                yield Text(f"  {text}", no_wrap=True, overflow="ellipsis")


class Console:
    """Human text on stderr: bars on a terminal, a line now and then elsewhere.

    `verbosity` is -1 for errors only (`-q`), 0, or 1 for each remark (`-v`). rich honours
    `NO_COLOR` and writes plain text where stderr is no terminal.
    """

    def __init__(self, verbosity: int = 0) -> None:
        self.verbosity = verbosity
        # This very stream: what a library prints on stderr may be redirected for a while.
        self.rich = rich.console.Console(file=sys.stderr, quiet=verbosity < 0, highlight=False)
        self._spinner: Progress | None = None
        self._bars: _Bar | None = None
        self._note = ""

    def info(self, text: str) -> None:
        print_sentence(self.rich, escape(text))

    def warn(self, text: str) -> None:
        print_sentence(self.rich, f"[yellow]warning:[/] {escape(text)}")

    def detail(self, text: str) -> None:
        if self.verbosity > 0:
            self.info(text)

    def note(self, text: str) -> None:
        """What was measured on the way: shown beside the steps of the `progress` around it."""
        self._note = text

    @contextmanager
    def busy(self, label: str, *, said: bool = False) -> Iterator[None]:
        """A spinner with the time so far, while something runs that cannot say how far it is.

        `progress` within takes its place; within another `busy` nothing is added. Where stderr is
        no terminal, what is to be `said` gets a line at its end if it took longer than
        `PLAIN_INTERVAL_S`.
        """
        if self.rich.quiet or self._spinner is not None:
            yield
            return
        started = time.monotonic()
        if not self.rich.is_terminal:
            yield
            if said and (seconds := time.monotonic() - started) > PLAIN_INTERVAL_S:
                self.info(f"{label}: {seconds:.0f} s")
            return
        columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
        self._spinner = Progress(*columns, console=self.rich, transient=True)
        try:
            with self._spinner:
                self._spinner.add_task(escape(label), total=None)
                yield
        finally:
            self._spinner = None

    @contextmanager
    def progress(self, label: str, total: int | None) -> Iterator[Advance]:
        """A bar with rate and time left, or a plain line every ten seconds.

        One within another gets a bar of its own below it.
        """
        if self.rich.quiet:
            yield lambda text="", to=None: None
        elif not self.rich.is_terminal:
            yield from self._lines(label, total)
        elif self._bars is not None:
            inner = self._add(self._bars, label, total)
            try:
                yield self._advance(self._bars, inner, noted=False)
            finally:
                self._bars.remove_task(inner)
        else:
            yield from self._bar(label, total)

    def _bar(self, label: str, total: int | None) -> Iterator[Advance]:
        columns = (
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(bar_width=16),
            MofNCompleteColumn(),
            _Rate(),
            TimeElapsedColumn(),
            TextColumn("{task.fields[left]}"),
            TimeRemainingColumn(),
        )
        # Only one live display may be active at once.
        if self._spinner is not None:
            self._spinner.stop()
        self._note = ""
        try:
            with _Bar(*columns, console=self.rich, transient=True) as self._bars:
                yield self._advance(self._bars, self._add(self._bars, label, total))
        finally:
            self._bars = None
            if self._spinner is not None:
                self._spinner.start()

    def _add(self, bars: Progress, label: str, total: int | None) -> TaskID:
        return bars.add_task(escape(label), total=total, text="", left="left" if total else "")

    def _advance(self, bars: Progress, task: TaskID, *, noted: bool = True) -> Advance:
        def advance(text: str = "", to: float | None = None) -> None:
            step = {"advance": 1.0} if to is None else {"completed": to}
            shown = self._with_note(text) if noted else text
            bars.update(task, text=shown, **step)  # type: ignore[arg-type]

        return advance

    def _with_note(self, text: str) -> str:
        return "; ".join(filter(None, (text, self._note)))

    def _lines(self, label: str, total: int | None) -> Iterator[Advance]:
        started = shown = time.monotonic()
        done = first = 0.0
        self._note = ""

        def advance(text: str = "", to: float | None = None) -> None:
            nonlocal shown, done, first
            # What was done before, by a run that is resumed, says nothing of the rate.
            first = to if to is not None and done == 0 else first
            done = done + 1 if to is None else to
            now = time.monotonic()
            if now - shown < PLAIN_INTERVAL_S:
                return
            shown = now
            speed = (done - first) / (now - started)
            facts = [f"{done:.0f}/{total or '?'}"]
            if speed:
                facts.append(rate(speed))
                facts += [f"{(total - done) / speed:.0f} s left"] if total else []
            self.info(f"{label}: {', '.join(facts)} {self._with_note(text)}".rstrip())

        yield advance
