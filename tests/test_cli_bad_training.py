"""Bad input that shows only while training or evaluating: one message, its place, and a way out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.command_line import Refused, Run, compile_here, line_of, variant

RULES = """
version: 1
target: {precision: fp32}
rules:
  - id: all
    match: {op: linear}
    sparsity: {pattern: "2:4"}
    quantize: {weight: int8}
finetune:
  labels: LABELS
  sparse: {epochs: 2}
  quantize: {epochs: 1}
"""

LOADER = """
class Loader:
    '''Three batches of 16; its own `batches` says what else an epoch yields.'''

    epoch = 0

    def __len__(self):
        return 4

    def __iter__(self):
        Loader.epoch += 1
        yield from self.batches(list(labelled(1)), Loader.epoch)


def train_data():
    return Loader()


"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    for labels in ("hard", "required"):
        (tmp_path / f"{labels}.yaml").write_text(RULES.replace("LABELS", labels))
    return tmp_path


def train(path: Path, labels: str = "hard") -> list[object]:
    return [path.name, "--rules", f"{labels}.yaml", "--engine", "none"]


def compiled(
    path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> dict[str, Any]:
    run = compile_here(monkeypatch, capsys, *train(path), "-o", "out")
    assert run.code == 0, run
    report: dict[str, Any] = json.loads(Path("out/report.json").read_text())
    return report


def loader(folder: Path, batches: str) -> Path:
    body = "\n".join(f"    {line}" for line in batches.splitlines())
    text = f"{LOADER}def batches(self, good, epoch):\n{body}\n\n\nLoader.batches = batches\n"
    return variant(folder, text)


# --- data -----------------------------------------------------------------------------------------


def test_a_loader_that_raises_while_training_names_its_own_line(
    folder: Path, refused: Refused
) -> None:
    path = loader(folder, "yield from good\nraise OSError('cannot read 0004.png')  # here")
    error = refused(*train(path)).error
    assert error.startswith(f"variant.py:{line_of(path, '# here')}: error[data-failed]: ")
    assert "train_data() batch 3 raised OSError: cannot read 0004.png" in error


def test_a_loader_that_raises_in_a_later_epoch_names_its_own_line(
    folder: Path, refused: Refused
) -> None:
    # The data is looked at once before training begins.
    path = loader(folder, "if epoch > 2:\n    raise OSError('gone')  # here\nyield from good")
    error = refused(*train(path)).error
    assert error.startswith(f"variant.py:{line_of(path, '# here')}: error[data-failed]: ")
    assert "train_data() batch 0 raised OSError: gone" in error


@pytest.mark.parametrize(
    "batches",
    [
        "sizes = (16, 5, 1)[: 3 - (epoch > 2)]\n"
        "for (images, labels), size in zip(good, sizes, strict=False):\n"
        "    yield images[:size], labels[:size] if size > 1 else None",
        "for images, labels in good:\n    yield images[:1], labels[:1]",
    ],
    ids=["other sizes, no labels, shorter later", "one image"],
)
def test_uneven_batches_train(
    batches: str,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    report = compiled(loader(folder, batches), monkeypatch, capsys)
    phase = report["finetune"]["sparse"]
    assert phase["steps"] == 8
    assert phase["stopped_by"] == "budget"
    assert all(point["total"] > 0 for point in phase["loss"])


def test_a_loader_that_becomes_empty_is_refused(folder: Path, refused: Refused) -> None:
    path = loader(folder, "yield from good[: 0 if epoch > 2 else 3]")
    error = refused(*train(path)).error
    assert error.startswith(f"variant.py:{line_of(path, 'def train_data')}: error[data-empty]: ")
    assert "train_data() yielded no batch" in error


def test_labels_out_of_range_in_a_later_batch_are_named(folder: Path, refused: Refused) -> None:
    path = loader(folder, "yield from good\nyield good[0][0], good[0][1] + 1")
    error = refused(*train(path)).error
    assert "error[labels-range]: train_data() batch " in error
    assert "labels from 1 to 4, but the model has 4 classes" in error


def test_data_without_labels_is_refused_where_the_rules_insist(
    folder: Path, refused: Refused
) -> None:
    path = variant(folder, "def train_data():\n    return [i for i, _ in labelled(1)]\n")
    run = refused(*train(path, "required"))
    place = f"variant.py:{line_of(path, 'def train_data')}"
    assert run.error.startswith(f"{place}: error[labels-missing]: train_data() batch 0 has no ")
    assert "`finetune.labels: required`" in run.error
    assert "top-1 dense" not in run.err


def test_one_batch_without_labels_is_refused_where_the_rules_insist(
    folder: Path, refused: Refused
) -> None:
    path = loader(folder, "yield from good\nyield good[0][0]")
    error = refused(*train(path, "required")).error
    assert "error[labels-missing]: train_data() batch 3 has no labels" in error


@pytest.mark.parametrize("epochs", ["0", "-1"])
def test_no_epochs_are_no_fine_tune(epochs: str, folder: Path, refused: Refused) -> None:
    error = refused(*train(variant(folder)), f"--epochs={epochs}").error
    assert f"error[epochs]: {epochs} epochs: expected a number greater than 0" in error
    assert "--no-finetune" in error


# --- the user's own loss and metrics --------------------------------------------------------------

LOSSES: dict[str, tuple[str, str, list[str]]] = {
    "dict": (
        "def loss(model, batch):  # bad\n    return {'cls': model(batch[0]).sum()}\n",
        "loss-kind",
        ["returned a dict of cls", "sum(losses.values())"],
    ),
    "float": (
        "def loss(model, batch):  # bad\n    return float(model(batch[0]).sum())\n",
        "loss-kind",
        ["returned a float", "cut the gradient"],
    ),
    "raises": (
        "def loss(model, batch):\n    return model(batch[0]) @ batch[1]  # bad\n",
        "model-file-failed",
        ["loss() on train_data() batch ", "raised RuntimeError"],
    ),
    "arguments": (
        "def loss(outputs, labels, weight):  # bad\n    return outputs.sum()\n",
        "function-arguments",
        ["loss(outputs, labels, weight) cannot be called", "expected loss(model, batch)"],
    ),
    "no function": ("loss = 0.5\n", "not-a-function", ["loss is a float"]),
}


@pytest.mark.parametrize("name", LOSSES)
def test_a_loss_that_is_none_is_named_with_its_line(
    name: str, folder: Path, refused: Refused
) -> None:
    text, code, parts = LOSSES[name]
    path = variant(folder, text)
    error = refused(*train(path)).error
    place = f"variant.py:{line_of(path, '# bad')}" if "# bad" in text else "variant.py"
    assert error.startswith(f"{place}: error[{code}]: ")
    for part in parts:
        assert part in error


def test_a_loss_of_nan_stops_the_phase_and_fails_the_check(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = variant(
        folder, "def loss(model, batch):\n    return model(batch[0]).sum() * float('nan')\n"
    )
    run = compile_here(monkeypatch, capsys, *train(path), "-o", "out")
    assert run.code == 1
    assert "error[loss-not-finite]" in run.err
    assert "at step 1" in run.error
    assert "Traceback" not in run.err
    assert not Path("out/model.onnx").exists()


METRICS: dict[str, tuple[str, str, list[str]]] = {
    "number": (
        "def metrics(outputs, batch):  # bad\n    return 0.5\n",
        "metrics-kind",
        ["metrics() on eval_data() batch 0 returned a float", "dictionary of numbers"],
    ),
    "raises": (
        "def metrics(outputs, batch):\n    return {'iou': outputs.boxes}  # bad\n",
        "model-file-failed",
        ["metrics() on eval_data() batch 0 raised AttributeError"],
    ),
    "arguments": (
        "def metrics(outputs):  # bad\n    return {}\n",
        "function-arguments",
        ["expected metrics(outputs, batch)"],
    ),
}


@pytest.mark.parametrize("name", METRICS)
def test_metrics_that_are_none_are_named_with_their_line(
    name: str, folder: Path, refused: Refused
) -> None:
    text, code, parts = METRICS[name]
    path = variant(folder, text)
    error = refused(*train(path)).error
    assert error.startswith(f"variant.py:{line_of(path, '# bad')}: error[{code}]: ")
    for part in parts:
        assert part in error


def test_metrics_without_evaluation_data_fail_under_strict(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    text = "del eval_data\n\ndef metrics(outputs, batch):\n    return {'one': 1.0}\n"
    args = [*train(variant(folder, text)), "--no-finetune", "-o", "out"]
    run: Run = compile_here(monkeypatch, capsys, *args, "--strict")
    assert run.code == 1
    assert "metrics() is defined, but there is no eval_data() to measure on" in run.error
    assert compile_here(monkeypatch, capsys, *args).code == 0


def test_a_model_file_with_loss_and_metrics_compiles(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = variant(
        folder,
        "def loss(model, batch):\n"
        "    images, labels = batch\n"
        "    return nn.functional.cross_entropy(model(images), labels, label_smoothing=0.1)\n\n\n"
        "def metrics(outputs, batch):\n"
        "    return {'margin': outputs.amax(dim=1).mean()}\n",
    )
    report = compiled(path, monkeypatch, capsys)
    assert list(report["metrics"]["onnx"]) == ["margin"]
    assert report["accuracy"]["onnx"] is not None
    remarks = [remark["code"] for entry in report["passes"] for remark in entry["remarks"]]
    assert "unused-model-function" not in remarks
    assert report["finetune"]["sparse"]["loss"][0]["soft"] >= 0.0
