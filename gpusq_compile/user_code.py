"""Calling a user's code, and naming his own line when it raises."""

from __future__ import annotations

import inspect
import linecache
import sysconfig
import traceback
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

from gpusq_compile.errors import InputError, Location, relative_to_cwd

OURS = Path(__file__).resolve().parent
MOST_LINES = 12
"""Most lines of a user's error message that are shown."""


def described(value: object) -> str:
    """What a value is, in words: `None`, `the class Net`, `a list`."""
    if value is None:
        return "None"
    if isinstance(value, type):
        return f"the class {value.__name__}"
    name = type(value).__name__
    return f"{'an' if name[0] in 'AEIOUaeiou' else 'a'} {name}"


def defined_at(function: Callable[..., Any]) -> Location | None:
    """Where a function is written; None for what is not Python, or this package's own."""
    code = getattr(inspect.unwrap(function), "__code__", None)
    if code is None or OURS in Path(code.co_filename).resolve().parents:
        return None
    return Location(relative_to_cwd(Path(code.co_filename)), code.co_firstlineno)


def call_user(function: Callable[..., Any], path: Path | None, what: str, *args: Any) -> Any:
    """Call a user's function; what it raises becomes an InputError with its own file:line."""
    try:
        return function(*args)
    except InputError:
        raise
    except (Exception, SystemExit) as error:
        failure = user_error(error, path, what, "model-file-failed")
        # A wrong signature fails before the first line of the function.
        failure.location = failure.location or defined_at(function)
        raise failure from error


def user_error(error: BaseException, path: Path | None, what: str, code: str) -> InputError:
    """The error a user's code raised, placed at the innermost line of it that we can name.

    That is a line of the model file `path` where one was running, else of any file that is
    neither this package's nor an installed library's; no location when there is none.
    """
    frames = traceback.extract_tb(error.__traceback__)
    outside = [frame for frame in frames if is_users(frame.filename)]
    own = [frame for frame in outside if path and _same_file(Path(frame.filename), path)]
    message = f"{what} raised {_error_text(error, outside)}"
    if not outside:
        return InputError(code, message)
    frame = (own or outside)[-1]
    if outside[-1] is not frame:
        deeper = Location(relative_to_cwd(Path(outside[-1].filename)), outside[-1].lineno)
        message += f" (at {deeper})"
    return InputError(
        code, message, location=Location(relative_to_cwd(Path(frame.filename)), frame.lineno)
    )


def _error_text(error: BaseException, frames: list[traceback.FrameSummary]) -> str:
    lines = str(error).strip().splitlines()
    if len(lines) > MOST_LINES:
        lines = [*lines[:MOST_LINES], f"... and {len(lines) - MOST_LINES} more lines"]
    if not lines and frames:
        source = linecache.getline(frames[-1].filename, frames[-1].lineno or 0).strip()
        lines = [source] if source else []
    return ": ".join([type(error).__name__, *(["\n".join(lines)] if lines else [])])


@cache
def is_users(file: str) -> bool:
    """Whether a frame's file is neither this package's, an installed library's nor Python's own.

    Kept for each file: it is asked of every frame of every node, and looks at the file system.
    """
    path = Path(file)
    if path.name.startswith("<"):
        return False
    stdlib = Path(sysconfig.get_path("stdlib")).resolve()
    resolved = path.resolve()
    return (
        not {"site-packages", "dist-packages"} & set(resolved.parts)
        and not any(folder in resolved.parents for folder in (OURS, stdlib))
        and OURS not in path.parents
    )


def _same_file(one: Path, other: Path) -> bool:
    return one.resolve() == other.resolve()
