"""The rule files for the paper's models hold the numbers of its Table 1, all of them."""

from __future__ import annotations

import csv
import re
from pathlib import Path

import pytest

from gpusq_compile.language.loader import load_rules
from gpusq_compile.language.training import Phase, QuantizePhase
from gpusq_compile.rules import shipped_rules

TABLE = Path(__file__).parent / "data" / "paper_table1.csv"
ROWS = list(csv.DictReader(TABLE.read_text(encoding="utf-8").splitlines()))
BY_FILE = {row["file"]: row for row in ROWS}
FOLDER = "paper/"


def schedule_of(printed: str) -> dict[str, object]:
    """The table's words for a schedule as the rules' keys."""
    if printed == "Cosine Annealing":
        return {"schedule": "cosine"}
    if printed == "Polynomial":
        return {"schedule": "polynomial"}
    numbers = tuple(float(number) for number in re.findall(r"\d+", printed))
    if printed.startswith("Multi-Step"):
        return {"schedule": "multistep", "milestones": numbers}
    assert printed.startswith("Step (every ")
    return {"schedule": "step", "step_size": numbers[0]}


def test_each_row_of_the_table_is_a_file_and_each_file_a_row() -> None:
    files = [name.removeprefix(FOLDER) for name in shipped_rules() if name.startswith(FOLDER)]
    assert len(ROWS) == len(BY_FILE) == 22
    assert sorted(files) == sorted(BY_FILE)


@pytest.mark.parametrize("name", BY_FILE)
def test_both_phases_train_as_the_table_says(name: str) -> None:
    row = BY_FILE[name]
    settings = load_rules(FOLDER + name).finetune
    for phase in (settings.sparse, settings.quantize):
        assert isinstance(phase, Phase)
        assert phase.optimizer == row["Optimizer"].lower()
        assert phase.lr == float(row["Initial LR"])
        assert phase.momentum == float(row["Momentum"])
        assert phase.weight_decay == float(row["Weight Decay"])
        assert phase.epochs == float(row["Epochs"])
        assert phase.batch_size == int(row["Batch Size"]) * int(row["GPU Num"])
        assert phase.max_steps is None
        expected = {"milestones": None, "step_size": None, **schedule_of(row["LR schedule"])}
        assert {key: getattr(phase, key) for key in expected} == expected
    loss = settings.loss
    assert (loss.alpha, loss.beta, loss.gamma) == (1, 10, 5)


@pytest.mark.parametrize("name", BY_FILE)
def test_each_file_compresses_as_int8_does_and_with_int4_as_int4_does(name: str) -> None:
    own, shipped = load_rules(FOLDER + name), load_rules("int8")
    assert own.rules == shipped.rules
    assert own.calibration == shipped.calibration
    assert isinstance(own.finetune.quantize, QuantizePhase)
    assert isinstance(shipped.finetune.quantize, QuantizePhase)
    assert own.finetune.quantize.scale_lr == shipped.finetune.quantize.scale_lr
    both = load_rules({"version": 1, "extends": ["int4", FOLDER + name]})
    assert both.rules == load_rules("int4").rules
    assert both.calibration == load_rules("int4").calibration
    assert both.finetune.sparse == own.finetune.sparse


@pytest.mark.parametrize("name", BY_FILE)
def test_each_file_says_how_it_is_used_in_int4_and_for_how_many_gpus(name: str) -> None:
    text = shipped_rules()[FOLDER + name].read_text(encoding="utf-8")
    row = BY_FILE[name]
    assert f"`extends: [int4, {FOLDER}{name}]`" in text
    assert f"# {row['Batch Size']} on each of {row['GPU Num']} GPUs" in text


@pytest.mark.parametrize(
    ("name", "old", "new"),
    [
        ("deit_base", "lr: 5e-4", "lr: 4e-4"),
        ("detr_r50", "step_size: 200", "step_size: 100"),
        ("mask_rcnn_swin_tiny", "[27, 33]", "[26, 33]"),
        ("swin_base_384", "weight_decay: 1e-8", "weight_decay: 0.05"),
        ("avit_small", "batch_size: 384", "batch_size: 96"),
    ],
)
def test_a_changed_number_is_noticed(
    name: str, old: str, new: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shipped = shipped_rules()
    text = shipped[FOLDER + name].read_text(encoding="utf-8")
    assert old in text
    changed = tmp_path / f"{name}.yaml"
    changed.write_text(text.replace(old, new), encoding="utf-8")
    monkeypatch.setattr(
        "gpusq_compile.language.loader.shipped_rules", lambda: {**shipped, FOLDER + name: changed}
    )
    with pytest.raises(AssertionError):
        test_both_phases_train_as_the_table_says(name)
