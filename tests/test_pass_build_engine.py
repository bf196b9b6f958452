"""build_engine: what each layer should become is asked for, and what it became is told."""

from __future__ import annotations

from pathlib import Path

import pytest

from gpusq_compile.compilation import Compilation
from gpusq_compile.errors import GpusqError
from gpusq_compile.passes.build_engine import marked_gemms
from gpusq_compile.plan import LayerPlan
from gpusq_compile.remarks import Kind
from tests.compilations import SPARSE, begin, fork, make_rules, remarks_of, run_until
from tests.models import Shape, TinyViT, images, labelled, seeded

try:
    import tensorrt_rtx  # noqa: F401

    MISSING = ""
except Exception as error:
    MISSING = f"tensorrt_rtx cannot be imported: {error}"


@pytest.fixture(scope="module")
def verified(tmp_path_factory: pytest.TempPathFactory) -> Compilation:
    model = seeded(TinyViT, Shape(depth=1, dim=64))
    workdir = tmp_path_factory.mktemp("engine")
    compilation = begin(model, images(4), "int8", workdir, data=labelled(2))
    return run_until(compilation, "verify_onnx")


def plan(**applied: str | None) -> LayerPlan:
    return LayerPlan("layer", "linear", (), "layer.weight", (32, 32)).apply(**applied)


INT8_OUT = dict.fromkeys(("weight", "activation", "output"), "int8")
INT4_OUT = {"weight": "int4", "activation": "int4", "output": "int8"}


@pytest.mark.parametrize(
    ("applied", "expected", "sparse"),
    [
        ({**INT8_OUT, "sparsity": "2:4"}, "int8", True),
        # With a float output there is no sparse kernel.
        ({**INT8_OUT, "output": None, "sparsity": "2:4"}, "int8", False),
        ({"weight": "int8", "activation": "int8"}, "int8", False),
        # INT4 values are stored and multiplied as INT8.
        ({**INT4_OUT, "sparsity": "2:4"}, "int8", True),
        ({"weight": "int4", "activation": "int8"}, "int8", False),
        ({"weight": "int4"}, "fp16", False),
        # A weight alone is dequantized before the GEMM, which computes in the target's precision.
        ({"weight": "int8"}, "fp16", False),
        ({"activation": "int8"}, "fp16", False),
        ({"sparsity": "2:4"}, "fp16", True),
        ({**INT4_OUT, "sparsity": "portable"}, "int8", True),
        ({"sparsity": "portable"}, "fp16", True),
        # No kernel of TensorRT takes pairs out of eight.
        ({**INT4_OUT, "sparsity": "pair4:8"}, "int8", False),
        ({"sparsity": "pair4:8"}, "fp16", False),
        ({"weight": "int8", "sparsity": "2:4"}, "fp16", False),
    ],
)
def test_a_layer_is_expected_in_the_type_its_plan_leads_to(
    applied: dict[str, str | None], expected: str, sparse: bool
) -> None:
    [gemm] = marked_gemms([plan(**applied)], "fp16", ["sm86"])
    assert (gemm.name, gemm.expected, gemm.sparse) == ("layer", expected, sparse)


@pytest.mark.parametrize(
    ("targets", "sparse"), [(["sm90"], True), (["sm86", "sm90"], True), (["sm86"], False)]
)
def test_a_layer_is_sparse_where_one_target_has_kernels_for_it(
    targets: list[str], sparse: bool
) -> None:
    layer = plan(weight="int8", activation="int8", sparsity="2:4")
    [gemm] = marked_gemms([layer], "fp16", targets)
    assert (gemm.expected, gemm.sparse) == ("int8", sparse)


def test_layers_that_were_left_alone_are_expected_to_be_nothing() -> None:
    assert marked_gemms([plan()], "fp16", ["sm86"]) == []


def test_no_engine_is_built_where_none_was_asked_for(verified: Compilation) -> None:
    compilation = run_until(fork(verified), "build_engine")
    record = compilation.records[-1]
    assert (record.matched, record.changed, record.skipped) == (5, 0, 5)
    assert compilation.engine is not None
    assert compilation.engine.targets == {}
    assert remarks_of(compilation, "build_engine", Kind.MISSED) == []
    assert not list(compilation.workdir.rglob("*.plan"))


@pytest.mark.skipif(bool(MISSING), reason=MISSING or "tensorrt_rtx is here")
def test_every_planned_layer_is_int8_in_a_real_engine(
    verified: Compilation, tmp_path: Path
) -> None:
    compilation = fork(verified)
    (tmp_path / "model.onnx").write_bytes((verified.workdir / "model.onnx").read_bytes())
    compilation.workdir = tmp_path
    compilation.options = type(compilation.options)(finetune=False, engine="tensorrt-rtx")
    run_until(compilation, "build_engine")
    assert compilation.engine is not None
    assert list(tmp_path.rglob("*.plan"))
    for engine in compilation.engine.targets.values():
        assert {gemm.name: gemm.actual for gemm in engine.gemms} == {
            name: "int8"
            for name in (
                "stem",
                *(f"layers.0.{n}" for n in ("mix.wide", "mix.back", "feed.up", "feed.down")),
            )
        }
    assert remarks_of(compilation, "build_engine", Kind.MISSED) == []


@pytest.mark.skipif(bool(MISSING), reason=MISSING or "tensorrt_rtx is here")
@pytest.mark.parametrize("output", ["int8", "int4"])
def test_four_bit_layers_are_int8_in_a_real_engine(output: str, tmp_path: Path) -> None:
    four = {"weight": "int4", "activation": "int4", "output": output}
    rule = {"id": "all", "match": {"op": "linear"}, "sparsity": SPARSE, "quantize": four}
    # Random weights: what 4 bits do to the outputs is not the question here.
    loose = {"min_cosine": -1, "min_top1_agreement": 0, "max_difference": 100}
    document = make_rules(rule, precision="fp16", verify=loose)
    model = seeded(TinyViT, Shape(depth=1, dim=64))
    compilation = begin(model, images(4), document, tmp_path, data=labelled(2))
    compilation.options = type(compilation.options)(finetune=False, engine="tensorrt-rtx")
    run_until(compilation, "build_engine")
    assert compilation.engine is not None
    [engine] = compilation.engine.targets.values()
    assert {gemm.actual for gemm in engine.gemms} == {"int8"}
    assert len(engine.gemms) >= 5
    assert remarks_of(compilation, "build_engine", Kind.MISSED) == []


@pytest.mark.skipif(bool(MISSING), reason=MISSING or "tensorrt_rtx is here")
def test_a_file_that_is_no_model_is_an_error_and_leaves_no_engine(
    verified: Compilation, tmp_path: Path
) -> None:
    compilation = fork(verified)
    (tmp_path / "model.onnx").write_bytes(b"nothing that could be parsed")
    compilation.workdir = tmp_path
    compilation.options = type(compilation.options)(finetune=False, engine="tensorrt-rtx")
    with pytest.raises(GpusqError):
        run_until(compilation, "build_engine")
    assert not list(tmp_path.rglob("*.plan"))
