"""The user's own loss: called with the compiled graph inside his model, which it cannot harm."""

from __future__ import annotations

import random
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gpusq_compile import compile_model
from gpusq_compile.api import CompileResult
from gpusq_compile.compilation import Compilation
from gpusq_compile.data import Batch, batches, check_data, require_train_data
from gpusq_compile.errors import InputError
from gpusq_compile.finetune.taps import features_of, listen, taps_of
from gpusq_compile.finetune.user_loss import UserLoss, has_logits, user_loss
from gpusq_compile.sources.losses import torchvision_detection_loss
from gpusq_compile.user_code import call_user
from tests.compilations import LINEARS, TAPS, begin, make_rules, run_until
from tests.detectors import (
    TinySegmenter,
    best_overlap,
    detector_loss,
    masks,
    pixel_accuracy,
    pixel_loss,
    squares,
    tiny_detector,
)
from tests.models import Shape, TinyViT, images, labelled, seeded

WHERE = "train_data() batch of step 1"
PICTURES = ([torch.rand(3, 64, 64), torch.rand(3, 64, 64)],)


def trains(beta: float = 1.0, **rest: Any) -> dict[str, Any]:
    """Rules that prune, quantize and train; `beta` weighs the soft logits."""
    finetune = {
        "loss": {"alpha": 1.0, "beta": beta, "gamma": 1.0},
        "sparse": {"epochs": 5, "lr": 1e-2},
        "quantize": {"epochs": 5, "lr": 3e-3},
    }
    return make_rules(LINEARS, TAPS, finetune=finetune, **rest)


def halves(result: CompileResult, phase: str) -> tuple[float, float]:
    """The mean of the user's loss over the first and the last third of a phase."""
    curve = [point["hard"] for point in result.report["finetune"][phase]["loss"]]
    third = len(curve) // 3
    return sum(curve[:third]) / third, sum(curve[-third:]) / third


# --- whole compilations --------------------------------------------------------------------------


@pytest.fixture(scope="module")
def detected() -> CompileResult:
    return compile_model(
        tiny_detector(),
        PICTURES,
        rules=trains(scope="backbone.body"),
        train_data=squares(4),
        calibration_data=squares(2),
        eval_data=squares(2, seed=5),
        loss=detector_loss,
        metrics=best_overlap,
    )


def test_a_detector_trains_by_its_own_losses_in_both_phases(detected: CompileResult) -> None:
    for phase in ("sparse", "quantize"):
        first, last = halves(detected, phase)
        assert last < first
    assert detected.report["finetune"]["sparse"]["images"] == 5 * 4 * 2
    assert all(layer["mask_ok"] for layer in detected.report["layers"])


def test_a_detector_is_measured_at_every_stage(detected: CompileResult) -> None:
    assert list(detected.report["metrics"]) == ["dense", "sparse", "quantized", "onnx"]
    assert all(0 < found["overlap"] < 1 for found in detected.report["metrics"].values())
    assert set(detected.report["accuracy"].values()) == {None}


def test_the_compiled_body_detects_inside_the_users_own_model(detected: CompileResult) -> None:
    detector = tiny_detector()
    detector.backbone.body = detected.graph
    measured = [best_overlap(detector(list(batch[0])), batch) for batch in squares(2, seed=5)]
    mean = sum(found["overlap"] for found in measured) / 2
    assert mean == pytest.approx(detected.report["metrics"]["onnx"]["overlap"], abs=1e-3)


def test_a_segmenter_trains_by_the_loss_of_its_pixels() -> None:
    result = compile_model(
        seeded(TinySegmenter),
        (torch.zeros(2, 3, 64, 64),),
        rules=trains(beta=0.0),
        train_data=masks(6),
        eval_data=masks(2, seed=5),
        loss=pixel_loss,
        metrics=pixel_accuracy,
        logits=lambda outputs: outputs.permute(0, 2, 3, 1).flatten(0, 2),
    )
    for phase in ("sparse", "quantize"):
        first, last = halves(result, phase)
        assert last < 0.8 * first
    accuracy = {stage: found["pixel_accuracy"] for stage, found in result.report["metrics"].items()}
    assert accuracy["dense"] < 0.6
    assert accuracy["onnx"] > 0.9
    # The logits are of pixels: there is no top-1 of images to compare or to agree on.
    assert result.report["accuracy"]["onnx"] is None
    assert result.report["verify"]["numerics"]["top1_agreement"] is None


def test_batches_of_any_form_calibrate_without_a_fine_tune() -> None:
    """Where nothing is trained, the train data is still what there is to calibrate from."""
    result = compile_model(
        tiny_detector(),
        PICTURES,
        rules=trains(scope="backbone.body"),
        train_data=squares(2),
        loss=detector_loss,
        finetune=False,
    )
    assert all(layer["applied"] for layer in result.report["layers"] if layer["op"] == "linear")


# --- one call -------------------------------------------------------------------------------------


def tapped(
    model: nn.Module, inputs: Any, loss: Any, train_data: Any, scope: str | None = None
) -> Compilation:
    compilation = begin(
        model, inputs, make_rules(LINEARS, TAPS), train_data=train_data, scope=scope, data=[]
    )
    compilation.source.loss = loss
    compilation.source.calibration_data = None
    check_data(compilation.source, finetune=True, scoped=scope is not None)
    return run_until(compilation, "tap")


def first_batch(compilation: Compilation) -> Batch:
    factory = require_train_data(compilation.source, "sparse")
    return next(batches(factory, "train_data", compilation.device))


@pytest.fixture(scope="module")
def detector() -> Compilation:
    compilation = tapped(tiny_detector(), PICTURES, detector_loss, squares(2), "backbone.body")
    compilation.ir.requires_grad_(True)
    return compilation


@pytest.fixture(scope="module")
def classifier() -> Compilation:
    """A whole model without a scope; tests call it with losses of their own."""
    compilation = tapped(seeded(TinyViT, Shape(depth=1)), images(2), pixel_loss, labelled(2))
    compilation.ir.requires_grad_(True)
    return compilation


def call(compilation: Compilation, loss: Any, batch: Batch | None = None) -> UserLoss:
    """`user_loss` with another loss than the one that the model came with."""
    usual = compilation.source.loss
    compilation.source.loss = loss
    try:
        return user_loss(compilation, compilation.ir, batch or first_batch(compilation), WHERE)
    finally:
        compilation.source.loss = usual


def test_gradients_reach_the_graph_and_nothing_around_it(detector: Compilation) -> None:
    found = user_loss(detector, detector.ir, first_batch(detector), WHERE)
    found.loss.backward()
    reached = {name for name, p in detector.ir.named_parameters() if p.grad is not None}
    assert {"stem.weight", "layers.1.feed.down.weight", "last_norm.bias"} <= reached
    around = [p for n, p in detector.network.root.named_parameters() if "backbone.body" not in n]
    assert around
    assert all(p.grad is None for p in around)


def test_the_model_around_the_graph_is_left_as_it_was(detector: Compilation) -> None:
    root = detector.network.root
    before = {name: value.clone() for name, value in root.named_buffers()}
    assert "backbone.norm.running_mean" in before
    for _ in range(2):
        user_loss(detector, detector.ir, first_batch(detector), WHERE)
        assert not any(module.training for module in root.modules())
        assert root.get_submodule("backbone.body") is detector.network.original
        after = dict(root.named_buffers())
        assert all(torch.equal(before[name], after[name]) for name in before)


def test_it_is_left_as_it_was_when_the_loss_raises(detector: Compilation) -> None:
    def fails(model: nn.Module, batch: Any) -> Tensor:
        detector_loss(model, batch)
        raise ValueError("after the forward pass")

    before = {name: value.clone() for name, value in detector.network.root.named_buffers()}
    with pytest.raises(InputError, match="after the forward pass"):
        call(detector, fails)
    after = dict(detector.network.root.named_buffers())
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert detector.network.root.get_submodule("backbone.body") is detector.network.original
    assert not detector.network.root.training


def test_teacher_and_student_see_the_same_random_numbers(detector: Compilation) -> None:
    batch = first_batch(detector)
    torch.manual_seed(3)
    with torch.no_grad():
        teacher = user_loss(detector, detector.ir, batch, WHERE).loss
    student = user_loss(detector, detector.ir, batch, WHERE).loss
    assert float(student.detach()) == float(teacher)


def test_random_numbers_go_on_from_batch_to_batch(classifier: Compilation) -> None:
    drawn: list[tuple[float, float, float]] = []

    def loss(model: nn.Module, batch: Any) -> Tensor:
        drawn.append((float(torch.rand(())), float(np.random.rand()), random.random()))
        return F.cross_entropy(model(batch[0]), batch[1])

    for _ in range(2):
        with torch.no_grad():
            call(classifier, loss)
        call(classifier, loss)
    assert drawn[0] == drawn[1]
    assert drawn[2] == drawn[3]
    assert all(one != other for one, other in zip(drawn[0], drawn[2], strict=True))


def test_the_taps_show_what_the_loss_ran(detector: Compilation) -> None:
    listen(detector.ir)
    user_loss(detector, detector.ir, first_batch(detector), WHERE)
    features = features_of(taps_of(detector.ir))
    listen(detector.ir, False)
    assert features
    assert all(feature.shape[0] == 2 and feature.requires_grad for feature in features)


def test_the_models_logits_can_be_distilled(classifier: Compilation) -> None:
    batch = first_batch(classifier)
    found = call(classifier, lambda model, batch: F.cross_entropy(model(batch[0]), batch[1]), batch)
    assert has_logits(classifier, found.outputs)
    with torch.no_grad():
        assert torch.equal(found.outputs, classifier.ir(batch.inputs[0]))


def test_a_detectors_losses_are_no_logits(detector: Compilation) -> None:
    found = user_loss(detector, detector.ir, first_batch(detector), WHERE)
    assert "loss_classifier" in found.outputs
    assert not has_logits(detector, found.outputs)


def test_a_loss_that_calls_a_part_of_the_model_has_no_outputs(detector: Compilation) -> None:
    def loss(model: Any, batch: Any) -> Tensor:
        found: Tensor = model.backbone(torch.stack(batch[0]).new_ones(2, 3, 64, 64))["0"]
        return found.square().mean()

    found = call(detector, loss)
    assert found.outputs is None
    assert not has_logits(detector, found.outputs)


def test_what_a_loss_takes_out_of_its_batch_is_there_for_the_next(classifier: Compilation) -> None:
    def loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        labels = batch.pop("labels")
        return F.cross_entropy(model(batch["x"]), labels)

    inputs, labels = labelled(1)[0]
    batch = Batch((inputs,), labels, {"x": inputs, "labels": labels})
    first, second = call(classifier, loss, batch), call(classifier, loss, batch)
    assert float(first.loss.detach()) == float(second.loss.detach())


def test_a_loss_that_is_not_finite_is_for_the_loop_to_judge(classifier: Compilation) -> None:
    found = call(classifier, lambda model, batch: model(batch[0]).sum() * float("nan"))
    assert found.loss.isnan()


def test_one_value_in_a_tensor_is_a_scalar(classifier: Compilation) -> None:
    found = call(classifier, lambda model, batch: model(batch[0]).mean().reshape(1, 1))
    assert found.loss.shape == ()


# --- what a loss may get wrong --------------------------------------------------------------------

KINDS: dict[str, tuple[Any, str, str]] = {
    "dict": (lambda y: {"cls": y.sum(), "box": y.sum()}, "a dict of cls, box", "losses.values()"),
    "None": (lambda y: None, "returned None", "no `return`"),
    "float": (lambda y: y.sum().item(), "returned a float", "item() and float() cut"),
    "vector": (lambda y: y.mean(dim=1), "a tensor of float32 [8]", "loss.mean()"),
    "integer": (lambda y: (y > 0).sum(), "a tensor of int64 []", "floating-point"),
    "detached": (lambda y: y.sum().detach(), "without a gradient", "detach()"),
    "tuple": (lambda y: (y.sum(), y), "a tuple of 2 items", "alone"),
    "outputs": (lambda y: SimpleNamespace(loss=y.sum()), "SimpleNamespace", "outputs.loss"),
}


@pytest.mark.parametrize("name", KINDS)
def test_what_is_no_loss_is_named_with_the_way_out(name: str, classifier: Compilation) -> None:
    make, found, hint = KINDS[name]

    def loss(model: nn.Module, batch: Any) -> Any:
        return make(model(batch[0]))

    with pytest.raises(InputError) as caught:
        call(classifier, loss)
    error = caught.value
    assert error.code == "loss-kind"
    assert found in error.message
    assert WHERE in error.message
    assert error.hint is not None
    assert hint in error.hint
    assert error.location is not None
    assert error.location.file.endswith("test_user_loss.py")
    assert error.location.line == loss.__code__.co_firstlineno


def test_a_loss_that_never_calls_the_graph_is_an_error(classifier: Compilation) -> None:
    with pytest.raises(InputError, match="never calls the model") as caught:
        call(classifier, lambda model, batch: torch.zeros((), requires_grad=True))
    assert caught.value.code == "loss-without-model"


def test_a_failure_in_a_librarys_loss_is_at_no_line_of_this_package() -> None:
    """The file of the loss is not the person's."""
    with pytest.raises(InputError) as caught:
        call_user(torchvision_detection_loss, None, "loss()", nn.Linear(1, 1), (PICTURES, []))
    assert caught.value.message.startswith("loss() raised TypeError: ")
    assert caught.value.location is None


def test_an_attribute_that_the_graph_lacks_points_to_scope(classifier: Compilation) -> None:
    with pytest.raises(InputError, match="forward_features") as caught:
        call(classifier, lambda model, batch: model.forward_features(batch[0]).sum())
    assert caught.value.hint is not None
    assert "--scope PATH" in caught.value.hint


def test_sizes_that_were_not_traced_are_named(detector: Compilation) -> None:
    batch = first_batch(detector)
    transform: Any = detector.network.root.get_submodule("transform")
    transform.min_size, transform.max_size = (96,), 96
    try:
        with pytest.raises(InputError) as caught:
            user_loss(detector, detector.ir, batch, WHERE)
    finally:
        transform.min_size, transform.max_size = (64,), 64
    assert caught.value.code == "traced-sizes"
    assert "[2, 3, 96, 96]" in caught.value.message
    assert "[any, 3, 64, 64]" in caught.value.message


@pytest.mark.parametrize("name", ["loss", "metrics", "logits"])
def test_functions_are_checked_for_their_arguments(name: str) -> None:
    def lonely() -> None: ...

    given: dict[str, Any] = {name: lonely}
    with pytest.raises(InputError) as caught:
        compile_model(seeded(TinyViT), (images(2),), rules="int8", **given)
    assert caught.value.code == "function-arguments"
    assert f"expected {name}(" in str(caught.value.hint)
    assert caught.value.location is not None
    assert caught.value.location.line == lonely.__code__.co_firstlineno
