"""What is kept of a crash: enough for a maintainer to see it again, without weights or images."""

from __future__ import annotations

import traceback
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path

from gpusq_compile import __version__
from gpusq_compile.compilation import Compilation
from gpusq_compile.driver import ir_text
from gpusq_compile.errors import GpusqError, InternalError
from gpusq_compile.output import REPRO, versions, write_json

READ_ME = """\
gpusq-compile met an error of its own in pass '{running}': {text}

Please send this folder with the report of the error. It holds

  about.json       the command, the options, versions, and the passes that were done
  rules.yaml       the rules as resolved; --rules takes this file
  traceback.txt    where it happened
  last_good.txt    the graph after the last pass that was verified
  at_crash.txt     the graph as the failing pass left it, if that can still be read

and neither weights nor images. Layer names, shapes, paths and the command line are in it: look
through it before you send it. If you may share the model file too, that helps most.
"""


def internal_error(
    compilation: Compilation, crash: Exception, output: Path | None, command: Sequence[str]
) -> InternalError:
    """Keep what a maintainer needs, and say where it is."""
    text = crash.message if isinstance(crash, GpusqError) else f"{type(crash).__name__}: {crash}"
    code = crash.code if isinstance(crash, GpusqError) else "internal"
    message = f"pass '{compilation.running}': {text}"
    if output is None:
        hint = "with an output folder, what a maintainer needs is kept in its repro/"
        return InternalError(code, message, hint=hint)
    folder = output / REPRO
    try:
        write_repro(compilation, crash, folder, command, text)
    except OSError as error:
        return InternalError(code, message, hint=f"no report was kept: {error}")
    return InternalError(
        code, message, hint=f"please report it with the folder {folder}; README.txt says what it is"
    )


def write_repro(
    compilation: Compilation, crash: Exception, folder: Path, command: Sequence[str], text: str
) -> None:
    """Write the folder, anew where an earlier crash left one."""
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.iterdir():
        if old.is_file():
            old.unlink()
    write_json(
        folder / "about.json",
        {
            "command": list(command),
            "options": asdict(compilation.options),
            "scope": compilation.network.scope,
            "versions": {"gpusq-compile": __version__, **versions()},
            "passes_done": [record.name for record in compilation.records],
            "running": compilation.running,
        },
    )
    (folder / "rules.yaml").write_text(compilation.rules.to_yaml())
    (folder / "traceback.txt").write_text("".join(traceback.format_exception(crash)))
    if compilation.last_good:
        (folder / "last_good.txt").write_text(compilation.last_good)
    # What a pass left half done may break whoever reads it.
    with suppress(Exception):
        (folder / "at_crash.txt").write_text(ir_text(compilation))
    (folder / "README.txt").write_text(READ_ME.format(running=compilation.running, text=text))
