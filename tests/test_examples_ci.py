"""The example workflow and the pre-deployment script do what they say."""

from __future__ import annotations

import json
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML

from tests.command_line import COMMAND, TINY, finish, start

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "examples" / "predeploy.py"
WORKFLOW = ROOT / "examples" / "ci" / "github-workflow.yml"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the workflow's commands run: the model, its rules, and the examples."""
    folder = tmp_path_factory.mktemp("workflow")
    shutil.copy(TINY, folder / "model.py")
    (folder / "rules.yaml").write_text(
        "version: 1\nextends: int8\nfinetune:\n  sparse: none\n  quantize: none\n"
    )
    (folder / "examples").symlink_to(ROOT / "examples")
    return folder


def steps() -> list[str]:
    document = YAML(typ="safe").load(WORKFLOW.read_text())
    jobs: dict[str, Any] = document["jobs"]
    assert jobs["compile"]["needs"] == "plan"
    return [step["run"] for job in jobs.values() for step in job["steps"] if "run" in step]


def test_the_workflow_runs_step_by_step(folder: Path) -> None:
    ours = [step for step in steps() if not step.startswith("pip ")]
    assert [step.split()[0] for step in ours] == [
        *("gpusq-compile", "gpusq-compile", "python", "gpusq-report"),
    ]
    said = []
    for step in ours:
        name, *arguments = shlex.split(step)
        command = {
            "gpusq-compile": [*COMMAND],
            "gpusq-report": [sys.executable, "-m", "gpusq_compile.report_cli"],
            "python": [sys.executable],
        }[name]
        run = finish(start(*arguments, cwd=folder, command=command))
        assert run.code == 0, f"{step}\n{run.err}"
        said.append(run.out)
    assert "::notice title=gpusq-compile::model.py: ok" in said[0]
    assert "::notice " in said[1]
    assert said[2].splitlines()[-1] == "out: may be deployed"
    assert "between the passes" in said[3]
    assert (folder / "out/triton/model/config.pbtxt").exists()


def predeploy(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(SCRIPT), *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.fixture
def deployed(folder: Path, tmp_path: Path) -> Path:
    """A copy of the workflow's result, to be broken."""
    if not (folder / "out").exists():
        args = ("model.py", "--rules", "rules.yaml", "-o", "out", "--engine", "none", "-q")
        assert finish(start(*args, cwd=folder)).code == 0
    shutil.copytree(folder / "out", tmp_path / "out")
    return tmp_path / "out"


def test_a_file_that_was_changed_is_found(deployed: Path) -> None:
    (deployed / "graph.json").write_text("{}")
    (deployed / "build_engine.sh").unlink()
    run = predeploy(deployed, "--max-drop", 100)
    assert run.returncode == 1
    assert run.stderr.splitlines() == [
        "not to be deployed: build_engine.sh is missing",
        "not to be deployed: graph.json is not the file that was compiled",
    ]


def test_a_gate_that_does_not_hold_is_named(deployed: Path) -> None:
    report = json.loads((deployed / "report.json").read_text())
    report["accuracy"].update(dense=0.95, onnx=0.9)
    (deployed / "report.json").write_text(json.dumps(report))
    run = predeploy(deployed, "--max-drop", 1)
    assert run.returncode == 1
    gate = "not to be deployed: error[max-drop]: top-1 fell by 5.00 points, from 95.00% to 90.00%"
    assert gate in run.stderr


def test_a_failed_compile_is_not_to_be_deployed(deployed: Path) -> None:
    report = json.loads((deployed / "report.json").read_text())
    report.update(status="failed", error={"code": "max-drop", "message": "top-1 fell"})
    (deployed / "report.json").write_text(json.dumps(report))
    run = predeploy(deployed, "--max-drop", 100)
    assert run.returncode == 1
    assert "not to be deployed: the compile failed: max-drop: top-1 fell" in run.stderr


def test_what_got_worse_than_the_baseline_is_named(deployed: Path, folder: Path) -> None:
    report = json.loads((folder / "out/report.json").read_text())
    report["accuracy"]["onnx"] = 1.0
    baseline = deployed.parent / "baseline"
    baseline.mkdir()
    (baseline / "report.json").write_text(json.dumps(report))
    run = predeploy(deployed, "--max-drop", 100, "--baseline", baseline)
    assert run.returncode == 1
    assert "top-1 onnx: 100.00% -> " in run.stdout
    assert "points below what is deployed (100.00%)" in run.stderr


def test_a_folder_that_is_no_run_is_told_apart(tmp_path: Path) -> None:
    run = predeploy(tmp_path)
    assert run.returncode == 2
    assert run.stderr.startswith("no finished run: ")
