"""The digits example keeps the contract of a model file, and its weights are good."""

from __future__ import annotations

import importlib.util
import shutil
from collections.abc import Iterable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

EXAMPLE = Path(__file__).resolve().parents[1] / "examples" / "digits_vit.py"


def load(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def digits() -> ModuleType:
    return load(EXAMPLE)


def images_of(batches: Iterable[Any]) -> Tensor:
    return torch.cat([images for images, _ in batches])


def as_rows(images: Tensor) -> set[bytes]:
    return {image.numpy().tobytes() for image in images}


def test_the_shipped_weights_reach_95_percent_on_the_held_out_images(digits: ModuleType) -> None:
    model = digits.model()
    with torch.no_grad():
        hits = [model(images).argmax(1) == labels for images, labels in digits.eval_data()]
    assert torch.cat(hits).float().mean().item() >= 0.95


def test_the_weights_are_under_two_megabytes(digits: ModuleType) -> None:
    assert digits.WEIGHTS.stat().st_size < 2_000_000


def test_sixteen_linears_or_more_have_sizes_in_multiples_of_32(digits: ModuleType) -> None:
    linears = [module for module in digits.model().modules() if isinstance(module, nn.Linear)]
    eligible = [m for m in linears if m.in_features % 32 == 0 and m.out_features % 32 == 0]
    assert len(eligible) >= 16


def test_example_inputs_are_what_the_model_takes(digits: ModuleType) -> None:
    inputs = digits.example_inputs()
    assert isinstance(inputs, tuple)
    logits = digits.model()(*inputs)
    assert logits.shape == (len(inputs[0]), digits.CLASSES)
    images, labels = next(iter(digits.eval_data()))
    assert inputs[0].shape[1:] == images.shape[1:]
    assert inputs[0].dtype == images.dtype == torch.float32
    assert labels.dtype == torch.int64


@pytest.mark.parametrize("name", ["train_data", "calibration_data", "eval_data"])
def test_data_can_be_gone_through_twice(digits: ModuleType, name: str) -> None:
    batches = getattr(digits, name)()
    first, second = (sum(len(labels) for _, labels in batches) for _ in range(2))
    assert first == second == (360 if name == "eval_data" else 1437)


def test_the_held_out_images_are_in_neither_training_nor_calibration(digits: ModuleType) -> None:
    held_out = as_rows(images_of(digits.eval_data()))
    assert held_out.isdisjoint(as_rows(images_of(digits.calibration_data())))
    # What training draws from, before it moves the images.
    assert held_out.isdisjoint(as_rows(torch.stack([x for x, _ in digits.train_data().dataset])))


def test_the_held_out_part_is_the_same_in_every_process_and_balanced(digits: ModuleType) -> None:
    torch.manual_seed(1)
    first = [labels for _, labels in digits.eval_data()]
    torch.manual_seed(2)
    again = [labels for _, labels in load(EXAMPLE).eval_data()]
    assert torch.equal(torch.cat(first), torch.cat(again))
    assert torch.cat(first).bincount().tolist() == [36] * 10


def test_training_order_and_shifts_follow_the_global_seed(digits: ModuleType) -> None:
    def epoch(seed: int) -> Tensor:
        torch.manual_seed(seed)
        return images_of(digits.train_data())

    assert torch.equal(epoch(3), epoch(3))
    assert not torch.equal(epoch(3), epoch(4))


def test_training_images_move_by_one_pixel_at_most(digits: ModuleType) -> None:
    torch.manual_seed(0)
    still, label = digits.train_data().dataset[0]
    moved, _ = digits._shifted([(still, label)] * 200)
    dark = (0.0 - digits.PIXEL_MEAN) / digits.PIXEL_STD
    framed = nn.functional.pad(still, (1, 1, 1, 1), value=dark)
    allowed = {
        framed[:, down : down + 8, right : right + 8].contiguous().numpy().tobytes()
        for down in range(3)
        for right in range(3)
    }
    assert as_rows(moved) == allowed


def test_pixels_are_normalised_over_the_training_images(digits: ModuleType) -> None:
    images = images_of(digits.calibration_data())
    assert images.mean().item() == pytest.approx(0.0, abs=1e-3)
    assert images.std().item() == pytest.approx(1.0, abs=1e-3)


def test_exports_with_a_dynamic_batch(digits: ModuleType) -> None:
    model, inputs = digits.model(), digits.example_inputs()
    shapes = ({0: torch.export.Dim("batch")},)
    traced = torch.export.export(model, inputs, dynamic_shapes=shapes).module()
    images = torch.randn(7, *inputs[0].shape[1:])
    torch.testing.assert_close(traced(images), model(images))


def test_missing_weights_are_named_with_the_command_that_makes_them(tmp_path: Path) -> None:
    copy = Path(shutil.copy(EXAMPLE, tmp_path))
    with pytest.raises(FileNotFoundError, match=r"digits_vit\.safetensors.*train_digits_vit\.py"):
        load(copy).model()
