"""Errors that a person can cause, and the exit codes of the command line."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

EXIT_CHECK_FAILED = 1
EXIT_BAD_INPUT = 2
EXIT_INTERNAL = 3


@dataclass(frozen=True)
class Location:
    """A place in a file the user wrote. Line and column count from 1."""

    file: str
    line: int | None = None
    column: int | None = None

    def __str__(self) -> str:
        parts = [self.file]
        if self.line is not None:
            parts.append(str(self.line))
            if self.column is not None:
                parts.append(str(self.column))
        return ":".join(parts)


class GpusqError(Exception):
    """Base of every error this package raises on purpose.

    `code` is a stable kebab-case name, `message` says what was found and what was expected,
    `hint` names the way out. `str()` of the error is the text shown at the terminal.
    """

    exit_code = EXIT_INTERNAL

    def __init__(
        self,
        code: str,
        message: str,
        *,
        location: Location | None = None,
        hint: str | None = None,
    ) -> None:
        super().__init__(code, message)
        self.code = code
        self.message = message
        self.location = location
        self.hint = hint

    def __str__(self) -> str:
        place = f"{self.location}: " if self.location else ""
        hint = f"\n  hint: {self.hint}" if self.hint else ""
        return f"{place}error[{self.code}]: {self.message}{hint}"


class InputError(GpusqError):
    """Bad input: the model file, the rules, the data or an option (exit code 2)."""

    exit_code = EXIT_BAD_INPUT


class CheckFailed(GpusqError):
    """The model compiled, but a gate, a rule or the verification failed (exit code 1)."""

    exit_code = EXIT_CHECK_FAILED


class InternalError(GpusqError):
    """A promise of the compiler itself was broken (exit code 3)."""

    exit_code = EXIT_INTERNAL


def nearest(word: str, valid: Iterable[str]) -> str | None:
    """The valid name closest to `word`, or None when nothing is close."""
    found = difflib.get_close_matches(word, list(valid), n=1, cutoff=0.5)
    return found[0] if found else None


def did_you_mean(word: str, valid: Iterable[str]) -> str:
    """A hint sentence for an unknown `word`: the nearest valid name, then all of them."""
    names = sorted(valid)
    close = nearest(word, names)
    listed = ", ".join(names)
    return f"did you mean '{close}'? valid: {listed}" if close else f"valid: {listed}"


def relative_to_cwd(path: Path) -> str:
    """`path` as a person would type it from here; absolute when it lies elsewhere."""
    try:
        return str(path.resolve().relative_to(Path.cwd()))
    except ValueError:
        return str(path)
