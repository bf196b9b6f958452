"""Compiling the example model files at their smallest."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from gpusq_compile import compile_model
from gpusq_compile.api import CompileResult
from gpusq_compile.lowering.runtime import open_session

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
SMALLEST = {
    "SWIN": "mini",
    "DETR": "tiny",
    "DEFORMABLE_DETR": "tiny",
    "UPERNET": "mini",
    "IMAGE_SIZE": "128",
}


def compile_example(
    patch: pytest.MonkeyPatch, name: str, rules: str | Path, **options: Any
) -> CompileResult:
    """Two steps of each phase, on the example's own data and by its own loss."""
    for variable, value in SMALLEST.items():
        patch.setenv(variable, value)
    return compile_model(EXAMPLES / f"{name}.py", rules=rules, steps=2, **options)


def check_compiled(result: CompileResult, *, marked: int) -> None:
    """`marked` layers are sparse and quantized, the file agrees with the graph, and it trained."""
    report = result.report
    layers = [layer for layer in report["layers"] if layer["applied"]["sparsity"]]
    assert len(layers) == marked
    assert all(layer["mask_ok"] and layer["applied"]["weight"] for layer in layers)
    assert report["verify"]["ok"]
    for phase in ("sparse", "quantize"):
        assert report["finetune"][phase]["steps"] == 2
        # Without a loss of the example's own there is none of hard labels.
        assert report["finetune"][phase]["loss"][0]["hard"] > 0
    assert result.onnx_model is not None
    session = open_session(result.onnx_model.SerializeToString())
    [image] = session.get_inputs()
    for count in (1, 3):
        pictures = torch.zeros(count, *image.shape[1:]).numpy()
        outputs = session.run(None, {image.name: pictures})
        assert all(len(output) == count for output in outputs)


def taps(result: CompileResult) -> list[str]:
    """The roles of the taps, in graph order."""
    [step] = [step for step in result.report["passes"] if step["name"] == "tap"]
    return [remark["reason"].split(",")[0] for remark in step["remarks"]]
