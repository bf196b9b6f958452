"""A pruned layer without a sparse kernel is given every known cause that applies, no other."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpusq_compile.engine.sparse_causes import SparseLayer, sparse_causes

# Nothing is known to keep TensorRT from a sparse kernel here.
FIT = SparseLayer(
    pattern="2:4",
    op="linear",
    role="mlp",
    shape=(1536, 384),
    weight="int8",
    activation="int8",
    output="int8",
    eligible="yes",
    engine_type="int8",
)


def codes(layer: SparseLayer, *targets: str, sparse_flag: bool | None = True) -> list[str]:
    return [cause.code for cause in sparse_causes(layer, targets, sparse_flag=sparse_flag)]


def text(layer: SparseLayer, *targets: str) -> str:
    return "; ".join(cause.text for cause in sparse_causes(layer, targets))


@pytest.mark.parametrize(
    ("change", "code", "part"),
    [
        ({"pattern": "pair4:8", "eligible": "no"}, "pattern-not-2:4", "pair4:8 masks are not 2:4"),
        ({"activation": None, "weight": "int4", "output": None}, "weight-only", "int4 weights"),
        ({"op": "conv2d", "shape": (768, 3, 16, 16)}, "few-channels", "3 input channels"),
        ({"shape": (1536, 400)}, "unaligned", "K x N = 400 x 1536 is not aligned to 32"),
        ({"shape": (1000, 384)}, "unaligned", "K x N = 384 x 1000 is not aligned to 32"),
        (
            {"engine_type": "fp16", "type_reason": "cast"},
            "not-int8",
            "fp16 in the engine, not int8: cast",
        ),
        ({"output": None}, "output-not-int8", "its output is not INT8"),
        ({"shape": (192, 384)}, "small", "K x N = 384 x 192 is below 256"),
        ({"shape": (768, 192)}, "small", "K x N = 192 x 768 is below 256"),
        ({}, "dense-faster", "a dense kernel was faster"),
        ({"eligible": "unknown"}, "dense-faster", "most likely a dense kernel was faster"),
        ({"eligible": "no"}, "unexplained", "found it not eligible"),
    ],
)
def test_each_cause_is_found_by_itself(change: dict[str, Any], code: str, part: str) -> None:
    layer = replace(FIT, **change)
    assert codes(layer, "sm86") == [code]
    assert part in text(layer, "sm86")


@pytest.mark.parametrize("rows", [1152, 768])
def test_a_fused_qkv_that_is_cut_in_float_is_told_from_other_losses(rows: int) -> None:
    qkv = replace(FIT, role="attention_qkv", shape=(rows, 384), output=None, engine_type="fp16")
    assert codes(qkv, "sm90") == ["fused-qkv"]
    assert "split: true" in text(qkv, "sm90")
    assert codes(replace(qkv, engine_type="int8"), "sm90") == ["dense-faster"]
    assert codes(replace(qkv, output="int8"), "sm90") == ["not-int8"]
    # One of the parts that `split` makes is cut nowhere.
    assert codes(replace(qkv, shape=(384, 384)), "sm90") == ["not-int8"]


def test_a_builder_without_the_flag_needs_no_other_cause() -> None:
    layer = replace(FIT, shape=(192, 100), output=None, eligible="no")
    assert codes(layer, sparse_flag=False) == ["flag-off"]
    assert "flag-off" not in codes(layer, sparse_flag=None)


@pytest.mark.parametrize(
    ("targets", "named"),
    [((), True), (("sm86",), True), (("sm90", "sm80"), True), (("sm90",), False)],
)
def test_float_outputs_are_a_cause_wherever_the_gpu_may_lack_the_kernels(
    targets: tuple[str, ...], named: bool
) -> None:
    assert ("output-not-int8" in codes(replace(FIT, output=None), *targets)) == named


def test_causes_that_hold_together_are_all_named_the_hard_ones_first() -> None:
    layer = replace(FIT, shape=(1152, 192), output=None, role="mlp", engine_type="fp16")
    assert codes(layer, "sm86") == ["not-int8", "output-not-int8", "small"]


@pytest.mark.parametrize("pattern", ["2:4", "portable"])
def test_patterns_within_2_to_4_are_no_cause(pattern: str) -> None:
    assert codes(replace(FIT, pattern=pattern, eligible="no")) == ["unexplained"]


def test_a_float_layer_is_judged_by_the_alignment_of_its_type_and_needs_no_int8() -> None:
    layer = replace(FIT, weight=None, activation=None, output=None, engine_type="fp16")
    assert codes(replace(layer, shape=(1008, 400))) == ["dense-faster"]
    assert codes(replace(layer, shape=(1004, 400))) == ["unaligned"]
    assert codes(replace(layer, shape=(1004, 400), precision="fp32")) == ["unaligned"]
    assert codes(replace(layer, shape=(1000, 392), precision="fp32")) == ["dense-faster"]


@given(
    shape=st.tuples(st.integers(1, 3000), st.integers(1, 3000)),
    pattern=st.sampled_from(["2:4", "pair4:8", "portable"]),
    weight=st.sampled_from([None, "int8", "int4"]),
    activation=st.sampled_from([None, "int8", "int4"]),
    output=st.sampled_from([None, "int8"]),
    engine_type=st.sampled_from(["int8", "fp16", "unknown"]),
    eligible=st.sampled_from(["yes", "no", "unknown"]),
    sparse_flag=st.sampled_from([True, False, None]),
)
def test_there_is_always_a_cause_each_once(sparse_flag: bool | None, **fields: Any) -> None:
    found = codes(replace(FIT, **fields), "sm86", sparse_flag=sparse_flag)
    assert found
    assert len(set(found)) == len(found)
    last_resort = {"dense-faster", "unexplained", "flag-off"}
    assert len(found) == 1 or not last_resort.intersection(found)
