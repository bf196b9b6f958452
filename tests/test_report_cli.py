"""`gpusq-report`: a finished run shown again, and what is no run."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from gpusq_compile import __version__, report_cli
from tests.command_line import ONE_SHOT, TINY, Run, compile_here


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
    def run(*args: object) -> Run:
        monkeypatch.setattr(sys, "argv", ["gpusq-report", *map(str, args)])
        code: object = 0
        try:
            report_cli.main()
        except SystemExit as stop:
            code = stop.code
        said = capsys.readouterr()
        assert isinstance(code, int)
        assert "Traceback" not in said.err
        return Run(code, said.out, said.err)

    return run


def test_it_shows_what_the_run_itself_showed(
    finished: Path, shown: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = shown(finished)
    assert (run.code, run.err) == (0, "")
    assert run.out.startswith(f"{TINY}: ok\n")
    again = compile_here(monkeypatch, capsys, TINY, *ONE_SHOT, "-o", finished)
    tables = [line for line in again.err.splitlines() if "mlp" in line or "top-1: " in line]
    assert len(tables) == 2
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
