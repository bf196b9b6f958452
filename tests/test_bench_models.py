"""The table of all models: rows are kept, a failure is a row, what is there is not redone."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
TINY = "tests/data/models/tiny.py"


@pytest.fixture
def models(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return __import__("models")


def run(models: ModuleType, monkeypatch: pytest.MonkeyPatch, folder: Path, *args: str) -> None:
    command = ["models.py", "--engine", "none", "-o", str(folder), *args]
    monkeypatch.setattr(sys, "argv", command)
    models.main()


def test_rows_are_kept_one_by_one_and_failures_among_them(
    models: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    rows = (
        models.Row("broken", "none", "timm:deit_tinny_patch16_224"),
        models.Row("tiny", "TinyViT", TINY, aim_seconds=60),
    )
    monkeypatch.setattr(models, "ROWS", rows)
    run(models, monkeypatch, tmp_path, "--rules", "int8")
    results = json.loads((tmp_path / "models.json").read_text())
    assert list(results["rows"]) == ["broken / int8", "tiny / int8"]
    broken, tiny = results["rows"].values()
    assert (broken["status"], broken["exit_code"]) == ("bad input", 2)
    assert "error[unknown-model]" in broken["error"]
    assert (tiny["status"], tiny["error"]) == ("ok", None)
    assert tiny["gemms"]["compressed"] == tiny["gemms"]["eligible"] > 0
    assert tiny["gemms"]["total"] == tiny["gemms"]["compressed"] + sum(
        entry["layers"] for entry in tiny["gemms"]["untouched"].values()
    )
    assert tiny["taps"]["patch_embed"] == 1
    assert 0 < sum(tiny["phases"].values()) < tiny["seconds"]
    assert tiny["peak_bytes"] > 100e6
    assert tiny["sizes"]["model.onnx"] > 0
    assert tiny["numerics"]["min_cosine"] > 0.99
    text = (tmp_path / "models.md").read_text()
    assert "- broken, int8: " in text
    assert "left by rule 'dense-classifier'" in text

    capsys.readouterr()
    run(models, monkeypatch, tmp_path, "--rules", "int8", "--only", "tiny")
    assert "1/1 tiny / int8: is there" in capsys.readouterr().err
    assert list(json.loads((tmp_path / "models.json").read_text())["rows"]) == [
        "broken / int8",
        "tiny / int8",
    ]


def test_a_row_may_be_verified_by_limits_of_its_own(
    models: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    strict = models.Row("strict", "TinyViT", TINY, verify={"max_difference": 1e-12})
    monkeypatch.setattr(models, "ROWS", (strict,))
    run(models, monkeypatch, tmp_path, "--rules", "int8")
    [row] = json.loads((tmp_path / "models.json").read_text())["rows"].values()
    assert (row["status"], row["verify"]) == ("check failed", {"max_difference": 1e-12})
    assert "limit max_difference 1e-12" in row["error"]
    assert "- strict, int8: max_difference 1e-12" in (tmp_path / "models.md").read_text()


def test_what_is_over_its_aims_is_listed_with_what_the_model_takes_by_itself(
    models: ModuleType,
) -> None:
    over = __import__("models_table").over_their_aims
    row = {"name": "tiny", "rules": "int8", "aim_seconds": 60, "compile_seconds": 59.9}
    row |= {"peak_bytes": 1.1e9, "peak_aim_bytes": 1.2e9, "own_forward_peak_bytes": 0.9e9}
    assert over([row, row | {"aim_seconds": None, "compile_seconds": 99.0}]) == ""
    assert over([row, row | {"compile_seconds": 61.25, "peak_bytes": 1.25e9}]) == (
        "Over their aims are 1 of 2 rows:\n\n"
        "- tiny, int8: 61.2 s of 60; 1250 MB of 1200, the model's own forward 900"
    )


def test_a_row_is_compiled_again_when_its_sources_or_options_change(models: ModuleType) -> None:
    row = models.Row("tiny", "TinyViT", TINY)
    before = models.fingerprint(row, {"engine": "none"})
    assert models.fingerprint(row, {"engine": "none"}) == before
    assert models.fingerprint(row, {"engine": "tensorrt-rtx"}) != before
    other = models.Row("tiny", "TinyViT", TINY, environment={"SIZE": "2"})
    assert models.fingerprint(other, {"engine": "none"}) != before


def test_every_row_has_a_name_of_its_own_and_something_to_compile(models: ModuleType) -> None:
    names = [row.name for row in models.ROWS]
    assert len(set(names)) == len(names)
    assert all(bool(row.spec) != (row.config is not None) for row in models.ROWS)


def test_a_process_that_takes_too_long_is_killed(models: ModuleType) -> None:
    ended = models.run_process([sys.executable, "-c", "import time; time.sleep(60)"], {}, timeout=1)
    assert ended.code < 0
    assert 1 <= ended.seconds < 30


def test_results_are_written_whole_or_not_at_all(models: ModuleType, tmp_path: Path) -> None:
    models.write_results(tmp_path, "table", {"rows": {"one": 1}}, "| one |")
    assert models.read_rows(tmp_path / "table.json") == {"rows": {"one": 1}}
    with pytest.raises(UnicodeEncodeError):
        models.write_results(tmp_path, "table", {"rows": {}}, "| two | \ud800")
    assert (tmp_path / "table.md").read_text() == "| one |"


RANDOM_ORDER = """
import torch

def model():
    return torch.nn.Linear(4, 4)

def train_data():
    return torch.utils.data.DataLoader(torch.arange(1000), batch_size=8, shuffle=True)
"""


def test_a_row_trains_on_one_batch_in_all_its_epochs(
    models: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(tmp_path))
    trained = __import__("models_trained")
    (tmp_path / "in_random_order.py").write_text(RANDOM_ORDER)
    (tmp_path / "saved").mkdir()
    path = trained.save_with_one_batch(tmp_path / "in_random_order.py", tmp_path / "saved")
    wrapper = load_source(path)
    batches = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        batches += list(wrapper.train_data())
    assert len(batches) == 2
    assert torch.equal(*batches)
    assert wrapper.model().weight.shape == (4, 4)


@pytest.mark.parametrize(
    ("last", "found"), [(1.0, []), (3.0, ["sparse: the task's loss does not fall"])]
)
def test_a_row_whose_loss_does_not_fall_is_at_fault(
    models: ModuleType, last: float, found: list[str]
) -> None:
    trained = __import__("models_trained")
    phases = {
        "sparse": {"steps": 2, "loss": [{"hard": 2.0}, {"hard": last}]},
        "quantize": {"steps": 2, "loss": [{"hard": 2.0}, {"hard": 1.0}]},
    }
    row = {"error": None, "phases": phases, "masked": 1, "masks_ok": 1, "verified": True}
    assert trained.faults(row, 2) == found


def load_source(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_an_unknown_row_is_named(models: ModuleType) -> None:
    with pytest.raises(SystemExit, match="no row matches nothing-such"):
        models.chosen(["nothing-such"])


def test_the_readme_has_what_the_results_say(models: ModuleType, tmp_path: Path) -> None:
    readme = BENCHMARKS.parent / "README.md"
    copy = tmp_path / "README.md"
    copy.write_text(readme.read_text())
    path = BENCHMARKS / "results" / "models.json"
    results = models.read_rows(path, schema_version=models.SCHEMA)
    models.write_readme(results, copy)
    assert copy.read_text() == readme.read_text()
    rows = copy.read_text().partition(models.BEGIN)[2].partition(models.END)[0].strip().splitlines()
    families = {row.family for row in models.FAMILIES}
    assert len(rows) == 2 + len(families)
    base = results["rows"]["swin_base_patch4_window7_224 / int4"]
    assert any(
        row.endswith(f"| {base['compile_seconds']:.0f} s | {base['peak_bytes'] / 1e9:.1f} GB |")
        and "swin_base_patch4_window7_224" in row
        for row in rows
    )
