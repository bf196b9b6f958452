"""`gpusq-compile` as a process of its own, which `python -m gpusq_compile` is too."""

from __future__ import annotations

import atexit
import os
import sys
import threading
from typing import NoReturn

from gpusq_compile import cli


def main() -> NoReturn:
    """Run the command, and end the process as soon as everybody has had his say.

    Freeing the objects of a traced model and of the libraries one by one takes seconds, and the
    system takes all memory back at once.
    """
    code: str | int | None = 0
    try:
        cli.main()
    except SystemExit as ended:
        code = ended.code
    for thread in threading.enumerate():
        if thread is not threading.current_thread() and not thread.daemon:
            thread.join()
    # A model file may have left something there: the log of an experiment, a folder to remove.
    atexit._run_exitfuncs()
    try:
        sys.stdout.flush()
        sys.stderr.flush()
    except OSError:
        sys.exit(code)
    os._exit(code if isinstance(code, int) else 1)


if __name__ == "__main__":
    main()
