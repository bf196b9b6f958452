"""The command as a process: it ends at once, but what a model file left to do is done."""

from __future__ import annotations

import subprocess
from pathlib import Path

from tests.command_line import COMMAND, finish, start, variant

LEAVES = """
import atexit
import threading
import time


def late(name):
    time.sleep(0.5)
    Path(name).write_text("done")


from pathlib import Path

threading.Thread(target=late, args=("thread.txt",)).start()
atexit.register(late, "atexit.txt")
"""


def test_threads_and_exit_handlers_of_a_model_file_are_waited_for(tmp_path: Path) -> None:
    model = variant(tmp_path, LEAVES)
    run = finish(start(model, "--rules", "int8", "--dry-run", cwd=tmp_path))
    assert run.code == 0, run.err
    assert (tmp_path / "thread.txt").read_text() == "done"
    assert (tmp_path / "atexit.txt").read_text() == "done"


def test_all_output_is_there_when_it_ends(tmp_path: Path) -> None:
    model = variant(tmp_path)
    arguments = (model, "--rules", "int8", "--dry-run", "--format", "json")
    with open(tmp_path / "out.json", "w") as file:
        command = [*COMMAND, *map(str, arguments)]
        code = subprocess.run(command, cwd=tmp_path, stdout=file, stderr=subprocess.DEVNULL)
    assert code.returncode == 0
    assert (tmp_path / "out.json").read_text().endswith("}\n")


def test_the_exit_code_of_an_error_is_the_process(tmp_path: Path) -> None:
    run = finish(start("nothing.py", "--rules", "int8", cwd=tmp_path))
    assert run.code == 2
    assert run.error.startswith("error[")
    with open("/dev/full", "w") as file:
        full = subprocess.run([*COMMAND, "--version"], stdout=file, stderr=subprocess.PIPE)
    assert full.returncode != 0, "what could not be written is no success"
