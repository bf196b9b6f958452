"""The user's metrics: averaged over the evaluation data, reported, and never in training's way."""

from __future__ import annotations

import math
import random
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console
from torch import Tensor, nn

from gpusq_compile import compile_model
from gpusq_compile.accuracy import criterion, evaluate, measure
from gpusq_compile.compilation import Compilation
from gpusq_compile.errors import CheckFailed, InputError
from gpusq_compile.gates import Gates, check_gates
from gpusq_compile.report.document import make_report
from gpusq_compile.report.terminal import show_report
from tests.compilations import begin, make_rules, run_until
from tests.models import Detector, Shape, TinyViT, images, labelled, seeded

UNEVEN = [*labelled(1, size=8), *((inputs[:2], labels[:2]) for inputs, labels in labelled(1))]


@pytest.fixture(scope="module")
def traced() -> Compilation:
    compilation = begin(
        seeded(TinyViT, Shape(depth=1)), images(2), make_rules(), eval_data=labelled(2)
    )
    return run_until(compilation, "trace")


@pytest.fixture
def compilation(traced: Compilation) -> Compilation:
    """A traced classifier, with nothing measured yet and neither loss nor metrics."""
    traced.source.metrics = traced.source.loss = traced.source.logits = None
    traced.accuracy.clear()
    traced.metrics.clear()
    give(traced, UNEVEN)
    return traced


def give(compilation: Compilation, eval_data: Any) -> None:
    compilation.source.eval_data = lambda: eval_data


def test_means_are_weighted_by_the_size_of_the_batches(compilation: Compilation) -> None:
    def metrics(outputs: Tensor, batch: Any) -> dict[str, Any]:
        return {"size": len(outputs), "half": torch.tensor(0.5), "array": np.float32(2.0)}

    compilation.source.metrics = metrics
    found = evaluate(compilation, compilation.ir)
    assert found["size"] == (8 * 8 + 2 * 2) / 10
    assert found["half"] == 0.5
    assert found["array"] == 2.0


def test_metrics_see_the_models_outputs_and_the_batch_as_it_was(compilation: Compilation) -> None:
    seen: list[tuple[Tensor, Any]] = []

    def metrics(outputs: Tensor, batch: Any) -> dict[str, float]:
        seen.append((outputs, batch))
        return {"seen": 1.0}

    compilation.source.metrics = metrics
    evaluate(compilation, compilation.ir)
    for (outputs, batch), (inputs, labels) in zip(seen, UNEVEN, strict=True):
        assert torch.equal(outputs, compilation.ir(inputs))
        assert not outputs.requires_grad
        assert torch.equal(batch[0], inputs)
        assert torch.equal(batch[1], labels)


def test_the_first_metric_is_the_criterion_and_top1_comes_last(compilation: Compilation) -> None:
    assert list(evaluate(compilation, compilation.ir)) == ["top1"]
    compilation.source.metrics = lambda outputs, batch: {"iou": 0.25, "loss": 9.0}
    found = evaluate(compilation, compilation.ir)
    assert list(found) == ["iou", "loss", "top1"]
    assert criterion(found) == 0.25
    assert criterion({"top1": 0.5}) == 0.5
    assert criterion({}) is None


def test_a_metric_called_top1_is_the_users_and_accuracy_stays_the_compilers(
    compilation: Compilation,
) -> None:
    compilation.source.metrics = lambda outputs, batch: {"top1": 77.0}
    assert evaluate(compilation, compilation.ir) == {"top1": 77.0}
    measure(compilation, "dense", compilation.ir)
    assert compilation.metrics == {"dense": {"top1": 77.0}}
    accuracy = compilation.accuracy["dense"]
    assert accuracy is not None
    assert accuracy <= 1.0


def test_nan_is_worse_than_any_number() -> None:
    assert criterion({"iou": math.nan}) == -math.inf


def test_batches_without_labels_are_measured_by_metrics_alone(compilation: Compilation) -> None:
    give(compilation, [inputs for inputs, _ in UNEVEN])
    assert evaluate(compilation, compilation.ir) == {}
    compilation.source.metrics = lambda outputs, batch: {"count": len(batch)}
    assert evaluate(compilation, compilation.ir) == {"count": 6.8}


@pytest.mark.parametrize("given", ["loss", "metrics"])
def test_labels_that_are_no_classes_give_no_top1(given: str, compilation: Compilation) -> None:
    give(compilation, [(inputs, labels + 100) for inputs, labels in UNEVEN])
    with pytest.raises(InputError, match="labels from 1"):
        evaluate(compilation, compilation.ir)
    setattr(compilation.source, given, lambda one, batch: {"one": 1.0})
    assert "top1" not in evaluate(compilation, compilation.ir)


def test_logits_of_something_else_than_samples_give_no_top1(compilation: Compilation) -> None:
    compilation.source.loss = lambda model, batch: model(batch[0])
    compilation.source.logits = lambda outputs: outputs.repeat(3, 1)
    assert evaluate(compilation, compilation.ir) == {}


def test_outputs_without_logits_give_no_top1() -> None:
    """The evaluation data has class labels, the model returns a dictionary."""
    compilation = begin(seeded(Detector), images(2), make_rules(), eval_data=labelled(1))
    run_until(compilation, "trace")
    with pytest.raises(InputError, match="no single"):
        evaluate(compilation, compilation.ir)
    compilation.source.metrics = lambda outputs, batch: {"boxes": outputs["boxes"].shape[1]}
    assert evaluate(compilation, compilation.ir) == {"boxes": 4.0}


def test_without_evaluation_data_nothing_is_measured(compilation: Compilation) -> None:
    compilation.source.eval_data = None
    assert evaluate(compilation, compilation.ir) == {}
    measure(compilation, "dense", compilation.ir)
    assert compilation.accuracy == {"dense": None}
    assert compilation.metrics == {}


def numpy_state() -> str:
    """The whole state: two of them are equal where the next numbers are."""
    state: Any = np.random.get_state()
    return str((state[1].tolist(), *state[2:]))


def test_evaluating_leaves_every_random_state_alone(compilation: Compilation) -> None:
    drawn: list[tuple[float, float, float]] = []

    def metrics(outputs: Tensor, batch: Any) -> dict[str, float]:
        drawn.append((float(torch.rand(())), float(np.random.rand()), random.random()))
        return {"one": 1.0}

    compilation.source.metrics = metrics
    before = torch.get_rng_state(), numpy_state(), random.getstate()
    evaluate(compilation, compilation.ir)
    assert torch.equal(before[0], torch.get_rng_state())
    assert before[1:] == (numpy_state(), random.getstate())
    torch.rand(3), np.random.rand(3), random.random()
    evaluate(compilation, compilation.ir)
    # Whatever is drawn is the same in each evaluation, so that their results compare.
    assert drawn[:2] == drawn[2:]
    assert drawn[0] != drawn[1]


KINDS: dict[str, tuple[Any, str]] = {
    "number": (0.5, "returned a float, expected a dictionary of numbers by name"),
    "None": (None, "returned None"),
    "empty": ({}, "returned an empty dictionary"),
    "vector": ({"iou": torch.zeros(3)}, "returned a tensor [3] for 'iou'"),
    "text": ({"iou": "high"}, "returned a str for 'iou'"),
    "key": ({1: 0.5}, "returned the key 1"),
}


@pytest.mark.parametrize("name", KINDS)
def test_what_is_no_metric_is_named(name: str, compilation: Compilation) -> None:
    value, message = KINDS[name]

    def metrics(outputs: Tensor, batch: Any) -> Any:
        return value

    compilation.source.metrics = metrics
    with pytest.raises(InputError) as caught:
        evaluate(compilation, compilation.ir)
    assert caught.value.code == "metrics-kind"
    assert f"metrics() on eval_data() batch 0 {message}" in caught.value.message
    assert caught.value.location is not None
    assert caught.value.location.line == metrics.__code__.co_firstlineno


def test_a_metric_that_raises_names_its_line(compilation: Compilation) -> None:
    def metrics(outputs: Tensor, batch: Any) -> Any:
        raise ValueError("no such class")

    compilation.source.metrics = metrics
    with pytest.raises(InputError) as caught:
        evaluate(compilation, compilation.ir)
    assert "metrics() on eval_data() batch 0 raised ValueError: no such class" in str(caught.value)
    assert caught.value.location is not None
    assert caught.value.location.line == metrics.__code__.co_firstlineno + 1


class Picky(nn.Module):
    """A backbone in a model that checks what it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.body = TinyViT(Shape(depth=1))

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[0] == 1:
            raise ValueError("one image is not enough")
        return self.body(x)


def test_the_users_part_of_the_model_names_its_line_when_it_raises() -> None:
    data = [*labelled(1), (images(1), torch.tensor([1]))]
    compilation = begin(seeded(Picky), images(2), make_rules(), eval_data=data, scope="body")
    run_until(compilation, "trace")
    with pytest.raises(InputError) as caught:
        evaluate(compilation, compilation.ir)
    assert caught.value.code == "forward-failed"
    assert "forward() on eval_data() batch 1 raised ValueError: one image" in caught.value.message
    assert caught.value.location is not None
    assert caught.value.location.file.endswith("test_metrics.py")


# --- what becomes of them -------------------------------------------------------------------------


def test_the_report_and_the_terminal_have_every_stage() -> None:
    result = compile_model(
        seeded(TinyViT, Shape(depth=1)),
        (images(2),),
        rules=make_rules(),
        calibration_data=labelled(1),
        eval_data=labelled(2),
        metrics=lambda outputs, batch: {"spread": outputs.std(), "peak": outputs.amax()},
        finetune=False,
    )
    metrics = result.report["metrics"]
    assert (
        list(metrics) == list(result.report["accuracy"]) == ["dense", "sparse", "quantized", "onnx"]
    )
    assert all(list(found) == ["spread", "peak"] for found in metrics.values())
    assert metrics["dense"] != metrics["sparse"] != metrics["quantized"]
    assert metrics["onnx"]["peak"] == pytest.approx(metrics["quantized"]["peak"], rel=0.02)
    stream = StringIO()
    show_report(result.report, Console(file=stream, width=200))
    text = stream.getvalue()
    assert "top-1: dense " in text
    assert f"spread: dense {metrics['dense']['spread']:.4g}, sparse " in text
    assert f"peak: dense {metrics['dense']['peak']:.4g}, sparse " in text


def test_a_gate_on_top1_says_that_metrics_are_not_compared(compilation: Compilation) -> None:
    give(compilation, [inputs for inputs, _ in UNEVEN])
    compilation.source.metrics = lambda outputs, batch: {"iou": 0.5, "dice": 0.5}
    for stage in ("dense", "onnx"):
        measure(compilation, stage, compilation.ir)
    report = make_report(compilation, None, Path("none"))
    with pytest.raises(CheckFailed, match=r"metrics\(\) \(iou, dice\) are reported, and no gate"):
        check_gates(report, Gates(max_drop=1.0))


def test_a_gate_on_top1_is_refused_at_once_where_there_are_metrics_alone() -> None:
    with pytest.raises(InputError) as caught:
        compile_model(
            seeded(TinyViT, Shape(depth=1)),
            (images(2),),
            rules=make_rules(),
            calibration_data=labelled(1),
            eval_data=[(images(2), {"masks": torch.zeros(2, 8, 8)})],
            metrics=lambda outputs, batch: {"iou": 0.5},
            finetune=False,
            gates=Gates(max_drop=1.0),
        )
    assert caught.value.code == "no-labelled-eval-data"
    assert "eval_data() yields no class indices [batch]" in caught.value.message
    assert "metrics() are reported, but no gate compares them" in caught.value.message
