"""The command as a process: it ends at once, but what a model file left to do is done."""

from __future__ import annotations

import gzip
import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.command_line import COMMAND, Run, finish, start, variant

LEAVES = """
import atexit
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path


def late(name):
    time.sleep(0.5)
    Path(name).write_text("done")


threading.Thread(target=late, args=("thread.txt",)).start()
atexit.register(late, "atexit.txt")
pool = ThreadPoolExecutor(1)
pool.submit(int).result()
folder = tempfile.TemporaryDirectory(dir=".", prefix="scratch")
"""

LEFT_OPEN = """
import gzip
import tempfile

log = open("log.txt", "w")
log.write("text")
compressed = gzip.open("log.gz", "wt")
compressed.write("compressed")
scratch = tempfile.NamedTemporaryFile(dir=".", prefix="scratch")
"""

WITNESS = """
class Witness:
    def __del__(self, open=open):
        open("freed.txt", "w").close()


witness = Witness()
"""
"""Python frees what a module holds at its own end alone."""


def dry_run(folder: Path, extra: str = "") -> Run:
    model = variant(folder, extra)
    run = finish(start(model, "--rules", "int8", "--dry-run", cwd=folder), timeout=60)
    assert "Traceback" not in run.err
    assert "Exception" not in run.err
    return run


def run_script(lines: str, *args: str) -> Run:
    """Run lines of Python that have the command's module as `command`."""
    script = f"import atexit, sys\nimport gpusq_compile.__main__ as command\n{lines}"
    done = subprocess.run([sys.executable, "-c", script, *args], capture_output=True, text=True)
    return Run(done.returncode, done.stdout, done.stderr)


def test_threads_and_exit_handlers_of_a_model_file_are_waited_for(tmp_path: Path) -> None:
    run = dry_run(tmp_path, LEAVES + WITNESS)
    assert run.code == 0, run.err
    assert (tmp_path / "thread.txt").read_text() == "done"
    assert (tmp_path / "atexit.txt").read_text() == "done"
    assert not list(tmp_path.glob("scratch*"))
    assert not (tmp_path / "freed.txt").exists(), "the process did not end at once"


def test_files_that_a_model_file_left_open_are_written_ended_and_removed(tmp_path: Path) -> None:
    run = dry_run(tmp_path, LEFT_OPEN)
    assert run.code == 0, run.err
    assert (tmp_path / "log.txt").read_text() == "text"
    assert gzip.decompress((tmp_path / "log.gz").read_bytes()) == b"compressed"
    assert not list(tmp_path.glob("scratch*"))


@pytest.mark.parametrize("name", ["stdout", "stderr"])
def test_a_stream_that_somebody_closed_is_no_error(name: str) -> None:
    run = run_script(f"atexit.register(sys.{name}.close); command.main()", "--version")
    assert (run.code, run.err) == (0, "")
    assert run.out.startswith("gpusq-compile")


@pytest.mark.parametrize("descriptor", [1, 2])
def test_it_runs_without_a_standard_stream(descriptor: int) -> None:
    command = f'exec "$0" -m gpusq_compile --version {descriptor}>&-'
    done = subprocess.run(["sh", "-c", command, sys.executable], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def test_all_output_is_there_when_it_ends(tmp_path: Path) -> None:
    """Through a pipe and into a file; that of C's own buffer too."""
    printed = "import ctypes; ctypes.CDLL(None).puts(b'written by C')"
    model = variant(tmp_path, f"{printed}\nprint('last words', end='')")
    command = [*COMMAND, str(model), "--rules", "int8", "--dry-run", "--format", "json"]
    piped = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert "written by C\n" in piped.stdout
    assert json.loads(piped.stdout.replace("written by C\n", ""))["layers"]
    assert "last words" in piped.stderr
    with open(tmp_path / "out.json", "w") as file:
        subprocess.run(command, cwd=tmp_path, stdout=file, stderr=subprocess.DEVNULL, check=True)
    written = (tmp_path / "out.json").read_text()
    assert json.loads(written.replace("written by C\n", ""))["layers"]


def test_the_exit_code_of_an_error_is_the_process(tmp_path: Path) -> None:
    run = finish(start("nothing.py", "--rules", "int8", cwd=tmp_path))
    assert run.code == 2
    assert run.error.startswith("error[")
    with open("/dev/full", "w") as file:
        full = subprocess.run([*COMMAND, "--version"], stdout=file, stderr=subprocess.PIPE)
    assert full.returncode != 0, "what could not be written is no success"


def test_the_exit_code_of_a_failed_check_is_the_process(tmp_path: Path) -> None:
    (tmp_path / "rules.yaml").write_text(
        "version: 1\nextends: int8\nverify: {max_difference: 1.0e-9}\n"
    )
    arguments = ("--rules", "rules.yaml", "--no-finetune", "--engine", "none")
    run = finish(start(variant(tmp_path, WITNESS), *arguments, cwd=tmp_path))
    assert run.code == 1, run.err
    assert run.error.startswith("error[verify]")
    assert not (tmp_path / "freed.txt").exists(), "the process did not end at once"


@pytest.mark.parametrize(
    ("code", "ends", "said"),
    [("None", 0, ""), ("7", 7, ""), ("'some text'", 1, "some text\n"), ("-1", 255, "")],
)
def test_an_exit_code_is_what_python_makes_of_it(code: str, ends: int, said: str) -> None:
    run = run_script(f"command.cli.main = lambda: sys.exit({code}); command.main()")
    assert (run.code, run.err) == (ends, said)


def test_a_profile_of_the_command_is_written(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "cProfile", "-o", "profile", *COMMAND[1:], "--version"]
    subprocess.run(command, cwd=tmp_path, check=True, capture_output=True)
    assert (tmp_path / "profile").exists()


def test_a_prompt_that_was_asked_for_comes() -> None:
    command = [sys.executable, "-i", *COMMAND[1:], "--version"]
    done = subprocess.run(command, input="print(6 * 7)\n", capture_output=True, text=True)
    assert "42" in done.stdout
