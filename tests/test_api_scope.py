"""A submodule of a user's model is compiled, trained inside it, and goes back into it."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from gpusq_compile import CompileResult, InputError, compile_model
from gpusq_compile.network import Network
from tests.compilations import EVERYTHING, TAPS, make_rules, session_of
from tests.models import (
    Detector,
    TinyViT,
    images,
    labelled,
    noise,
    seeded,
)

DATA, HELD_OUT = labelled(3), labelled(3, seed=2)
LAYERS = ["stem"] + [f"layers.0.{n}" for n in ("mix.wide", "mix.back", "feed.up", "feed.down")]


def detections() -> list[tuple[Tensor, Tensor]]:
    return DATA


@pytest.fixture(scope="module")
def detector(tmp_path_factory: pytest.TempPathFactory) -> tuple[Detector, CompileResult]:
    wrapper: Detector = seeded(Detector)
    found = compile_model(
        wrapper,
        (images(2),),
        rules=make_rules(
            TAPS, {**EVERYTHING, "match": {"op": "linear", "in_features": {"multiple_of": 32}}}
        ),
        scope="backbone",
        output=tmp_path_factory.mktemp("detector"),
        train_data=detections,
        calibration_data=detections,
        eval_data=HELD_OUT,
        logits=lambda outputs: outputs["classes"],
        steps=2,
        engine="none",
    )
    return wrapper, found


def test_only_the_scope_is_compiled_and_written(detector: tuple[Detector, CompileResult]) -> None:
    wrapper, result = detector
    assert result.report["scope"] == "backbone"
    assert [layer["name"] for layer in result.report["layers"]] == LAYERS
    assert result.onnx_model is not None
    [value] = result.onnx_model.graph.input
    assert value.name == "x"  # The backbone is called by keyword.
    [features] = session_of(result).run(None, {"x": images(3).numpy()})
    assert features.shape == (3, 4, 32)
    assert result.report["accuracy"]["onnx"] is not None
    assert isinstance(wrapper.backbone, TinyViT)


def test_the_scope_was_trained_inside_the_users_model(
    detector: tuple[Detector, CompileResult],
) -> None:
    _, result = detector
    for phase in ("sparse", "quantize"):
        report = result.report["finetune"][phase]
        assert report["steps"] == 2
        assert report["loss"][0]["hard"] > 0  # The loss is on the wrapper's own logits.
    trained = result.state_dict()["backbone.last_norm.weight"]
    assert not torch.equal(trained, seeded(Detector).backbone.last_norm.weight)


def test_the_compiled_scope_goes_back_into_the_users_model_and_its_own_loss(
    detector: tuple[Detector, CompileResult],
) -> None:
    wrapper, result = detector
    dense = copy.deepcopy(wrapper)
    inside = copy.deepcopy(wrapper)
    inside.backbone = copy.deepcopy(result.graph)  # type: ignore[assignment]
    with torch.no_grad():
        ours, theirs = inside(images(8))["classes"], dense(images(8))["classes"]
    assert torch.nn.functional.cosine_similarity(ours, theirs).min() > 0.5
    inside.train()
    loss = inside(images(8))["boxes"].square().mean()
    loss.backward()
    assert inside.boxes.weight.grad is not None


def test_the_scopes_weights_go_back_into_the_whole_model(
    detector: tuple[Detector, CompileResult],
) -> None:
    wrapper, result = detector
    eager = copy.deepcopy(wrapper)
    state = result.state_dict()
    missing, unexpected = eager.load_state_dict(state, strict=False)
    assert unexpected == []
    assert [name for name in missing if name.startswith("backbone.")] == []
    assert torch.equal(eager.backbone.stem.weight, state["backbone.stem.weight"])


def test_outputs_that_hold_no_logits_are_an_error_of_the_fine_tune() -> None:
    with pytest.raises(InputError) as caught:
        compile_model(
            seeded(Detector), (images(2),), rules=make_rules(EVERYTHING), scope="backbone",
            train_data=DATA, calibration_data=DATA, steps=1,
        )  # fmt: skip
    assert caught.value.code == "no-logits"
    assert "[8, 4], [8, 10]" in caught.value.message
    assert "logits(outputs)" in str(caught.value.hint)


def test_what_a_scope_is_called_with_needs_no_more_of_the_model() -> None:
    class Around(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.finished = nn.Linear(4, 4), 0

        def forward(self, x: Tensor) -> Tensor:
            try:
                found: Tensor = self.inner(2 * x)
            except Exception:
                found = x
            self.finished += 1
            return found

    model, given = Around(), noise(2, 4)
    network = Network(model, "inner")
    [value], keywords = network.scoped_inputs((given,))
    assert torch.equal(value, 2 * given)
    assert (keywords, model.finished) == ({}, 0)
    model(given)
    assert model.finished == 1, "what stopped it is gone"
