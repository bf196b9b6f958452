"""Builders are found where they are, and what is not there is said with the way to get it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from gpusq_compile.engine import backends, build_engines
from gpusq_compile.engine.backends import gpu_capability, probe_library
from gpusq_compile.errors import InputError

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.skipif(gpu_capability() is not None, reason="this machine has a GPU")
def test_tensorrt_that_cannot_run_here_is_an_error_with_the_way_to_get_it(tmp_path: Path) -> None:
    with pytest.raises(InputError) as caught:
        build_engines(tmp_path / "model.onnx", tmp_path, backend="tensorrt")
    assert caught.value.code in ("engine-backend-missing", "engine-needs-gpu")
    assert "build_engine.sh" in str(caught.value)


ASKING_FOR_BUILDERS = """
import sys
from pathlib import Path
from gpusq_compile.engine import build_engines
from gpusq_compile.errors import InputError
report = build_engines(Path("model.onnx"), Path("."), backend="auto")
print(report.backend, *report.remarks)
try:
    build_engines(Path("model.onnx"), Path("."), backend="tensorrt-rtx")
except InputError as error:
    print(error)
assert not {"tensorrt", "tensorrt_rtx"} & set(sys.modules), "their libraries take 0.1 GB"
"""


def answers_where(tmp_path: Path, how: str) -> list[str]:
    """What ASKING_FOR_BUILDERS prints where importing either library does `how`."""
    for name in ("tensorrt", "tensorrt_rtx"):
        (tmp_path / f"{name}.py").write_text(how)
    done = subprocess.run(
        [sys.executable, "-c", ASKING_FOR_BUILDERS],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT)])},
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout.splitlines()


def test_without_any_builder_auto_remarks_and_an_explicit_choice_fails(tmp_path: Path) -> None:
    missing = "raise ModuleNotFoundError('no', name=__name__)"
    auto, *explicit = answers_where(tmp_path, missing)
    assert auto.startswith("none no engine was built")
    assert "pip install 'gpusq-compile[rtx]'" in auto
    assert explicit[0].startswith("error[engine-backend-missing]")
    assert explicit[0].endswith("tensorrt_rtx is not installed")
    assert "pip install 'gpusq-compile[rtx]'" in explicit[1]


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ("raise OSError('libnvinfer.so.11: no such file')", "libnvinfer.so.11: no such file"),
        ("import os; os._exit(7)", "its process ended with code 7"),
        ("raise OSError", "OSError"),
        ("import sys; sys.exit('Geh\xe4use fehlt')", "process ended with code 1: Geh"),
        ("import os; print('[1]', flush=True); os._exit(0)", "code 0: [1]"),
    ],
)
def test_a_builder_that_is_broken_is_one_that_is_missing(
    tmp_path: Path, how: str, said: str
) -> None:
    auto, error, _ = answers_where(tmp_path, how)
    assert auto.startswith("none no engine was built")
    assert said in auto
    assert "tensorrt_rtx cannot be imported" in error
    assert said in error


def test_auto_says_why_it_passed_over_a_tensorrt_that_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = "cannot be imported: libnvinfer.so.10: no such file"
    found: dict[str, dict[str, Any]] = {
        "tensorrt": {"missing": False, "error": broken},
        "tensorrt_rtx": {"version": "1.2.3", "capabilities": []},
    }
    monkeypatch.setattr(backends, "probe_library", found.__getitem__)
    backend, remarks = backends.choose_backend("auto", ["portable"])
    assert backend is not None
    assert backend.name == "tensorrt-rtx"
    [remark] = remarks
    assert broken in remark
    found["tensorrt"]["missing"] = True
    assert backends.choose_backend("auto", ["portable"])[1] == ()


def test_what_a_library_prints_is_no_part_of_its_answer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = "import os; print('hello'); os.system('echo hello'); __version__ = '1.2'; print('{}')"
    (tmp_path / "talkative.py").write_text(lines + "\nimport atexit; atexit.register(print, 1)")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    assert probe_library("talkative") == {"version": "1.2", "capabilities": []}


def test_bytes_that_are_no_text_are_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = "import os; os.write(2, b'no \\xff here'); os._exit(3)"
    (tmp_path / "binary.py").write_text(lines)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    assert probe_library("binary")["error"].endswith("code 3: no \ufffd here")


def test_a_library_that_is_installed_later_is_found_and_then_remembered(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    assert probe_library("late_builder")["missing"]
    (tmp_path / "late_builder.py").write_text("__version__ = '1.2'")
    assert probe_library("late_builder")["version"] == "1.2"
    (tmp_path / "late_builder.py").unlink()
    assert probe_library("late_builder")["version"] == "1.2"


def test_a_library_that_never_loads_is_not_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "slow_builder.py").write_text("import time; time.sleep(100)")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(backends, "PROBE_SECONDS", 0.5)
    error = "loading it takes more than 0.5 seconds"
    assert probe_library("slow_builder") == {"missing": False, "error": error}


def test_where_no_process_can_be_started_it_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "")
    found = probe_library("late_builder_of_nobody")
    assert found["missing"] is False
    assert "no process of Python can be started" in found["error"]


def test_the_compilers_own_files_are_no_libraries() -> None:
    assert probe_library("builder_log")["missing"]
