"""Data that cannot be used, on the command line: the exit code, one message, place and way out."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.command_line import ONE_SHOT, Refused, compile_here, line_of, variant

# Data that cannot be used: what the function returns, the error's code, parts of the message.
BATCHES: dict[str, tuple[str, str, list[str]]] = {
    "nothing": ("return None", "data-not-iterable", ["returned None, expected an iterable"]),
    "empty": ("return []", "data-empty", ["yielded no batch"]),
    "raises": ("return open('digits.bin')", "model-file-failed", ["digits.bin"]),
    "raises while iterating": (
        "raise OSError('cable out') if True else 0; yield",
        "data-failed",
        ["batch 0 raised OSError: cable out"],
    ),
    "dict": ("return [{'image': i} for i, _ in labelled(1)]", "batch-form", ["is a dict"]),
    "three items": (
        "return [(i, l, l) for i, l in labelled(1)]",
        "batch-form",
        ["has 3 items", "((a, b), labels)"],
    ),
    "numpy": (
        "return [(i.numpy(), l.numpy()) for i, l in labelled(1)]",
        "batch-form",
        ["ndarray", "torch.from_numpy"],
    ),
    "no batch dimension": (
        "return [i[0] for i, _ in labelled(1)]",
        "batch-form",
        ["float32 [1, 8, 8]", "float32 [1, 1, 8, 8]"],
    ),
    "colour images": (
        "return [torch.zeros(16, 3, 8, 8)]",
        "batch-form",
        ["batch 0 has input 0 of float32 [16, 3, 8, 8]", "gives float32 [1, 1, 8, 8]"],
    ),
    "raw bytes": (
        "return [torch.zeros(16, 1, 8, 8, dtype=torch.uint8)]",
        "batch-form",
        ["uint8 [16, 1, 8, 8]"],
    ),
    "two inputs": (
        "return [((i, i), l) for i, l in labelled(1)]",
        "batch-form",
        ["has 2 inputs, example_inputs() has 1"],
    ),
    "empty batch": ("return [torch.zeros(0, 1, 8, 8)]", "batch-form", ["is empty", "[0, 1, 8, 8]"]),
    "NaN images": ("return [i / 0 for i, _ in labelled(1)]", "data-not-finite", ["input 0"]),
    "float labels": (
        "return [(i, l.float()) for i, l in labelled(1)]",
        "labels-kind",
        ["float32 [16]; expected integer class indices", "labels.long()"],
    ),
    "one-hot labels": (
        "return [(i, torch.eye(4)[l]) for i, l in labelled(1)]",
        "labels-kind",
        ["float32 [16, 4]", "labels.argmax(dim=1)"],
    ),
    "column of labels": (
        "return [(i, l[:, None]) for i, l in labelled(1)]",
        "labels-kind",
        ["int64 [16, 1]", "labels.squeeze(1)"],
    ),
    "too few labels": (
        "return [(i, l[:5]) for i, l in labelled(1)]",
        "labels-kind",
        ["5 labels for 16 inputs"],
    ),
    "names as labels": (
        "return [(i, ['a'] * 16) for i, _ in labelled(1)]",
        "labels-kind",
        ["list"],
    ),
    "yes or no": ("return [(i, l > 1) for i, l in labelled(1)]", "labels-kind", ["bool [16]"]),
}


@pytest.mark.parametrize("name", BATCHES)
def test_bad_data_is_named_before_the_model_is_traced(
    name: str, folder: Path, refused: Refused
) -> None:
    body, code, parts = BATCHES[name]
    path = variant(folder, f"def train_data():  # bad\n    {body}\n")
    run = refused(path.name, "--rules", "int8", "--engine", "none")
    assert f"error[{code}]: train_data() " in run.error
    line = line_of(path, "# bad") + (1 if "raises" in name else 0)
    assert run.error.startswith(f"variant.py:{line}: ")
    assert "top-1 dense" not in run.err
    for part in parts:
        assert part in run.error


@pytest.mark.parametrize("function", ["calibration_data", "eval_data"])
def test_every_data_function_is_checked(function: str, folder: Path, refused: Refused) -> None:
    path = variant(
        folder, f"def {function}():\n    return [(i, l.float()) for i, l in labelled(1)]\n"
    )
    assert f"error[labels-kind]: {function}() batch 0 " in refused(path.name, *ONE_SHOT).error


def test_a_bad_batch_after_good_ones_is_named_by_its_number(folder: Path, refused: Refused) -> None:
    path = variant(
        folder,
        "def calibration_data():\n    yield from labelled(1)\n    yield torch.zeros(16, 1, 9, 8)\n",
    )
    error = refused(path.name, *ONE_SHOT).error
    assert (
        "error[batch-form]: calibration_data() batch 3 has input 0 of float32 [16, 1, 9, 8]"
        in error
    )


def test_data_that_can_be_read_only_once_is_refused(folder: Path, refused: Refused) -> None:
    path = variant(
        folder, "_data = labelled(1)\n\ndef calibration_data():  # bad\n    return _data\n"
    )
    error = refused(path.name, *ONE_SHOT).error
    assert error.startswith(f"variant.py:{line_of(path, '# bad')}: error[data-iterates-once]: ")
    assert "new iterator in each call" in error


@pytest.mark.parametrize(
    ("function", "labels", "found"),
    [
        ("eval_data", "l + 1", "labels from 1 to 4"),
        ("train_data", "l - 1", "labels from -1 to 2"),
    ],
)
def test_labels_outside_the_models_classes_are_refused(
    function: str, labels: str, found: str, folder: Path, refused: Refused
) -> None:
    path = variant(
        folder, f"def {function}():\n    return [(i, {labels}) for i, l in labelled(1)]\n"
    )
    error = refused(path.name, "--rules", "int8", "--engine", "none", "--steps", 1).error
    assert f"error[labels-range]: {function}() batch " in error
    assert f"{found}, but the model has 4 classes" in error
    assert "from 0 to 3" in error


@pytest.mark.parametrize(
    ("extra", "args", "parts"),
    [
        (
            "del train_data\n",
            [],
            ["error[no-training-data]", "finetune.sparse", "train_data()", "--no-finetune"],
        ),
        (
            "del train_data, calibration_data\n",
            ["--no-finetune"],
            ["error[no-calibration-data]", "quantize activations", "calibration_data()"],
        ),
        (
            "del eval_data\n",
            ["--max-drop", 1],
            ["variant.py: error[no-labelled-eval-data]", "no eval_data()"],
        ),
        (
            "def eval_data():\n    return [i for i, _ in labelled(3)]\n",
            ["--max-drop", 1],
            ["error[no-labelled-eval-data]", "inputs without labels"],
        ),
    ],
)
def test_missing_data_is_an_error_before_anything_slow_runs(
    extra: str, args: list[object], parts: list[str], folder: Path, refused: Refused
) -> None:
    path = variant(folder, extra)
    run = refused(path.name, "--rules", "int8", "--engine", "none", *args)
    assert "top-1 dense" not in run.err
    for part in parts:
        assert part in run.error


def test_data_is_not_asked_for_what_a_later_rule_takes_back(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = variant(folder, "del train_data, calibration_data, eval_data\n")
    Path("rules.yaml").write_text(
        "version: 1\nextends: sparse-fp16\nfinetune: {sparse: none}\nrules:\n"
        "  - {id: all, match: {op: linear, in_features: 64}, quantize: {weight: int8}}\n"
        "  - {id: none, match: {op: [linear, conv2d]}, quantize: none}\n"
    )
    args = (path.name, "--rules", "rules.yaml", "--engine", "none", "-o", "out")
    assert compile_here(monkeypatch, capsys, *args).code == 0
