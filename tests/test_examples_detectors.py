"""The backbones of both Mask R-CNN examples compile, and train by the detectors' losses."""

from __future__ import annotations

import math
import sys

import pytest
import torch

from gpusq_compile import InputError, compile_model
from gpusq_compile.api import CompileResult
from tests.example_files import EXAMPLES, check_compiled, compile_example, taps

DETECTORS = ("mask_rcnn_swin", "cascade_mask_rcnn_swin")
RUNS = [(name, rules) for name in DETECTORS for rules in ("int8", "int4")]


@pytest.fixture(scope="module", params=RUNS, ids=" by ".join)
def compiled(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[str, CompileResult]:
    name, rules = request.param
    output = tmp_path_factory.mktemp(name)
    return name, compile_example(name, EXAMPLES / f"swin_backbone_{rules}.yaml", output=output)


@pytest.mark.parametrize(
    ("file", "variable"),
    [
        ("mask_rcnn_swin", "SWIN"),
        ("detr_r50", "DETR"),
        ("deformable_detr_r50", "DEFORMABLE_DETR"),
        ("upernet_swin", "UPERNET"),
    ],
)
def test_a_size_that_is_none_is_named(
    file: str, variable: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("swin_fpn", file):
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.setenv(variable, "huge")
    with pytest.raises(InputError, match=f"{variable}=huge: the sizes are "):
        compile_model(EXAMPLES / f"{file}.py", rules="int8", dry_run=True)


def test_the_backbone_compiles_and_trains(compiled: tuple[str, CompileResult]) -> None:
    name, result = compiled
    check_compiled(name, result, marked=27)
    assert result.report["scope"] == "backbone"


def test_its_four_stages_and_each_level_of_the_pyramid_are_tapped(
    compiled: tuple[str, CompileResult],
) -> None:
    assert taps(compiled[1]) == ["patch_embed"] + ["stage_end"] * 4 + ["final_projection"] * 5


def test_of_the_pyramid_the_convolutions_of_one_pixel_are_compressed(
    compiled: tuple[str, CompileResult],
) -> None:
    pyramid = [layer for layer in compiled[1].report["layers"] if "fpn" in layer["name"]]
    pointwise = [layer for layer in pyramid if layer["shape"][2:] == [1, 1]]
    assert (len(pyramid), len(pointwise)) == (8, 4)
    assert all(
        (layer["applied"]["sparsity"] is not None) == (layer in pointwise) for layer in pyramid
    )


def test_a_cascade_refines_boxes_stage_by_stage(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SWIN", "mini")
    monkeypatch.syspath_prepend(str(EXAMPLES))
    import cascade_mask_rcnn_swin as cascade  # type: ignore[import-not-found]

    detector = cascade.model()
    pictures, targets = cascade.train_data()[0]
    stages = detector.roi_heads.stages
    assert [stage.proposal_matcher.high_threshold for stage in stages] == [0.5, 0.6, 0.7]
    spreads = [stage.box_coder.weights[0] for stage in stages]
    assert spreads == sorted(spreads)
    detector.train()
    losses = detector(pictures, targets)
    assert {f"loss_box_reg_{index}" for index in range(3)} < set(losses)
    torch.stack(list(losses.values())).sum().backward()
    reached = {n for n, p in detector.roi_heads.named_parameters() if p.grad is not None}
    assert reached == {n for n, _ in detector.roi_heads.named_parameters()}
    detector.eval()
    with torch.no_grad():
        found = detector(pictures)
    for image in found:
        assert image["masks"].shape[1:] == (1, 128, 128)
        assert all(0 <= score <= 1 and math.isfinite(score) for score in image["scores"])
    assert "cascade_mask_rcnn_swin" in sys.modules
