"""What the documents show works: every snippet and every command that can be run here is run.

Commands run in a folder with a small model file and two finished runs. A compile gets
`--steps 1 --engine none` where it says neither, so that it takes seconds.
"""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from gpusq_compile import cli, compile_model, report_cli
from gpusq_compile.language.loader import load_rules
from tests.documents import COMMANDS, DOCUMENTS, NOT_RUN, ROOT, Block, blocks, commands
from tests.documents import reason_not_run as reason

MODEL = f"""\
import sys

import torch

sys.path.insert(0, {str(ROOT / "examples")!r})
from digits_vit import VisionTransformer


def model():
    torch.manual_seed(0)
    return VisionTransformer(depth=1).eval()


def example_inputs():
    return (torch.zeros(2, 1, 8, 8),)


def train_data():
    torch.manual_seed(1)
    return [(torch.randn(16, 1, 8, 8), torch.randint(0, 10, (16,))) for _ in range(2)]


def eval_data():
    return train_data()
"""
RULES = "version: 1\nextends: int8\n"

EVERY_COMMAND = [(file, command) for file in DOCUMENTS for command in commands(file)]
RUN_HERE = list(dict.fromkeys(c for _, c in EVERY_COMMAND if reason(c) is None))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("docs")
    (folder / "model.py").write_text(MODEL)
    for name in ("my-rules.yaml", "rules.yaml"):
        (folder / name).write_text(RULES)
    (folder / "examples").symlink_to(ROOT / "examples")
    options: dict[str, Any] = {"finetune": False, "engine": "none"}
    compile_model(folder / "model.py", rules="int8", output=folder / "out/model", **options)
    compile_model(folder / "model.py", rules="int4", output=folder / "out/other", **options)
    (folder / "out/digits").symlink_to("model")  # What `make demo` leaves.
    return folder


@pytest.fixture
def here(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(folder)
    return folder


def run(command: str, monkeypatch: pytest.MonkeyPatch) -> int:
    """Run a command as a shell would; ours in this process, which has torch imported."""
    name, *arguments = shlex.split(command)
    if name == "gpusq-compile" and not {"--explain", "--list-passes", "--version"} & {*arguments}:
        if not {"--dry-run", "--no-finetune", "--steps", "--epochs"} & {*arguments}:
            arguments += ["--steps", "1"]
        if "--engine" not in arguments:
            arguments += ["--engine", "none"]
    if name in ("gpusq-compile", "gpusq-report"):
        monkeypatch.setattr(sys, "argv", [name, *arguments])
        try:
            (cli if name == "gpusq-compile" else report_cli).main()
        except SystemExit as stop:
            return int(stop.code or 0)
        return 0
    assert name == "python"
    return subprocess.run([sys.executable, *arguments], check=False).returncode


@pytest.mark.parametrize("command", RUN_HERE)
def test_a_command_runs(command: str, here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if command.startswith("python -m gpusq_compile."):
        pytest.skip("it writes into the checkout; a test of its own checks what it writes")
    assert run(command, monkeypatch) == 0


def test_every_command_is_one_that_is_known() -> None:
    unknown = [c for _, c in EVERY_COMMAND if c.split()[0] not in COMMANDS and reason(c) is None]
    assert unknown == []
    assert len(RUN_HERE) > 15


def test_what_is_not_run_is_in_the_documents() -> None:
    shown = [command for _, command in EVERY_COMMAND]
    for start in NOT_RUN:
        assert any(command.startswith(start) for command in shown), start


def python_blocks(file: Path) -> list[Block]:
    return blocks(file, "python")


@pytest.mark.parametrize(
    "file", [file for file in DOCUMENTS if python_blocks(file)], ids=lambda file: file.name
)
def test_the_python_of_a_document_runs_in_order(file: Path, here: Path) -> None:
    namespace: dict[str, Any] = {"__name__": "document", "torch": torch}
    exec(compile(MODEL, "model.py", "exec"), namespace)
    # What the README's first lines say that a reader has: a model, images and loaders.
    shown = {
        "model": namespace["model"](),
        "images": torch.randn(2, 1, 8, 8),
        "loader": namespace["train_data"](),
        "held_out": namespace["eval_data"](),
    }
    shutil.rmtree(here / "out" / "README", ignore_errors=True)
    for block in python_blocks(file):
        namespace.update(shown)
        text = block.text.replace('rules="int8"', 'rules="int8", steps=1, engine="none"')
        text = text.replace('output="out"', 'output="out/model"')
        text = text.replace('load_packed("out")', 'load_packed("out/model")')
        lines = "\n" * (block.line - 1) + text
        exec(compile(lines, block.place, "exec"), namespace)


@pytest.mark.parametrize(
    "block",
    [block for file in DOCUMENTS for block in blocks(file, "yaml")],
    ids=lambda block: block.place,
)
def test_the_rules_of_a_document_can_be_read(block: Block, tmp_path: Path) -> None:
    (tmp_path / "shown.yaml").write_text(block.text)
    load_rules(tmp_path / "shown.yaml")


def test_every_block_says_what_it_is_in() -> None:
    others = [
        block.place
        for file in DOCUMENTS
        for block in blocks(file)
        if block.language not in ("python", "yaml", "bash")
    ]
    assert others == []


@pytest.mark.parametrize("file", DOCUMENTS, ids=lambda file: file.name)
def test_links_lead_somewhere(file: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", file.read_text()):
        if not target.startswith("http"):
            assert (file.parent / target).exists(), target
