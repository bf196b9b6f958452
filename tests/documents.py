"""The commands and snippets in the documents, and those that no test runs, each with its reason."""

from __future__ import annotations

import re
import textwrap
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
DOCUMENTS = sorted(
    path for path in (ROOT / "README.md", *(ROOT / "docs").glob("*.md")) if path.name != "codes.md"
)
"""docs/codes.md is made of pages whose examples are messages, not commands."""

COMMANDS = (
    *("gpusq-compile", "gpusq-report", "make", "pip", "python", "accelerate", "torchrun"),
    *("tritonserver", "trtexec", "scp", "ssh", "cp", "./build_engine.sh", ".venv/bin/gpusq-report"),
)

NOT_RUN = {
    "make demo": "make demo is run by .ci/run",
    "make test": "it runs this test",
    "./build_engine.sh": "needs trtexec; tests/test_engine_script.py runs it with a stand-in",
    "accelerate launch": "needs several processes; tests/test_processes.py starts them",
    "torchrun": "needs several processes; tests/test_processes.py starts them",
    "tritonserver": "needs a Triton server; tests/test_triton.py parses what it reads",
    "trtexec": "needs TensorRT on a GPU",
    "scp": "needs another machine",
    "ssh": "needs another machine",
    "cp out/model/engine": "needs an engine that trtexec built",
    "gpusq-report out/model --log elsewhere.log": "needs a log; tests/test_report_cli.py gives one",
}
"""Commands that are not run here, by how they begin."""

FENCE = re.compile(r"^( *)```(\w*)\n(.*?)^\1```", re.MULTILINE | re.DOTALL)


@dataclass(frozen=True)
class Block:
    """A fenced block. `line` is where its first line stands, from 1."""

    file: Path
    line: int
    language: str
    text: str

    @property
    def place(self) -> str:
        return f"{self.file.name}:{self.line}"


def blocks(file: Path, language: str | None = None) -> list[Block]:
    text = file.read_text()
    found = [
        Block(
            file,
            text[: match.start()].count("\n") + 2,
            match[2],
            textwrap.dedent(match[3]),
        )
        for match in FENCE.finditer(text)
    ]
    return [block for block in found if language in (None, block.language)]


def commands(file: Path) -> list[str]:
    """Every command: the lines of bash blocks, and indented lines that begin as a command does."""
    text = file.read_text()
    found = [line for block in blocks(file, "bash") for line in block.text.splitlines()]
    without = FENCE.sub("", text)
    found += [
        line.strip()
        for line in without.splitlines()
        if line.startswith("    ") and line.split()[:1] and line.split()[0] in COMMANDS
    ]
    lines = [re.sub(r"\s+#.*$", "", line).strip() for line in found]
    return [line for line in lines if line]


def reason_not_run(command: str) -> str | None:
    return next((why for start, why in NOT_RUN.items() if command.startswith(start)), None)
