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
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.status import Status
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
        self._spinner: Status | None = None

    def info(self, text: str) -> None:
        print_sentence(self.rich, escape(text))

    def warn(self, text: str) -> None:
        print_sentence(self.rich, f"[yellow]warning:[/] {escape(text)}")

    def detail(self, text: str) -> None:
        if self.verbosity > 0:
            self.info(text)

    @contextmanager
    def busy(self, label: str) -> Iterator[None]:
        """A spinner on a terminal while something runs that cannot say how far it is.

        `progress` within takes its place; within another `busy` nothing is added.
        """
        if self.rich.quiet or not self.rich.is_terminal or self._spinner is not None:
            yield
            return
        self._spinner = self.rich.status(escape(label))
        try:
            with self._spinner:
                yield
        finally:
            self._spinner = None

    @contextmanager
    def progress(self, label: str, total: int | None) -> Iterator[Advance]:
        """A bar with rate and time left, or a plain line every ten seconds."""
        if self.rich.quiet:
            yield lambda text="", to=None: None
        elif self.rich.is_terminal:
            yield from self._bar(label, total)
        else:
            yield from self._lines(label, total)

    def _bar(self, label: str, total: int | None) -> Iterator[Advance]:
        columns = (
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
        )
        # Only one live display may be active at once.
        if self._spinner is not None:
            self._spinner.stop()
        try:
            with _Bar(*columns, console=self.rich, transient=True) as bars:
                task = bars.add_task(label, total=total, text="")

                def advance(text: str = "", to: float | None = None) -> None:
                    step = {"advance": 1.0} if to is None else {"completed": to}
                    bars.update(task, text=text, **step)  # type: ignore[arg-type]

                yield advance
        finally:
            if self._spinner is not None:
                self._spinner.start()

    def _lines(self, label: str, total: int | None) -> Iterator[Advance]:
        started = shown = time.monotonic()
        done = 0.0

        def advance(text: str = "", to: float | None = None) -> None:
            nonlocal shown, done
            done = done + 1 if to is None else to
            now = time.monotonic()
            if now - shown < PLAIN_INTERVAL_S:
                return
            shown = now
            left = f", {(now - started) * (total / done - 1):.0f} s left" if total and done else ""
            self.info(f"{label}: {done:.0f}/{total or '?'}{left} {text}")

        yield advance
