"""Compiling the example model files at their smallest."""

from __future__ import annotations

import importlib
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from gpusq_compile import compile_model
from gpusq_compile.api import CompileResult
from gpusq_compile.load_model import load_source
from gpusq_compile.model_source import ModelSource
from tests.family_checks import (
    check_engine,
    check_masks,
    check_numbers,
    check_trained,
    compressed_layers,
    parameters_of,
)

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
STEPS = 2
SMALLEST = {
    "SWIN": "mini",
    "DETR": "tiny",
    "DEFORMABLE_DETR": "tiny",
    "UPERNET": "mini",
    "IMAGE_SIZE": "128",
}


def smallest(name: str) -> ModelSource:
    """An example of the smallest size, its weights as they are before a compile."""
    with pytest.MonkeyPatch.context() as patch:
        for variable, value in SMALLEST.items():
            patch.setenv(variable, value)
        return load_source(str(EXAMPLES / f"{name}.py"))


def compile_example(name: str, rules: str | Path, **options: Any) -> CompileResult:
    """Two steps of each phase on the example's own data and by its own loss, and an engine."""
    chosen = {"steps": STEPS, "engine": "tensorrt-rtx", **options}
    with pytest.MonkeyPatch.context() as patch:
        for variable, value in SMALLEST.items():
            patch.setenv(variable, value)
        return compile_model(EXAMPLES / f"{name}.py", rules=rules, **chosen)


@cache
def photographs(count: int = 3) -> Tensor:
    """Windows of photographs [count, 3, 128, 128] that no example trains or is verified on."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(EXAMPLES))
        photos = importlib.import_module("photos")
    images: Tensor = photos.normalized([image for image, _ in photos.samples(count, 128, seed=9)])
    return images


def check_compiled(name: str, result: CompileResult, *, marked: int) -> None:
    """`marked` layers are sparse and quantized, it trained, and its files compute the same."""
    assert len(compressed_layers(result)) == marked
    check_masks(result)
    check_trained(result, parameters_of(smallest(name).module), steps=STEPS)
    check_numbers(result, photographs())
    check_engine(result)


def taps(result: CompileResult) -> list[str]:
    """The roles of the taps, in graph order."""
    [step] = [step for step in result.report["passes"] if step["name"] == "tap"]
    return [remark["reason"].split(",")[0] for remark in step["remarks"]]
