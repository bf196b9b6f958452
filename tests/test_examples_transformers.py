"""DETR, Deformable DETR and UperNet compile whole, and train by their own losses."""

from __future__ import annotations

import pytest

from gpusq_compile.api import CompileResult
from tests.example_files import check_compiled, compile_example, taps

MODELS = {
    "detr_r50": ("int8", 37, ["patch_embed", "stage_end", "stage_end", "final_projection"]),
    "deformable_detr_r50": (
        "int4",
        31,
        ["patch_embed", "stage_end", "stage_end", "final_projection"],
    ),
    "upernet_swin": ("int8", 40, ["patch_embed"] + ["stage_end"] * 4),
}


@pytest.fixture(scope="module", params=MODELS)
def compiled(request: pytest.FixtureRequest) -> tuple[str, CompileResult]:
    with pytest.MonkeyPatch.context() as patch:
        return request.param, compile_example(patch, request.param, MODELS[request.param][0])


def test_the_whole_model_compiles_and_trains(compiled: tuple[str, CompileResult]) -> None:
    name, result = compiled
    check_compiled(result, marked=MODELS[name][1])
    assert set(result.report["metrics"]) == {"dense", "sparse", "quantized", "onnx"}


def test_the_taps_are_the_ends_of_its_stages(compiled: tuple[str, CompileResult]) -> None:
    name, result = compiled
    assert taps(result)[: len(MODELS[name][2])] == MODELS[name][2]


def test_no_operator_needs_the_whole_graph_decomposed(compiled: tuple[str, CompileResult]) -> None:
    [exported] = [step for step in compiled[1].report["passes"] if step["name"] == "export_onnx"]
    assert not [remark for remark in exported["remarks"] if remark["code"] == "decomposed"]
