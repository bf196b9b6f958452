"""What a person sees while the compiler runs: progress and messages, on stderr."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import rich.console
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

Advance = Callable[..., None]
"""`advance(text="", to=None)`: one step is done, or `to` of the total are; `text` is shown."""

PLAIN_INTERVAL_S = 10.0
"""Seconds between progress lines where stderr is no terminal."""


class Console:
    """Human text on stderr: bars on a terminal, a line now and then elsewhere.

    `verbosity` is -1 for errors only (`-q`), 0, or 1 for each remark (`-v`). rich honours
    `NO_COLOR` and writes plain text where stderr is no terminal.
    """

    def __init__(self, verbosity: int = 0) -> None:
        self.verbosity = verbosity
        self.rich = rich.console.Console(stderr=True, quiet=verbosity < 0, highlight=False)

    def info(self, text: str) -> None:
        self.rich.print(escape(text), soft_wrap=True)

    def warn(self, text: str) -> None:
        self.rich.print(f"[yellow]warning:[/] {escape(text)}", soft_wrap=True)

    def detail(self, text: str) -> None:
        if self.verbosity > 0:
            self.info(text)

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
            TextColumn("{task.fields[text]}"),
        )
        with Progress(*columns, console=self.rich, transient=True) as bars:
            task = bars.add_task(label, total=total, text="")

            def advance(text: str = "", to: float | None = None) -> None:
                step = {"advance": 1.0} if to is None else {"completed": to}
                bars.update(task, text=escape(text), **step)  # type: ignore[arg-type]

            yield advance

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
