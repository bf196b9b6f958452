"""A fault of the compiler leaves a folder with which a maintainer can see it again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from gpusq_compile import InternalError, compile_model
from gpusq_compile.language.loader import load_rules
from gpusq_compile.passes import fold
from tests.command_line import ONE_SHOT, TINY, compile_here
from tests.compilations import EVERYTHING, make_rules
from tests.models import Perceptron, noise, seeded

FILES = ["README.txt", "about.json", "at_crash.txt", "last_good.txt", "rules.yaml", "traceback.txt"]


def crash(*_: object) -> None:
    raise ZeroDivisionError("broken on purpose")


def compiled(**options: Any) -> Any:
    return compile_model(
        seeded(Perceptron), (noise(2, 32),), rules=make_rules(EVERYTHING),
        calibration_data=[noise(2, 32)], finetune=False, command=["gpusq-compile", "it.py"],
        **options,
    )  # fmt: skip


def test_a_crash_in_a_pass_leaves_what_a_maintainer_needs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fold, "fold_weight", crash)
    with pytest.raises(InternalError) as caught:
        compiled(output=tmp_path, seed=7)
    assert caught.value.exit_code == 3
    assert caught.value.message == "pass 'fold': ZeroDivisionError: broken on purpose"
    repro = tmp_path / "repro"
    assert f"please report it with the folder {repro}" in str(caught.value.hint)
    assert sorted(path.name for path in repro.iterdir()) == FILES
    about = json.loads((repro / "about.json").read_text())
    assert about["command"] == ["gpusq-compile", "it.py"]
    assert (about["running"], about["passes_done"][-1]) == ("fold", "finetune_quantized")
    assert about["options"]["seed"] == 7
    assert {"gpusq-compile", "torch", "python", "onnx"} <= set(about["versions"])
    assert "ZeroDivisionError: broken on purpose" in (repro / "traceback.txt").read_text()
    assert "module[gpusq.mask.first]" in (repro / "last_good.txt").read_text()
    said = (repro / "README.txt").read_text()
    assert "in pass 'fold': ZeroDivisionError" in said
    assert "neither weights nor images" in said
    assert all(name in said for name in FILES if name != "README.txt")
    assert not (tmp_path / "model.onnx").exists()


def test_its_rules_can_be_compiled_with_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fold, "fold_weight", crash)
    with pytest.raises(InternalError):
        compiled(output=tmp_path)
    again = load_rules(tmp_path / "repro" / "rules.yaml")
    assert again.as_dict() == load_rules(make_rules(EVERYTHING)).as_dict()


def test_the_last_good_graph_is_not_the_one_that_the_pass_half_changed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, calls = fold.fold_weight, []

    def second_fails(*args: Any) -> Any:
        calls.append(args)
        return crash() if len(calls) == 2 else real(*args)

    monkeypatch.setattr(fold, "fold_weight", second_fails)
    with pytest.raises(InternalError):
        compiled(output=tmp_path)
    good, bad = ((tmp_path / "repro" / f"{n}.txt").read_text() for n in ("last_good", "at_crash"))
    assert "gpusq.dequantize" not in good
    assert good != bad


def test_a_second_crash_leaves_nothing_of_the_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "repro").mkdir()
    (tmp_path / "repro" / "old.txt").write_text("of an earlier crash")
    monkeypatch.setattr(fold, "fold_weight", crash)
    with pytest.raises(InternalError):
        compiled(output=tmp_path)
    assert sorted(path.name for path in (tmp_path / "repro").iterdir()) == FILES


def test_a_crash_of_the_report_is_told_apart_from_one_of_a_pass(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from gpusq_compile.report import document

    monkeypatch.setattr(document, "compute_figures", crash)
    with pytest.raises(InternalError, match="pass 'report': ZeroDivisionError"):
        compiled(output=tmp_path)
    assert sorted(path.name for path in (tmp_path / "repro").iterdir()) == FILES


def test_without_a_folder_the_error_says_how_to_get_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fold, "fold_weight", crash)
    with pytest.raises(InternalError) as caught:
        compiled()
    assert "with an output folder" in str(caught.value.hint)


def test_the_command_says_what_to_send_and_exits_with_3(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(fold, "fold_weight", crash)
    run = compile_here(monkeypatch, capsys, TINY, *ONE_SHOT, "-o", "out")
    assert run.code == 3
    assert run.error.splitlines() == [
        "error[internal]: pass 'fold': ZeroDivisionError: broken on purpose",
        "  hint: please report it with the folder out/repro; README.txt says what it is",
    ]
    command = json.loads(Path("out/repro/about.json").read_text())["command"]
    assert command[1:3] == [str(TINY), "--rules"]
