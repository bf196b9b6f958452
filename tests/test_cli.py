"""Good runs of the command line: what they write, print and answer."""

from __future__ import annotations

import hashlib
import json
import os
import re
import stat
import sys
from pathlib import Path
from typing import Any

import onnx
import pytest

from gpusq_compile import __version__
from gpusq_compile.passes import PIPELINE
from tests.command_line import ONE_SHOT, TINY, Run, compile_here, finish, start, variant

SHORT = ("--rules", "int8", "--steps", "3", "--engine", "none")
FILES = [
    *("build_engine.sh", "evidence.json", "graph.json", "manifest.json", "model.onnx"),
    *("report.html", "report.json", "weights.safetensors"),
]

FAILED = ["evidence.json", "manifest.json", "report.html", "report.json"]
"""The files of a run that a gate or the verification failed."""


def read(path: Path | str) -> Any:
    return json.loads(Path(path).read_text())


def files_of(folder: Path | str) -> list[str]:
    root = Path(folder)
    return sorted(str(path.relative_to(root)) for path in root.rglob("*") if path.is_file())


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> tuple[Run, Path]:
    """One whole compile in a process of its own, with fine-tune and report on stdout."""
    folder = tmp_path_factory.mktemp("real")
    path = variant(folder, "print('the model file prints this')\n")
    return finish(start(path.name, *SHORT, "-o", "out", "--format", "json", cwd=folder)), folder


class TestRealRun:
    """A process of its own: its streams are what a person or a script sees."""

    def test_it_succeeds(self, real: tuple[Run, Path]) -> None:
        run, folder = real
        assert run.code == 0, run.err
        assert files_of(folder / "out") == FILES

    def test_stdout_is_the_report_alone(self, real: tuple[Run, Path]) -> None:
        run, folder = real
        assert json.loads(run.out) == read(folder / "out/report.json")

    def test_stderr_has_no_chatter_of_libraries(self, real: tuple[Run, Path]) -> None:
        run, _ = real
        said = re.compile(
            r"the model file prints this|compiling |top-1|passes|layers|fine-tune |"
            r"ONNX Runtime against|sparse kernels|stored layers: |compute: |"
            r"equivalent FLOPs: |size: |packed: |runs as: |wrote |[┏┃┡│├└]|  requested: |  -: |"
            r"[a-z_ ]+: \d+ s$"
        )
        assert [line for line in run.err.splitlines() if not said.match(line)] == []

    def test_stderr_is_plain_where_it_is_no_terminal(self, real: tuple[Run, Path]) -> None:
        assert "\x1b" not in real[0].err

    def test_tables_fit_80_columns(self, real: tuple[Run, Path]) -> None:
        tables = [line for line in real[0].err.splitlines() if line[:1] in "┏┃┡│├└"]
        assert len(tables) > 20
        assert max(map(len, tables)) <= 80
        assert not any("…" in line for line in tables)

    def test_the_report_says_what_each_pass_did(self, real: tuple[Run, Path]) -> None:
        passes = read(real[1] / "out/report.json")["passes"]
        assert [entry["name"] for entry in passes] == [step.name for step in PIPELINE]
        for entry in passes:
            assert {"matched", "changed", "skipped", "seconds", "change", "remarks"} < set(entry)
            assert entry["seconds"] >= 0
            for remark in entry["remarks"]:
                assert set(remark) == {"kind", "code", "layer", "reason"}
                assert remark["kind"] in ("passed", "missed", "analysis")

    def test_the_report_says_what_was_done_to_each_layer(self, real: tuple[Run, Path]) -> None:
        layers = {layer["name"]: layer for layer in read(real[1] / "out/report.json")["layers"]}
        assert list(layers) == ["patch_embed", "fc1", "fc2", "head"]
        fc1 = layers["fc1"]
        asked = {"sparsity": "2:4", "weight": "int8", "activation": "int8", "output": "int8"}
        assert fc1["requested"] == fc1["applied"] == asked
        assert (fc1["role"], fc1["op"], fc1["shape"]) == ("mlp", "linear", [64, 32])
        assert fc1["mask_ok"] is True
        assert fc1["reasons"] == []
        assert re.search(r"int8\.yaml:\d+ gemms", fc1["rules"][0])
        assert fc1["engine"]["type"] == "unknown"
        assert {fc1["engine"]["eligible"], fc1["engine"]["picked"]} == {"unknown"}
        assert layers["head"]["role"] == "classifier"
        assert set(layers["head"]["applied"].values()) == {None}

    def test_the_report_says_how_the_fine_tune_went(self, real: tuple[Run, Path]) -> None:
        finetune = read(real[1] / "out/report.json")["finetune"]
        assert list(finetune) == ["sparse", "reconstruct", "quantize"]
        assert finetune["reconstruct"]["stopped_by"] == "skipped"
        for phase in (finetune["sparse"], finetune["quantize"]):
            assert phase["steps"] == 3
            assert phase["stopped_by"] == "budget"
            assert phase["seconds"] > 0
            assert [point["step"] for point in phase["loss"]] == [1, 2, 3]
            assert {"total", "hard", "soft", "feature"} < set(phase["loss"][0])
        assert "tap_weights" not in finetune["sparse"]
        shares = finetune["quantize"]["tap_weights"]
        assert list(shares) == ["patch_embed", "add", "norm"]
        assert sum(shares.values()) == pytest.approx(1.0, abs=1e-6)

    def test_the_report_has_accuracy_verification_and_sizes(self, real: tuple[Run, Path]) -> None:
        report = read(real[1] / "out/report.json")
        assert report["schema_version"] == 1
        assert report["status"] == "ok"
        assert list(report["accuracy"]) == ["dense", "sparse", "quantized", "onnx"]
        assert all(0 <= value <= 1 for value in report["accuracy"].values())
        assert report["verify"]["ok"] is True
        size = (real[1] / "out/model.onnx").stat().st_size
        storage = report["storage"]
        assert storage["model_bytes"] == size
        assert storage["model_ratio"] == pytest.approx(storage["dense_fp32_bytes"] / size)
        assert storage["gemm_ratio"] > 3
        assert storage["gemm_bytes"] > 2 * 64 * 32
        assert "engine" in report

    def test_the_manifest_has_the_digest_of_every_file(self, real: tuple[Run, Path]) -> None:
        out = real[1] / "out"
        manifest = read(out / "manifest.json")
        assert sorted(manifest["files"]) == [name for name in FILES if name != "manifest.json"]
        for name, digest in manifest["files"].items():
            assert hashlib.sha256((out / name).read_bytes()).hexdigest() == digest

    def test_the_manifest_says_what_it_takes_to_do_it_again(self, real: tuple[Run, Path]) -> None:
        manifest = read(real[1] / "out/manifest.json")
        assert manifest["tool"] == {"name": "gpusq-compile", "version": __version__}
        assert {"python", "torch", "onnx", "onnxruntime"} <= set(manifest["versions"])
        assert manifest["seed"] == 0
        assert manifest["command"][1:] == ["variant.py", *SHORT, "-o", "out", "--format", "json"]
        assert manifest["rules"]["rules"][0]["id"] == "gemms"

    def test_the_script_can_be_run(self, real: tuple[Run, Path]) -> None:
        script = real[1] / "out/build_engine.sh"
        assert script.stat().st_mode & stat.S_IXUSR
        assert "model.onnx" in script.read_text()

    def test_the_model_is_whole(self, real: tuple[Run, Path]) -> None:
        model = onnx.load(real[1] / "out/model.onnx")
        onnx.checker.check_model(model, full_check=True)
        assert {entry.domain for entry in model.opset_import} == {""}


class TestOptions:
    """One option each, on a one-shot compile of the tiny model."""

    @pytest.fixture
    def compiled(
        self, here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> Any:
        def run(*args: object, model: object = TINY, code: int = 0) -> Run:
            found = compile_here(monkeypatch, capsys, model, *args)
            assert found.code == code, found.err
            assert "Traceback" not in found.err
            return found

        return run

    def test_quiet_says_nothing(self, compiled: Any) -> None:
        run = compiled(*ONE_SHOT, "-o", "out", "-q")
        assert (run.out, run.err) == ("", "")
        assert files_of("out") == FILES

    def test_quiet_still_prints_the_report_that_was_asked_for(self, compiled: Any) -> None:
        run = compiled(*ONE_SHOT, "-o", "out", "-q", "--format", "json")
        assert json.loads(run.out)["status"] == "ok"
        assert run.err == ""

    def test_verbose_says_every_remark(self, compiled: Any) -> None:
        run = compiled(*ONE_SHOT, "-o", "out", "-v")
        remarks = [r for entry in read("out/report.json")["passes"] for r in entry["remarks"]]
        assert len(remarks) > 5
        for remark in remarks:
            assert remark["reason"] in run.err

    def test_without_a_folder_the_result_is_named_after_the_model(
        self, compiled: Any, here: Path
    ) -> None:
        compiled(*ONE_SHOT, "-q")
        assert files_of("out/tiny") == FILES
        assert sorted(os.listdir(here)) == ["out"]

    def test_a_second_run_replaces_the_first(self, compiled: Any) -> None:
        compiled(*ONE_SHOT, "-o", "out", "-q", "--dump-after", "fold")
        assert any(name.startswith("dumps/") for name in files_of("out"))
        Path("out/notes.txt").write_text("mine")
        compiled(*ONE_SHOT, "-o", "out", "-q", "--seed", 1)
        assert files_of("out") == sorted([*FILES, "notes.txt"])
        assert read("out/manifest.json")["seed"] == 1
        assert not Path("out/dumps").exists()

    def test_equal_seeds_give_equal_files(self, compiled: Any) -> None:
        for name in ("one", "two"):
            compiled(*SHORT, "-o", name, "-q")
        one, two = (Path(name, "model.onnx").read_bytes() for name in ("one", "two"))
        assert one == two

    def test_dump_after_writes_the_graph_after_a_pass(self, compiled: Any) -> None:
        compiled(*ONE_SHOT, "-o", "out", "-q", "--dump-after", "mark", "--dump-after", "fold")
        assert files_of("out/dumps") == ["03-mark.txt", "13-fold.txt"]
        assert "fc1" in Path("out/dumps/03-mark.txt").read_text()
        assert "dumps/13-fold.txt" in read("out/manifest.json")["files"]

    def test_dump_after_changed_leaves_out_passes_that_change_nothing(self, compiled: Any) -> None:
        compiled(*ONE_SHOT, "-o", "out", "-q", "--dump-after", "changed")
        dumped = files_of("out/dumps")
        assert "07-sparsify.diff" in dumped
        assert "15-export_onnx.txt" in dumped, "the model has no line in common with the graph"
        assert "16-surgery.diff" in dumped
        assert not any("finetune" in name for name in dumped)

    def test_scope_compiles_one_submodule(self, compiled: Any) -> None:
        Path("rules.yaml").write_text(
            "version: 1\nrules:\n  - {id: a, match: {op: linear}, sparsity: {pattern: '2:4'}}\n"
        )
        args = ("--rules", "rules.yaml", "--no-finetune", "--engine", "none", "-q")
        compiled(*args, "--scope", "fc1", "-o", "out")
        report = read("out/report.json")
        assert report["scope"] == "fc1"
        assert [layer["shape"] for layer in report["layers"]] == [[64, 32]]
        assert report["accuracy"]["onnx"] is not None
        shapes = onnx.load("out/model.onnx").graph.output[0].type.tensor_type.shape.dim
        assert [size.dim_value for size in shapes][-1] == 64

    def test_targets_may_be_spaced(self, compiled: Any) -> None:
        compiled(*ONE_SHOT, "-o", "out", "-q", "--target", "sm80, sm89,")
        script = Path("out/build_engine.sh").read_text()
        assert "sm80" in script
        assert "sm89" in script

    def test_dry_run_shows_the_plan_and_writes_nothing(self, compiled: Any, here: Path) -> None:
        run = compiled("--rules", "int8", "-o", "out", "--dry-run")
        assert os.listdir(here) == []
        rows = {
            cells[0]: cells[1:]
            for line in run.err.splitlines()
            if line.startswith("│")
            for cells in [[cell.strip() for cell in line.strip("│").split("│")]]
        }
        assert rows["fc1"] == ["1", "mlp", "64x32", "2:4 int8", "int8", "int8"]
        assert rows["head"] == ["1", "classifier", "4x32", "-", "-", "-"]
        assert "distilled at:\n  patch_embed: patch_embed: " in run.err
        assert "\n  norm: final_projection: " in run.err
        assert "nothing was written" in run.err
        assert "top-1" not in run.err

    def test_dry_run_needs_no_data(self, compiled: Any, here: Path) -> None:
        path = variant(here, "del train_data, calibration_data, eval_data\n")
        run = compiled("--rules", "int8", "-o", "out", "--dry-run", model=path)
        assert "2:4 int8" in run.err
        assert not Path("out").exists()

    def test_dry_run_names_what_is_refused(self, compiled: Any, here: Path) -> None:
        Path("rules.yaml").write_text(ODD_RULES)
        run = compiled("--rules", "rules.yaml", "--dry-run", model=variant(here, ODD))
        assert re.search(r"odd\n  1 +patch_embed +6x1x3x3 +2:4 int8: refused +-", run.err)
        assert (
            "refused on 1 layer (odd): 2:4 needs a reduction axis that is a multiple of 4"
            in run.err
        )

    def test_a_dry_run_says_that_it_compares_no_accuracy(self, compiled: Any, here: Path) -> None:
        run = compiled("--rules", "int8", "--dry-run", "--max-drop", 0.1, model=variant(here))
        assert "--max-drop is left out: a dry run measures no accuracy" in run.err
        assert "nothing was written (--dry-run)" in run.err

    def test_the_gate_on_accuracy_fails_with_by_how_much(self, compiled: Any, here: Path) -> None:
        path = variant(here, WORSE)
        args = (*ONE_SHOT, "--max-drop", 5, "-o", "out", "--format", "json")
        run = compiled(*args, model=path, code=1)
        line = r"error\[max-drop\]: top-1 fell by (\S+) points, from 100.00% to (\S+)%; .* allows 5"
        found = re.match(line, run.error)
        assert found, run.error
        report = read("out/report.json")
        assert float(found[1]) == pytest.approx(100 * (1 - report["accuracy"]["onnx"]), abs=0.01)
        assert float(found[2]) == pytest.approx(100 * report["accuracy"]["onnx"], abs=0.01)
        assert files_of("out") == FAILED
        assert report["status"] == "failed"
        assert report["error"]["code"] == "max-drop"
        assert json.loads(run.out) == report
        assert "mask ok" in run.err

    def test_a_gate_that_holds_passes(self, compiled: Any, here: Path) -> None:
        path = variant(here, WORSE)
        compiled(*ONE_SHOT, "--max-drop", 100, "-o", "out", "-q", model=path)
        assert read("out/report.json")["status"] == "ok"

    def test_a_failed_gate_removes_the_model_of_an_earlier_run(
        self, compiled: Any, here: Path
    ) -> None:
        path = variant(here, WORSE)
        compiled(*ONE_SHOT, "-o", "out", "-q", model=path)
        compiled(*ONE_SHOT, "--max-drop", 5, "-o", "out", "-q", model=path, code=1)
        assert files_of("out") == FAILED

    def test_strict_fails_on_what_was_asked_and_not_done(self, compiled: Any, here: Path) -> None:
        Path("rules.yaml").write_text(ODD_RULES)
        path = variant(here, ODD)
        args = ("--rules", "rules.yaml", "--no-finetune", "--engine", "none", "-q")
        compiled(*args, "-o", "loose", model=path)
        run = compiled(*args, "-o", "out", "--strict", model=path, code=1)
        assert run.error.startswith("error[strict]: ")
        assert "odd" in run.error
        assert "multiple of 4, found 1" in run.error
        assert len(run.err.splitlines()) == 1
        assert files_of("out") == FAILED


# A convolution whose reduction axis has one channel, and rules that want it pruned.
ODD = """
class Odd(TinyNet):
    def __init__(self):
        super().__init__()
        self.odd = nn.Conv2d(1, 6, 3, padding=1)

    def forward(self, x):
        return super().forward(x + self.odd(x).mean(dim=1, keepdim=True))

def model():
    torch.manual_seed(0)
    return Odd()
"""
ODD_RULES = """
version: 1
rules:
  - id: a
    match: {op: conv2d, out_features: 6}
    sparsity: {pattern: "2:4"}
    quantize: {weight: int8}
"""

# Its labels are what the dense model says, so that any difference costs accuracy; its weights are
# such that pruning changes much.
WORSE = """
def model():
    torch.manual_seed(0)
    net = TinyNet().eval()
    net.fc1.weight.data *= 8
    net.fc2.weight.data *= 8
    return net

def eval_data():
    net = model()
    with torch.no_grad():
        return [(i, net(i).argmax(dim=1)) for i, _ in labelled(3)]
"""


def test_an_engine_is_built_and_its_layers_are_reported(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("tensorrt_rtx")
    args = (TINY, "--rules", "int8", "--no-finetune", "--engine", "tensorrt-rtx", "-o", "out")
    run = compile_here(monkeypatch, capsys, *args)
    assert run.code == 0, run.err
    assert files_of("out") == sorted([*FILES, "engine/model.plan"])
    report = read("out/report.json")
    assert report["engine"]["backend"] == "tensorrt-rtx"
    types = {layer["name"]: layer["engine"]["type"] for layer in report["layers"]}
    assert types["fc1"] == types["fc2"] == "int8"
    assert "2 of 2 GEMMs in the planned type" in run.err


@pytest.mark.parametrize("option", ["--help", "-h"])
def test_help_names_every_option(
    option: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = compile_here(monkeypatch, capsys, option)
    assert (run.code, run.err) == (0, "")
    assert run.out.startswith("Usage: gpusq-compile [OPTIONS] [MODEL]")
    for name in ("--rules", "--dry-run", "--engine", "--max-drop", "--format", "Exit codes"):
        assert name in run.out


def test_version_is_the_packages(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = compile_here(monkeypatch, capsys, "--version")
    assert (run.code, run.out.split()[-1], run.err) == (0, __version__, "")


def test_list_passes_says_what_each_requires_and_ensures(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = compile_here(monkeypatch, capsys, "--list-passes")
    assert (run.code, run.err) == (0, "")
    names = [line.split(":")[0] for line in run.out.splitlines() if not line.startswith(" ")]
    assert names == [step.name for step in PIPELINE]
    ensured: set[str] = set()
    for line in run.out.splitlines():
        key, _, value = line.strip().partition(":")
        facts = {fact.strip() for fact in value.split(",")} - {"nothing"}
        if key == "requires":
            assert facts <= ensured
        if key == "ensures":
            ensured |= facts
    assert {"verified", "engine"} <= ensured


def test_help_and_bad_rules_do_not_wait_for_torch(tmp_path: Path) -> None:
    check = (
        "import sys; from gpusq_compile import cli; sys.argv = ['gpusq-compile', *sys.argv[1:]]\n"
        "try: cli.main()\n"
        "except SystemExit as stop: code = stop.code\n"
        "print('torch' in sys.modules, code)"
    )
    command = (sys.executable, "-c", check)
    run = finish(start("m.py", "--rules", "int9", cwd=tmp_path, command=command))
    assert run.out == "False 2\n", run.err
