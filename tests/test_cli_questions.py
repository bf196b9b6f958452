"""The questions, gates and forms of both commands, asked at the command line."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from gpusq_compile.codes import page, shown
from tests.command_line import ONE_SHOT, TINY, Run, compile_here, report_here

Commands = Any

RULES = """\
version: 1
extends: int8
rules:
  - id: blocks
    match: {name: fc2}
    quantize: {weight: int4, activation: none, block: 128}
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two finished runs: `one` with int8, `two` with rules of which one is refused."""
    folder = tmp_path_factory.mktemp("asked")
    (folder / "mine.yaml").write_text(RULES)
    return folder


@pytest.fixture
def gpusq(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Commands:
    monkeypatch.chdir(folder)

    def run(*args: object) -> Run:
        return compile_here(monkeypatch, capsys, *args)

    if not (folder / "one").exists():
        assert run(TINY, *ONE_SHOT, "-o", "one", "-q").code == 0
        assert run(TINY, *ONE_SHOT, "--rules", "mine.yaml", "-o", "two", "-q").code == 0
    return run


@pytest.fixture
def report(
    gpusq: Commands, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Commands:
    """`gpusq-report ARGS` in this process, in the folder of the finished runs."""
    return partial(report_here, monkeypatch, capsys)


class TestExplain:
    def test_both_commands_print_the_page(self, gpusq: Commands, report: Commands) -> None:
        for command in (gpusq, report):
            run = command("--explain", "max-drop")
            assert (run.code, run.out, run.err) == (0, shown(page("max-drop")), "")

    def test_an_unknown_code_is_bad_input(self, gpusq: Commands, report: Commands) -> None:
        for command in (gpusq, report):
            run = command("--explain", "max-drip")
            assert (run.code, run.out) == (2, "")
            assert "did you mean 'max-drop'?" in run.err

    def test_it_needs_no_torch(self) -> None:
        code = (
            "import sys; from gpusq_compile import cli\n"
            "sys.argv = ['gpusq-compile', '--explain', 'strict']\n"
            "try:\n    cli.main()\nfinally:\n    assert 'torch' not in sys.modules"
        )
        subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL)


class TestCompile:
    def test_a_dry_run_answers_and_shows_no_plan(self, gpusq: Commands) -> None:
        run = gpusq(TINY, "--rules", "mine.yaml", "--dry-run", "--why", "fc2", "-q")
        assert (run.code, run.out) == (0, "")
        assert run.err.startswith("fc2\n  linear, weight 32 x 64, role mlp")
        assert "mine.yaml:4 blocks  (name: fc2)" in run.err
        assert "refused: blocks of 128 do not divide its 64 input channels" in run.err
        assert "┏" not in run.err

    def test_a_dry_run_about_no_layer_is_bad_input(self, gpusq: Commands) -> None:
        run = gpusq(TINY, "--rules", "int8", "--dry-run", "--why", "fc3")
        assert run.code == 2
        assert "error[unknown-layer]: no layer is called 'fc3'" in run.err
        assert "did you mean 'fc1'?" in run.err or "did you mean 'fc2'?" in run.err

    def test_a_compile_about_no_layer_is_done_all_the_same(self, gpusq: Commands) -> None:
        run = gpusq(TINY, *ONE_SHOT, "-o", "three", "--why", "fc3")
        assert run.code == 0
        assert "warning: error[unknown-layer]" in run.err
        assert "ask again: gpusq-report three --why LAYER" in run.err
        assert Path("three/model.onnx").exists()

    def test_a_compile_answers_after_its_report(self, gpusq: Commands) -> None:
        args = ("--why", "head", "--remarks", "missed", "--timing", "-o", "four")
        run = gpusq(TINY, *ONE_SHOT, "--rules", "mine.yaml", *args)
        assert run.err.index("wrote four") < run.err.index("head\n  linear")
        assert "mark: missed [refused]: fc2: blocks of 128" in run.err
        assert "between the passes" in run.err

    def test_remarks_and_passes_are_checked_before_the_compile(self, gpusq: Commands) -> None:
        run = gpusq(TINY, *ONE_SHOT, "-o", "five", "--remarks", "missed=quantise")
        assert run.code == 2
        assert "did you mean 'quantize'?" in run.err
        assert not Path("five").exists()

    def test_a_dry_run_with_dumps_is_refused(self, gpusq: Commands) -> None:
        run = gpusq(TINY, "--rules", "int8", "--dry-run", "--dump-after", "all")
        assert run.code == 2
        assert "error[options-conflict]: --dump-after writes files" in run.err

    def test_json_is_still_the_report_alone_on_stdout(self, gpusq: Commands) -> None:
        args = ("--dry-run", "--why", "fc1", "--format", "json", "-q")
        run = gpusq(TINY, "--rules", "int8", *args)
        assert json.loads(run.out)["layers"][1]["name"] == "fc1"
        assert run.err.startswith("fc1\n")

    def test_github_annotates_what_was_missed(self, gpusq: Commands) -> None:
        run = gpusq(TINY, "--rules", "mine.yaml", "--dry-run", "-q", "--format", "github")
        assert run.code == 0
        lines = run.out.splitlines()
        warning = r"::warning file=mine\.yaml,line=4,title=mark%3A refused::fc2: blocks of 128"
        assert any(re.match(warning, line) for line in lines)
        assert lines[-1].startswith("::notice ")

    def test_github_annotates_errors_at_their_place(self, gpusq: Commands) -> None:
        Path("bad.yaml").write_text("version: 1\nrules:\n  - {id: a, match: {opp: linear}}\n")
        run = gpusq(TINY, "--rules", "bad.yaml", "--format", "github")
        assert run.code == 2
        assert "::error file=bad.yaml,line=3,col=" in run.out
        assert "title=unknown-key::" in run.out
        assert "error[unknown-key]" in run.err

    def test_the_gate_on_sparsity_fails_with_by_how_much(self, gpusq: Commands) -> None:
        args = ("--rules", "mine.yaml", "-o", "six", "-q", "--require-sparse", "1")
        run = gpusq(TINY, *ONE_SHOT, *args, "--format", "github")
        assert run.code == 0, "fc2 is sparse, if not quantized"
        Path("dense.yaml").write_text(
            "version: 1\nextends: int8\nrules:\n"
            "  - {id: dense, match: {name: fc2}, sparsity: none}\n"
        )
        args = ("--rules", "dense.yaml", "-o", "six", "-q", "--require-sparse", "0.9")
        run = gpusq(TINY, *ONE_SHOT, *args, "--format", "github")
        assert run.code == 1
        message = (
            "50.0% of the weights that could be sparse have sparse kernels, the gate asks for "
            "90.0%; not fc2: no rule asks for it"
        )
        assert run.err == f"error[require-sparse]: {message}\n"
        assert run.out.splitlines()[-1] == (
            f"::error title=require-sparse::{message.replace('%', '%25')}"
        )
        assert Path("six/report.json").exists()
        assert not Path("six/model.onnx").exists()

    def test_a_share_in_percent_is_refused_before_the_compile(self, gpusq: Commands) -> None:
        run = gpusq(TINY, *ONE_SHOT, "-o", "seven", "--require-sparse", "90")
        assert run.code == 2
        assert "error[require-sparse]: a smallest share of 90: expected 0 to 1" in run.err
        assert not Path("seven").exists()


class TestReport:
    def test_only_the_answers_are_printed(self, report: Commands) -> None:
        run = report("two", "--why", "fc2", "--remarks", "missed")
        assert (run.code, run.err) == (0, "")
        assert run.out.startswith("fc2\n")
        assert "mark: missed [refused]: fc2: blocks of 128" in run.out
        assert "┏" not in run.out

    def test_answers_come_as_data_too(self, report: Commands) -> None:
        run = report("two", "--why", "fc2", "--timing", "--format", "json")
        found = json.loads(run.out)
        assert found["why"][0]["rules"][-1]["id"] == "blocks"
        assert found["timing"][-1]["pass"] == "between the passes"

    def test_an_unknown_layer_is_bad_input(self, report: Commands) -> None:
        run = report("two", "--why", "fc3")
        assert (run.code, run.out) == (2, "")
        assert "error[unknown-layer]" in run.err

    def test_two_runs_are_compared(self, report: Commands) -> None:
        run = report("one", "--diff", "two")
        assert run.code == 0
        lines = run.out.splitlines()
        assert lines[0] == "from one to two:"
        assert any("fc2: requested weight: int8 -> int4" in line for line in lines)
        assert any(line.startswith("newly missed: mark: fc2: blocks of 128") for line in lines)
        found = json.loads(report("one", "--diff", "two", "--format", "json").out)
        assert list(found["layers"]["changed"]) == ["fc2"]
        assert report("one", "--diff", "one").out.splitlines()[1] == "nothing changed but times"

    def test_a_run_that_is_none_cannot_be_compared(self, report: Commands) -> None:
        run = report("one", "--diff", "nowhere")
        assert run.code == 2
        assert "error[no-report]: cannot read nowhere/report.json" in run.err

    def test_a_finished_run_is_held_to_gates(self, report: Commands) -> None:
        assert report("one", "--strict", "--max-drop", 100, "--require-sparse", 0.5).code == 0
        run = report("two", "--strict", "--why", "fc2")
        assert run.code == 1
        assert run.err.startswith("error[strict]: mark: fc2: blocks of 128")
        assert run.out.startswith("fc2\n")

    def test_github_annotates_a_finished_run(self, report: Commands) -> None:
        run = report("two", "--format", "github", "--strict")
        assert run.code == 1
        kinds = [line.split(" ")[0] for line in run.out.splitlines()]
        assert kinds == ["::warning", "::notice", "::error"]

    def test_a_damaged_report_is_refused_by_every_question(
        self, report: Commands, folder: Path
    ) -> None:
        Path("damaged").mkdir(exist_ok=True)
        Path("damaged/report.json").write_text('{"schema_version": 1, "passes": 3}')
        for args in (
            ["--why", "x"],
            ["--remarks", "all"],
            ["--timing"],
            ["--strict"],
            ["--diff", "one"],
            ["--format", "github"],
        ):
            run = report("damaged", *args)
            assert run.code == 2, args
            assert "error[report-damaged]: damaged/report.json" in run.err
        run = report("one", "--diff", "damaged")
        assert "error[report-damaged]: damaged/report.json" in run.err
