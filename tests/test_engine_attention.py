"""What the builder's log says of each marked attention: one INT8 kernel, another, or none."""

from __future__ import annotations

import pytest

from gpusq_compile.engine import MarkedAttention, find_attentions, parse_builder_log
from gpusq_compile.engine.builder_log import BuilderLog

PRODUCTS = "[ONNX Layer: attn/av][ONNX Layer: attn/softmax][ONNX Layer: attn/qk]"


def tensor(dtype: str) -> str:
    return f"{{ Name: t, Dimensions: [-1,49,32], Datatype: {dtype}, Format: linear }}"


def line(name: str, inputs: tuple[str, ...], nodes: str, *, kind: str = "kgen") -> str:
    listed = ", ".join(tensor(dtype) for dtype in inputs)
    return (
        f"Name: {name}, LayerType: {kind}, Inputs: [{listed}], Constants: [], "
        f"Outputs: [{tensor('Int8')}], TacticName: {name}_0x1, StreamId: 0, Metadata: {nodes}"
    )


def log_of(*lines: str) -> BuilderLog:
    return parse_builder_log(lines)


@pytest.mark.parametrize(
    ("inputs", "actual", "status"),
    [
        (("Int8", "Int8", "Int8"), "int8", "passed"),
        # A mask that is computed comes as one more input.
        (("Int8", "Int8", "Half", "Int8"), "int8", "passed"),
        (("Half", "Half", "Half"), "fp16", "missed"),
        (("Float", "Float", "Float"), "fp32", "missed"),
        (("Int8", "Int8", "Half"), "unknown", "unknown"),
    ],
)
def test_a_fused_kernel_is_told_by_what_it_takes(
    inputs: tuple[str, ...], actual: str, status: str
) -> None:
    log = log_of(line("_gemm_mha_v2_myl0_4", inputs, PRODUCTS))
    [found] = find_attentions(log, [MarkedAttention("attn")])
    assert (found.actual, found.status, found.layer) == (actual, status, "_gemm_mha_v2_myl0_4")
    assert (found.reason is None) == (status == "passed")


def test_separate_products_are_missed_and_named() -> None:
    log = log_of(
        line("attn/qk_myl0_3", ("Int8", "Int8"), "[ONNX Layer: attn/qk]", kind="gemm"),
        line("__myl_Fused_myl0_4", ("Half",), PRODUCTS),
        line("attn/av_myl0_5", ("Int8", "Int8"), "[ONNX Layer: attn/av]", kind="gemm"),
    )
    [found] = find_attentions(log, [MarkedAttention("attn")])
    assert (found.actual, found.status) == ("unfused", "missed")
    assert found.reason == (
        "the builder made separate layers of it: 'attn/qk_myl0_3', 'attn/av_myl0_5'"
    )


def test_a_log_that_does_not_tell_is_no_answer() -> None:
    [empty] = find_attentions(log_of(), [MarkedAttention("attn")])
    assert (empty.status, empty.reason) == ("unknown", "the builder log lists no engine layers")
    other = log_of(line("_gemm_mha_v2_myl0_4", ("Int8",) * 3, "[ONNX Layer: other/qk]"))
    [absent] = find_attentions(other, [MarkedAttention("attn")])
    assert absent.status == "unknown"
    assert absent.reason == "no engine layer that multiplies lists attn/qk or attn/av"


def test_attentions_are_told_apart_by_name() -> None:
    log = log_of(
        line("_gemm_mha_v2_myl0_4", ("Int8",) * 3, PRODUCTS),
        line("_gemm_mha_v2_myl0_9", ("Half",) * 3, PRODUCTS.replace("attn", "attn#2")),
    )
    found = find_attentions(log, [MarkedAttention("attn#2"), MarkedAttention("attn")])
    assert [answer.actual for answer in found] == ["fp16", "int8"]
