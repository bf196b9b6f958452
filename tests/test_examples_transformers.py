"""DETR, Deformable DETR and UperNet compile whole, and train by their own losses."""

from __future__ import annotations

import pytest

from gpusq_compile.api import CompileResult
from tests.example_files import check_compiled, compile_example, taps

MODELS = {
    "detr_r50": (37, ["patch_embed", *["stage_end"] * 2, "final_projection"]),
    "deformable_detr_r50": (31, ["patch_embed", *["stage_end"] * 3, "final_projection"]),
    "upernet_swin": (40, ["patch_embed", *["stage_end"] * 4, "final_projection"]),
}
"""How many layers are compressed, and the taps."""

RUNS = [(name, rules) for name in MODELS for rules in ("int8", "int4")]


@pytest.fixture(scope="module", params=RUNS, ids=" by ".join)
def compiled(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[str, CompileResult]:
    name, rules = request.param
    return name, compile_example(name, rules, output=tmp_path_factory.mktemp(name))


def test_the_whole_model_compiles_and_trains(compiled: tuple[str, CompileResult]) -> None:
    name, result = compiled
    check_compiled(name, result, marked=MODELS[name][0])
    assert set(result.report["metrics"]) == {"dense", "sparse", "quantized", "onnx"}


def test_the_taps_are_the_ends_of_its_stages(compiled: tuple[str, CompileResult]) -> None:
    name, result = compiled
    assert taps(result) == MODELS[name][1]


def test_no_operator_needs_the_whole_graph_decomposed(compiled: tuple[str, CompileResult]) -> None:
    [exported] = [step for step in compiled[1].report["passes"] if step["name"] == "export_onnx"]
    assert not [remark for remark in exported["remarks"] if remark["code"] == "decomposed"]
