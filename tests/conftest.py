"""What holds for every test process."""

from __future__ import annotations

import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from gpusq_compile.packed_graph import GRAPH, WEIGHTS
from tests.command_line import Refused
from tests.packed_cases import Case, compile_kind

# A shell that starts the tests in the background has them ignore SIGINT, and they would hand that
# on to every process that a test means to interrupt.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Case]:
    """A real compile of each kind, made when it is first asked for."""
    made: dict[str, Case] = {}

    def case(kind: str) -> Case:
        if kind not in made:
            made[kind] = compile_kind(kind, tmp_path_factory.mktemp("packed") / "out")
        return made[kind]

    return case


@pytest.fixture
def copy(cases: Callable[[str], Case], tmp_path: Path) -> Path:
    """A folder of its own with the two files of a 2:4 INT8 compile."""
    for name in (WEIGHTS, GRAPH):
        shutil.copy(cases("2:4 int8").folder / name, tmp_path / name)
    return tmp_path


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty current folder; messages name files as a person would type them here."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def refused(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Refused:
    return Refused(monkeypatch, capsys)
