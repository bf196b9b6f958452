"""A run that cannot write, or is interrupted, leaves nothing half-written and says what to do."""

from __future__ import annotations

import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.command_line import (
    ONE_SHOT,
    TINY,
    Refused,
    check_refused,
    compile_here,
    finish,
    start,
    variant,
)

WAIT_S = 90.0


class TestOutput:
    """An output folder that cannot be made or written."""

    @pytest.mark.parametrize(
        ("output", "parts"),
        [
            ("notes.txt", ["error[output-is-a-file]: notes.txt is a file", "takes a folder"]),
            ("notes.txt/a/b", ["error[output-not-writable]: cannot write to notes.txt/a/b", "-o"]),
            ("", ["error[empty-option]: --output"]),
        ],
    )
    def test_a_path_that_is_no_folder_is_refused(
        self, output: str, parts: list[str], refused: Refused
    ) -> None:
        Path("notes.txt").write_text("keep me")
        run = refused(TINY, *ONE_SHOT, output=output)
        for part in parts:
            assert part in run.error
        assert os.listdir() == ["notes.txt"]
        assert Path("notes.txt").read_text() == "keep me"

    @pytest.mark.skipif(not sys.platform.startswith("linux"), reason="/proc is Linux's")
    def test_a_folder_that_cannot_be_written_is_refused(self, refused: Refused) -> None:
        run = refused(TINY, *ONE_SHOT, output="/proc/gpusq/out")
        assert "error[output-not-writable]: cannot write to /proc/gpusq/out: " in run.error
        assert "top-1 dense" not in run.err

    def test_a_failed_run_leaves_an_earlier_result_alone(
        self, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        Path("out").mkdir()
        Path("out/model.onnx").write_text("an earlier result")
        path = variant(folder, "def model():\n    return None\n")
        check_refused(compile_here(monkeypatch, capsys, path, *ONE_SHOT, "-o", "out"))
        assert os.listdir("out") == ["model.onnx"]
        assert Path("out/model.onnx").read_text() == "an earlier result"


class TestFullDisk:
    """Nothing half-written stays, whichever file the disk had no room for."""

    @pytest.fixture
    def disk(self, folder: Path) -> Iterator[Path]:
        """A mount point; the test mounts it with the size it wants."""
        place = folder / "disk"
        place.mkdir()
        yield place
        subprocess.run(["umount", str(place)], check=False, capture_output=True)

    # Enough for nothing, for the graph, for all but the report, for all but the manifest.
    @pytest.mark.parametrize("kilobytes", [4, 16, 24])
    def test_a_full_disk_leaves_nothing_and_says_what_to_do(
        self,
        kilobytes: int,
        disk: Path,
        monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        mount = ["mount", "-t", "tmpfs", "-o", f"size={kilobytes}k", "tmpfs", str(disk)]
        if shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode:
            pytest.skip("mounting a small file system needs privileges")
        run = compile_here(monkeypatch, capsys, TINY, *ONE_SHOT, "-o", disk / "out")
        check_refused(run)
        assert f"error[disk-full]: cannot write to {disk / 'out'}: No space left" in run.error
        assert "nothing was published; free some space" in run.error
        assert os.listdir(disk) == []

    def test_a_limit_on_file_sizes_leaves_nothing(
        self, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        old = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, old[1]))
        try:
            run = compile_here(monkeypatch, capsys, TINY, *ONE_SHOT, "-o", "out")
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, old)
        check_refused(run)
        assert "error[disk-full]: cannot write to out: File too large" in run.error
        assert os.listdir() == []


# Each says `here` by making a file, then takes long enough for a signal to come.
SLOW = """
import time
from pathlib import Path

def say_here():
    Path("here").touch()
    time.sleep(60)
"""
SLOW_DATA = (
    SLOW
    + """
def train_data():
    return Endless()

class Endless:
    def __len__(self):
        return 1000

    def __iter__(self):
        yield from labelled(1)
        yield from labelled(2)
        say_here()
"""
)
SLOW_EXPORT = (
    SLOW
    + """
class Slow(TinyNet):
    def forward(self, x):
        if torch.compiler.is_exporting():
            say_here()
        return super().forward(x)

def model():
    return Slow()
"""
)


class TestSignals:
    """Ctrl-C and the end of the session: no half-written artifact, and what to do next."""

    @pytest.mark.parametrize(
        ("extra", "number"),
        [
            (SLOW_DATA, signal.SIGINT),
            (SLOW_EXPORT, signal.SIGINT),
            (SLOW_DATA, signal.SIGTERM),
        ],
        ids=["Ctrl-C in the fine-tune", "Ctrl-C in the export", "SIGTERM in the fine-tune"],
    )
    def test_an_interrupted_run_leaves_nothing(
        self, extra: str, number: signal.Signals, folder: Path
    ) -> None:
        path = variant(folder, extra)
        process = start(path, "--rules", "int8", "--engine", "none", "-o", "out", cwd=folder)
        deadline = time.monotonic() + WAIT_S
        while not Path("here").exists() and time.monotonic() < deadline:
            assert process.poll() is None, finish(process)
            time.sleep(0.05)
        assert list(folder.glob("out/.gpusq-staging-*")) != []
        os.killpg(process.pid, number)
        run = finish(process)
        assert run.code == 128 + number
        assert run.out == ""
        assert "interrupted: nothing half-written is left; run the same command again" in run.err
        assert "Traceback" not in run.err
        assert not Path("out").exists()


def test_a_real_process_says_the_same(folder: Path) -> None:
    path = variant(folder, "def model():\n    return None\n")
    run = finish(start(path.name, *ONE_SHOT, "-o", "out", cwd=folder))
    check_refused(run)
    assert run.err.startswith("variant.py:64: error[model-not-a-module]: model() returned None")
    assert not Path("out").exists()
