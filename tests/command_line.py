"""Running the command line, in this process or in one of its own."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

from gpusq_compile import cli, report_cli

TINY = Path(__file__).parent / "data" / "models" / "tiny.py"
ONE_SHOT = ("--rules", "int8", "--no-finetune", "--engine", "none")
COMMAND = (sys.executable, "-m", "gpusq_compile")


@dataclass(frozen=True)
class Run:
    """What a run of the command line said."""

    code: int
    out: str
    err: str

    @property
    def error(self) -> str:
        """The error message alone, without the progress before it."""
        lines = self.err.splitlines()
        start = next((i for i, line in enumerate(lines) if "error[" in line), len(lines))
        return "\n".join(lines[start:])


def compile_here(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *args: object
) -> Run:
    """`gpusq-compile ARGS` in this process, which imports torch once for all runs."""
    return run_here(monkeypatch, capsys, "gpusq-compile", cli.main, *args)


def report_here(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *args: object
) -> Run:
    """`gpusq-report ARGS` in this process."""
    return run_here(monkeypatch, capsys, "gpusq-report", report_cli.main, *args)


def run_here(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    program: str,
    main: Callable[[], None],
    *args: object,
) -> Run:
    monkeypatch.setattr(sys, "argv", [program, *map(str, args)])
    capsys.readouterr()
    code: object = 0
    try:
        main()
    except SystemExit as stop:
        code = stop.code
    said = capsys.readouterr()
    assert isinstance(code, int)
    assert "Traceback" not in said.err
    return Run(code, said.out, said.err)


class Refused:
    """Runs `gpusq-compile ARGS -o out`, which must fail and leave no `out` behind."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
        self.monkeypatch = monkeypatch
        self.capsys = capsys

    def __call__(self, *args: object, output: str = "out") -> Run:
        run = compile_here(self.monkeypatch, self.capsys, *args, "-o", output)
        check_refused(run)
        assert not Path("out").exists()
        return run


def check_refused(run: Run) -> None:
    assert run.code == 2, run
    assert run.out == ""
    assert "Traceback" not in run.err
    assert len(re.findall(r"error\[", run.err)) == 1, run.err


def start(*args: object, cwd: Path, command: Sequence[str] = COMMAND) -> subprocess.Popen[str]:
    """`gpusq-compile ARGS` in a process group of its own, as a shell starts it."""
    return subprocess.Popen(
        [*command, *map(str, args)],
        cwd=cwd,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def finish(process: subprocess.Popen[str], timeout: float = 120.0) -> Run:
    try:
        out, err = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        process.kill()
        process.communicate()
        raise
    return Run(process.returncode, out, err)


def variant(folder: Path, extra: str = "", replace: tuple[str, str] | None = None) -> Path:
    """The tiny model file with lines at its end, where the last definition of a name wins."""
    text = TINY.read_text()
    if replace is not None:
        assert replace[0] in text
        text = text.replace(*replace)
    path = folder / "variant.py"
    path.write_text(f"{text}\n\n{extra}")
    return path


def line_of(path: Path, text: str) -> int:
    """The last line of a file that holds `text`, from 1."""
    lines = path.read_text().splitlines()
    return max(index for index, line in enumerate(lines, start=1) if text in line)
