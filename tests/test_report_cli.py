"""`gpusq-report`: a finished run shown again, and what is no run."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from gpusq_compile import __version__, report_cli
from tests.command_line import ONE_SHOT, TINY, Run, compile_here, report_here
from tests.engine_logs import DATA, make_report


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished one-shot run."""
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("finished")
        arguments = ["gpusq-compile", str(TINY), *ONE_SHOT, "-o", str(folder / "out"), "-q"]
        patch.setattr(sys, "argv", arguments)
        from gpusq_compile import cli

        cli.main()
    return folder / "out"


@pytest.fixture
def shown(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    """`gpusq-report ARGS` in this process."""
    return partial(report_here, monkeypatch, capsys)


def test_it_shows_what_the_run_itself_showed(
    finished: Path, shown: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = shown(finished)
    assert (run.code, run.err) == (0, "")
    assert run.out.startswith(f"{TINY}: ok\n")
    again = compile_here(monkeypatch, capsys, TINY, *ONE_SHOT, "-o", finished)
    tables = [line for line in again.err.splitlines() if "mlp" in line or "top-1: " in line]
    assert len(tables) == 3
    for line in tables:
        assert line in run.out


def test_json_is_the_report_as_it_is(finished: Path, shown: Any) -> None:
    run = shown(finished, "--format", "json")
    assert json.loads(run.out) == json.loads((finished / "report.json").read_text())


def test_the_report_file_itself_may_be_named(finished: Path, shown: Any) -> None:
    assert shown(finished / "report.json").out == shown(finished).out


def test_a_failed_run_is_shown_with_its_error(tmp_path: Path, finished: Path, shown: Any) -> None:
    report = json.loads((finished / "report.json").read_text())
    report |= {
        "status": "failed",
        "error": {"code": "verify", "message": "fc1: [not] 2:4"},
        "storage": None,
        "engine": None,
        "verify": {},
        "finetune": {},
        "layers": [],
    }
    (tmp_path / "report.json").write_text(json.dumps(report))
    run = shown(tmp_path)
    assert run.code == 0
    assert "failed\nverify: fc1: [not] 2:4\n" in run.out
    assert "(none)" in run.out


def with_engine_logs(finished: Path, folder: Path, **logs: str) -> Path:
    """The finished run as if it had the layers that the logs of tests/data/engine are of."""
    report = json.loads((finished / "report.json").read_text())
    report["layers"] = make_report()["layers"]
    (folder / "engine").mkdir()
    (folder / "report.json").write_text(json.dumps(report))
    for name, source in logs.items():
        file = f"model.{name.replace('_', '.')}.log"
        (folder / "engine" / file).write_bytes((DATA / source).read_bytes())
    return folder


def test_logs_in_the_engine_folder_are_read_and_the_report_stays(
    tmp_path: Path, finished: Path, shown: Any
) -> None:
    logs = {"trt": "trtexec_10_block.log", "trt_dense": "trtexec_10_block.dense.log"}
    folder = with_engine_logs(finished, tmp_path, **logs)
    before = (folder / "report.json").read_bytes()
    run = shown(folder)
    assert (run.code, run.err) == (0, "")
    assert "sparse kernels" in run.out
    assert (
        "no sparse kernel for 2 layers (blocks.0.attn.proj, blocks.0.mlp.fc2): its output"
        in run.out
    )
    assert "model.trt: 1 ms with sparse kernels, 1.3 ms without: 1.30x" in run.out
    assert (folder / "report.json").read_bytes() == before
    merged = json.loads(shown(folder, "--format", "json").out)
    assert [entry["sparse"] for entry in merged.pop("engine_logs")] == [False, True]
    assert [layer.pop("sparse_kernel")["picked"] for layer in merged["layers"]] == [
        "yes",
        "no",
        "yes",
        "no",
    ]
    own = json.loads(before)
    assert merged == own | {
        "layers": [{k: v for k, v in x.items() if k != "sparse_kernel"} for x in own["layers"]]
    }


def test_a_log_elsewhere_is_named_by_an_option(tmp_path: Path, finished: Path, shown: Any) -> None:
    folder = with_engine_logs(finished, tmp_path)
    run = shown(folder, "--log", DATA / "trtexec_8_block.log")
    assert (run.code, run.err) == (0, "")
    assert "TensorRT 8.6.1 for sm86" in run.out
    info = shown(folder, "--log", DATA / "inspector_11_block.json")
    assert info.code == 0
    assert "inspector_11_block.json: TensorRT; " in info.out


def test_a_log_that_says_nothing_is_a_warning_if_found_and_an_error_if_given(
    tmp_path: Path, finished: Path, shown: Any
) -> None:
    folder = with_engine_logs(finished, tmp_path, trt="rtx_fp16.log")
    (folder / "engine" / "cut.log").write_text("&&&& RUNNING TensorRT.trtexec [TensorRT v101300]")
    (folder / "engine" / "x.layers.json").write_text("{")
    run = shown(folder)
    assert run.code == 0
    assert "warning[engine-log-cut]: " in run.err
    assert "warning[layer-info-damaged]: " in run.err
    assert "engine/model.trt.log" in run.out
    given = shown(folder, "--log", folder / "engine" / "cut.log")
    assert (given.code, given.out) == (2, "")
    assert "error[engine-log-cut]" in given.err
    missing = shown(folder, "--log", folder / "none.log")
    assert missing.code == 2
    assert "error[engine-log-unreadable]" in missing.err


def test_a_report_of_an_earlier_version_takes_logs_too(
    tmp_path: Path, finished: Path, shown: Any
) -> None:
    folder = with_engine_logs(finished, tmp_path, trt="trtexec_8_block.log")
    report = json.loads((folder / "report.json").read_text())
    for key in ("compute", "target"):
        del report[key]
    for layer in report["layers"]:
        del layer["sparse_kernel"]
    (folder / "report.json").write_text(json.dumps(report))
    run = shown(folder)
    assert (run.code, run.err) == (0, "")
    assert "TensorRT 8.6.1 for sm86" in run.out


def test_numbers_that_were_not_finite_are_shown(tmp_path: Path, finished: Path, shown: Any) -> None:
    report = json.loads((finished / "report.json").read_text())
    report["verify"]["numerics"]["min_cosine"] = None
    (tmp_path / "report.json").write_text(json.dumps(report))
    run = shown(tmp_path)
    assert run.code == 0
    assert "cosine NaN (limit 0.99)" in run.out


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        (None, ["error[no-report]: cannot read ", "No such file", "given with -o"]),
        ("", ["error[report-damaged]", "is no JSON"]),
        ('{"schema_version": 1', ["error[report-damaged]", "is no JSON"]),
        ("[" * 100_000, ["error[report-damaged]", "is no JSON"]),
        ("[]", ["error[report-damaged]", "no report of gpusq-compile"]),
        ('{"files": {}}', ["error[report-damaged]", "no report of gpusq-compile"]),
        ('{"schema_version": 99}', ["error[report-version]", "version 99, expected 1"]),
        ('{"schema_version": 1}', ["error[report-damaged]", "--format json"]),
        ('{"schema_version": 1, "model": "m", "status": "ok", "error": 3}', ["[report-damaged]"]),
    ],
)
def test_what_is_no_report_is_refused(
    text: str | None, parts: list[str], tmp_path: Path, shown: Any
) -> None:
    if text is not None:
        (tmp_path / "report.json").write_text(text)
    run = shown(tmp_path)
    assert run.code == 2
    assert run.out == ""
    for part in parts:
        assert part in run.err


@pytest.mark.parametrize(
    ("args", "part"),
    [
        ([], "Missing argument 'FOLDER'"),
        (["--fromat", "json"], "--format"),
        ([".", "--format", "xml"], "'xml'"),
    ],
)
def test_wrong_use_is_explained(args: list[str], part: str, shown: Any) -> None:
    run = shown(*args)
    assert run.code == 2
    assert part in run.err
    assert "gpusq-report --help" in run.err


def test_version_and_help(shown: Any) -> None:
    assert shown("--version").out.split()[-1] == __version__
    assert "FOLDER" in shown("--help").out


def test_a_reader_that_stops_early_is_no_error(finished: Path) -> None:
    code = "from gpusq_compile import report_cli; report_cli.main()"
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(finished), "--format", "json"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=Path(report_cli.__file__).parent.parent,
    )
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.close()
    assert process.stderr.read() == ""
    process.stderr.close()
    assert process.wait() == 0


def opened(folder: Path, browser: Path, *more: str) -> tuple[Run, str]:
    """`gpusq-report FOLDER --open MORE` with a browser that writes down what it is to open."""
    address = browser / "address"
    program = browser / "browser.sh"
    program.write_text(f'#!/bin/sh\nprintf %s "$1" > {address}\n')
    program.chmod(0o755)
    code = "from gpusq_compile.report_cli import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", code, str(folder), "--open", *more],
        env={**os.environ, "BROWSER": f"{program} %s", "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        check=False,
    )
    return Run(done.returncode, done.stdout, done.stderr), (
        address.read_text() if address.exists() else ""
    )


def test_open_shows_the_page_that_the_run_wrote(finished: Path, tmp_path: Path) -> None:
    before = (finished / "report.html").read_bytes()
    run, address = opened(finished, tmp_path)
    assert (run.code, run.err) == (0, "")
    assert run.out == f"{finished / 'report.html'}\n"
    assert address == (finished / "report.html").as_uri()
    assert (finished / "report.html").read_bytes() == before


def test_open_makes_a_missing_page_again_as_it_was(finished: Path, tmp_path: Path) -> None:
    for name in ("report.json", "evidence.json"):
        (tmp_path / name).write_bytes((finished / name).read_bytes())
    run, _ = opened(tmp_path, tmp_path)
    assert run.code == 0, run.err
    assert (tmp_path / "report.html").read_bytes() == (finished / "report.html").read_bytes()


def test_open_says_what_a_page_without_evidence_lacks(finished: Path, tmp_path: Path) -> None:
    (tmp_path / "report.json").write_bytes((finished / "report.json").read_bytes())
    run, _ = opened(tmp_path, tmp_path)
    assert run.code == 0
    assert run.err.startswith("warning[no-evidence]: ")
    (tmp_path / "report.html").unlink()
    (tmp_path / "evidence.json").write_text("[1]")
    assert opened(tmp_path, tmp_path)[0].err.startswith("warning[evidence-damaged]: ")


def test_open_with_logs_makes_a_page_of_its_own(finished: Path, tmp_path: Path) -> None:
    folder = with_engine_logs(finished, tmp_path, trt="trtexec_10_block.log")
    run, address = opened(folder, tmp_path)
    assert run.code == 0, run.err
    assert address == (folder / "report-with-logs.html").as_uri()
    assert "Logs of builds elsewhere" in (folder / "report-with-logs.html").read_text()
    assert not (folder / "report.html").exists()
