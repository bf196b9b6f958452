"""`gpusq-compile` as a process of its own, which `python -m gpusq_compile` is too."""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import gc
import io
import os
import signal
import sys
import tempfile
import threading
from typing import Any, NoReturn

from gpusq_compile import cli

TEMPORARY = tempfile._TemporaryFileWrapper
FILES = (io.BufferedIOBase, TEMPORARY)
"""Objects behind which open files are; one of text has one of bytes."""


def main() -> NoReturn:
    """Run the command, and end the process as soon as everybody has had his say.

    Freeing the objects of a traced model and of the libraries one by one takes seconds, and the
    system takes all memory back at once. Where somebody still needs Python's own end, it comes.
    """
    code: object = 0
    try:
        cli.main()
    except SystemExit as ended:
        code = 0 if ended.code is None else ended.code
    if is_watched() or not isinstance(code, int) or code not in range(256):
        sys.exit(code)  # type: ignore[arg-type]
    # The two steps of Python's own end in which others take part: threads, idle pools of them
    # among these, and what a model file left to do, as to close a log or to remove a folder.
    try:
        threading._shutdown()  # type: ignore[attr-defined]
    except KeyboardInterrupt:
        sys.exit(cli.EXIT_SIGNAL + signal.SIGINT)
    atexit._run_exitfuncs()
    if not flush_streams() or holds_open_file():
        sys.exit(code)
    os._exit(code)


def is_watched() -> bool:
    """Whether a debugger, a profiler or a prompt goes on after the command."""
    # Python 3.12 brought a table of six such tools.
    monitoring = getattr(sys, "monitoring", None)
    tools = [monitoring.get_tool(number) for number in range(6)] if monitoring else []
    return bool(
        sys.gettrace()
        or sys.getprofile()
        or any(tools)
        or sys.flags.interactive
        or sys.flags.inspect
    )


def flush_streams() -> bool:
    """Write what standard output and error still hold; whether that was possible."""
    for stream in standard_streams():
        try:
            stream.flush()
        # A closed stream, a full disk, or whatever a model file put in their place.
        except Exception:
            return False
    # What libraries print by C's own means waits in a buffer that Python does not know.
    with contextlib.suppress(OSError, AttributeError, TypeError):
        ctypes.CDLL("ucrtbase" if sys.platform == "win32" else None).fflush(None)
    return True


def standard_streams() -> list[io.TextIOBase]:
    """Python's own and what a model file put in their place, but for those that are not there."""
    streams = (sys.stdout, sys.stderr, sys.__stdout__, sys.__stderr__)
    return [stream for stream in streams if stream is not None]  # type: ignore[misc]


def holds_open_file() -> bool:
    """Whether a file is open that may have to be written, ended (gzip, zip) or removed (tempfile).

    Python closes them as it frees them, each before the one that it is written to.
    """
    objects = gc.get_objects()
    kinds = {kind for kind in {type(item) for item in objects} if issubclass(kind, FILES)}
    kinds -= {io.BytesIO}
    standard = {id(getattr(stream, "buffer", None)) for stream in standard_streams()}
    return any(
        type(item) in kinds and id(item) not in standard and is_unfinished(item) for item in objects
    )


def is_unfinished(file: Any) -> bool:
    try:
        return isinstance(file, TEMPORARY) or (not file.closed and file.writable())
    # One that was detached from what it wrote to, or a class of a model file.
    except Exception:
        return True


if __name__ == "__main__":
    main()
