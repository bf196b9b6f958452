"""What is kept of a crash: enough for a maintainer to see it again."""

from __future__ import annotations

import traceback
from collections.abc import Sequence
from pathlib import Path

from gpusq_compile import __version__
from gpusq_compile.compilation import Compilation
from gpusq_compile.errors import GpusqError, InternalError
from gpusq_compile.graph.text import graph_text
from gpusq_compile.output import REPRO, versions, write_json
from gpusq_compile.passes import PIPELINE


def internal_error(
    compilation: Compilation, crash: Exception, output: Path | None, command: Sequence[str]
) -> InternalError:
    """Keep what a maintainer needs, and say where it is."""
    text = crash.message if isinstance(crash, GpusqError) else f"{type(crash).__name__}: {crash}"
    code = crash.code if isinstance(crash, GpusqError) else "internal"
    done = [record.name for record in compilation.records]
    names = [step.name for step in PIPELINE]
    stopped = names[len(done)] if len(done) < len(names) else "report"
    message = f"pass '{stopped}': {text}"
    if output is None:
        return InternalError(code, message)
    folder = output / REPRO
    try:
        write_repro(compilation, crash, folder, done, command)
    except OSError as error:
        return InternalError(code, message, hint=f"no report was kept: {error}")
    return InternalError(code, message, hint=f"please report it with the folder {folder}")


def write_repro(
    compilation: Compilation,
    crash: Exception,
    folder: Path,
    done: list[str],
    command: Sequence[str],
) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    write_json(
        folder / "about.json",
        {
            "command": list(command),
            "versions": {"gpusq-compile": __version__, **versions()},
            "passes_done": done,
            "rules": compilation.rules.as_dict(),
        },
    )
    (folder / "traceback.txt").write_text("".join(traceback.format_exception(crash)))
    if compilation.graph is not None:
        (folder / "graph.txt").write_text(graph_text(compilation.graph))
