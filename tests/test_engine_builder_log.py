"""The builder log is read as it was printed; what it does not say stays unknown."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpusq_compile.engine import GemmInEngine, MarkedGemm, find_gemms, parse_builder_log
from gpusq_compile.engine.builder_log import BuilderLog

DATA = Path(__file__).parent / "data" / "engine"


def read(name: str) -> BuilderLog:
    text = (DATA / name).read_text(encoding="utf-8")
    return parse_builder_log(line for line in text.split("\n") if not line.startswith("#"))


def find(name: str, *gemms: MarkedGemm) -> dict[str, GemmInEngine]:
    return {g.name: g for g in find_gemms(read(name), gemms)}


def test_qkv_with_output_qdq_is_one_int8_gemm() -> None:
    found = find(
        "rtx_qkv_with_output_qdq.log",
        MarkedGemm("blocks.0.attn.qkv", "int8"),
        MarkedGemm("blocks.0.attn.proj", "int8"),
    )
    qkv = found["blocks.0.attn.qkv"]
    assert (qkv.actual, qkv.status, qkv.reason) == ("int8", "passed", None)
    assert qkv.layer == "blocks.0.attn.qkv_myl0_4"
    assert found["blocks.0.attn.proj"].status == "passed"


def test_qkv_without_output_qdq_is_missed_with_its_reason() -> None:
    found = find(
        "rtx_qkv_without_output_qdq.log",
        MarkedGemm("blocks.0.attn.qkv", "int8"),
        MarkedGemm("blocks.0.attn.proj", "int8"),
    )
    qkv = found["blocks.0.attn.qkv"]
    assert (qkv.actual, qkv.status, qkv.layer) == ("fp16", "missed", "__myl_CastMulFc_myl0_5")
    assert qkv.reason is not None
    assert "dequantizes the weight to fp16" in qkv.reason
    assert "cuts it into 3 parts" in qkv.reason
    assert found["blocks.0.attn.proj"].status == "passed"


def test_scale_along_the_reduction_axis_is_missed_with_its_reason() -> None:
    found = find("rtx_scale_along_reduction.log", MarkedGemm("blocks.0.mlp.fc1", "int8"))
    fc1 = found["blocks.0.mlp.fc1"]
    assert (fc1.actual, fc1.status) == ("fp16", "missed")
    assert fc1.reason is not None
    assert "scales lie along the reduction axis" in fc1.reason


def test_fp16_gemms_pass_as_fp16_and_are_missed_as_int8() -> None:
    names = [f"blocks.0.{n}" for n in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")]
    as_half = find("rtx_fp16.log", *(MarkedGemm(n, "fp16") for n in names))
    assert [as_half[n].status for n in names] == ["passed"] * 4
    as_int8 = find("rtx_fp16.log", *(MarkedGemm(n, "int8") for n in names))
    assert [as_int8[n].status for n in names] == ["missed"] * 4
    assert as_int8["blocks.0.mlp.fc2"].reason == (
        "engine layer 'blocks.0.mlp.fc2_myl0_12' multiplies fp16 x fp16"
    )


def test_placeholder_kernel_names_are_not_reported() -> None:
    found = find("rtx_fp16.log", MarkedGemm("blocks.0.mlp.fc2", "fp16"))
    assert found["blocks.0.mlp.fc2"].tactic is None


def test_layer_lines_of_tensorrt_10_give_type_kernel_and_source() -> None:
    conv, gemm = "/features/features.0/Conv", "/classifier/classifier.6/Gemm"
    found = find("tensorrt_10_layers.log", MarkedGemm(conv, "fp16"), MarkedGemm(gemm, "fp16"))
    assert found[conv].status == "passed"
    assert found[conv].layer == "/features/features.0/Conv + /features/features.1/Relu"
    assert (found[conv].tactic or "").startswith("sm80_xmma_fprop_implicit_gemm")
    assert found[conv].eligible == "no"
    assert (found[gemm].actual, found[gemm].eligible, found[gemm].picked) == (
        "fp16",
        "unknown",
        "unknown",
    )


def test_spelled_out_formats_of_tensorrt_8_are_read() -> None:
    name = "resnetv15_stage3_conv1_fwd"
    found = find("tensorrt_8_int8_layers.log", MarkedGemm(name, "int8", sparse=True))[name]
    assert (found.actual, found.status) == ("int8", "passed")
    # Sparse weights under a kernel whose name says nothing of sparsity.
    assert (found.eligible, found.picked) == ("yes", "unknown")


def test_sparsity_lines_of_tensorrt_8_name_eligible_and_picked() -> None:
    names = ("conv1", "conv2", "conv3", "conv4")
    found = find("tensorrt_8_sparsity.log", *(MarkedGemm(n, "int8", sparse=True) for n in names))
    assert [found[n].eligible for n in names[:3]] == ["yes", "yes", "yes"]
    assert [found[n].picked for n in names[1:3]] == ["yes", "yes"]


def test_an_absent_name_is_a_no_only_where_every_listed_name_is_understood() -> None:
    lines = (
        "Parsing node: conv1 [Conv]",
        "Parsing node: conv2 [Conv]",
        "(Sparsity) Layers eligible for sparse math: conv1, conv2",
        "(Sparsity) TRT inference plan picked sparse implementation for layers: {}",
    )
    gemms = (MarkedGemm("conv1", "int8"), MarkedGemm("conv2", "int8"))
    understood = parse_builder_log(line.format("conv2") for line in lines)
    assert [g.picked for g in find_gemms(understood, gemms)] == ["no", "yes"]
    foreign = parse_builder_log(line.format("{{ForeignNode[a...z]}}") for line in lines)
    assert [g.picked for g in find_gemms(foreign, gemms)] == ["unknown", "unknown"]


def test_fused_names_and_an_empty_list_of_picked_layers() -> None:
    names = ("MatMul_401", "Conv_619", "Conv_242")
    found = find("tensorrt_8_sparsity_fused.log", *(MarkedGemm(n, "fp16") for n in names))
    assert [found[n].eligible for n in names] == ["yes", "yes", "yes"]
    assert [found[n].picked for n in names] == ["no", "no", "no"]


def test_sparsity_counts_of_tensorrt_10_count_by_their_last_occurrence() -> None:
    log = read("tensorrt_10_sparsity_counts.log")
    assert log.eligible is not None
    assert log.picked is not None
    assert (log.eligible.count, log.eligible.names) == (39, None)
    (gemm,) = find_gemms(log, [MarkedGemm("blocks.0.mlp.fc1", "int8", sparse=True)])
    # 39 of unnamed layers may or may not hold this one; none of none does.
    assert (gemm.eligible, gemm.picked) == ("unknown", "no")


def test_sparsity_names_of_tensorrt_10_are_matched_in_each_of_their_forms() -> None:
    names = ("blocks.0.attn.qkv", "blocks.0.mlp.fc1", "blocks.0.mlp.fc2")
    found = find("tensorrt_10_sparsity_names.log", *(MarkedGemm(n, "int8") for n in names))
    assert [found[n].eligible for n in names] == ["yes", "yes", "yes"]
    assert found["blocks.0.mlp.fc2"].picked == "yes"
    assert found["blocks.0.attn.qkv"].picked == "unknown"


def test_a_sparse_kernel_name_alone_says_picked() -> None:
    line = (
        "Name: blocks.0.mlp.fc1_myl0_3, LayerType: gemm, Inputs: [ { Name: x, Dimensions: "
        "[-1,512], Datatype: Int8, Format: Linear }], Constants: [ { Name: w, Dimensions: "
        "[512,2048], Datatype: Int8, Format: Linear }], Outputs: [ { Name: y, Dimensions: "
        "[-1,2048], Datatype: Int8, Format: Linear }], TacticName: sm80_xmma_sparse_gemm_i8i8_"
        "i8i32_f32_tn_n_tilesize128x64x128_stage4_warpsize2x2x1_sptensor16x8x64, StreamId: 0, "
        "Metadata: [ONNX Layer: blocks.0.mlp.fc1]"
    )
    (gemm,) = find_gemms(parse_builder_log([line]), [MarkedGemm("blocks.0.mlp.fc1", "int8")])
    assert (gemm.actual, gemm.picked, gemm.eligible) == ("int8", "yes", "unknown")


def test_no_sparsity_lines_leave_both_answers_unknown() -> None:
    gemm = MarkedGemm("blocks.0.attn.qkv", "int8", sparse=True)
    found = find("rtx_qkv_with_output_qdq.log", gemm)["blocks.0.attn.qkv"]
    assert (found.eligible, found.picked) == ("unknown", "unknown")


def test_a_gemm_that_no_layer_lists_is_missed_by_name() -> None:
    found = find("rtx_fp16.log", MarkedGemm("blocks.7.mlp.fc1", "fp16"))["blocks.7.mlp.fc1"]
    assert (found.status, found.actual, found.layer) == ("missed", "unknown", None)
    assert found.reason == "the builder read no ONNX node named 'blocks.7.mlp.fc1'"


def test_a_gemm_that_the_builder_removed_is_missed_by_name() -> None:
    log = read("rtx_fp16.log")
    log.onnx_ops["blocks.0.mlp.extra"] = "MatMul"
    (found,) = find_gemms(log, [MarkedGemm("blocks.0.mlp.extra", "fp16")])
    assert (found.status, found.reason) == (
        "missed",
        "no engine layer lists it: the builder removed or folded it",
    )


def test_a_layer_line_in_an_unknown_form_makes_the_answer_unknown() -> None:
    log = read("engine_of_unknown_builder.log")
    assert (log.unread, log.layers) == (1, ())
    (found,) = find_gemms(log, [MarkedGemm("blocks.0.mlp.fc1", "int8")])
    assert (found.status, found.actual) == ("unknown", "unknown")


def test_a_log_without_layers_makes_the_answer_unknown() -> None:
    (found,) = find_gemms(parse_builder_log([]), [MarkedGemm("a", "int8")])
    assert (found.status, found.reason) == ("unknown", "the builder log lists no engine layers")


@pytest.mark.parametrize("operands", [("Int8", "Half"), ("Half", "Int8"), ("Wobble", "Int8")])
def test_a_gemm_of_mixed_or_unread_operands_is_unknown(operands: tuple[str, str]) -> None:
    line = (
        f"Name: fc_myl0_1, LayerType: gemm, Inputs: [ {{ Name: x, Dimensions: [-1,64], Datatype: "
        f"{operands[0]} }}], Constants: [ {{ Name: w, Dimensions: [64,32], Datatype: {operands[1]}"
        " }], Outputs: [ { Name: y, Dimensions: [-1,32], Datatype: Half }], TacticName: , "
        "StreamId: 0, Metadata: [ONNX Layer: fc]"
    )
    (found,) = find_gemms(parse_builder_log([line]), [MarkedGemm("fc", "int8")])
    assert (found.actual, found.status) == ("unknown", "unknown")
    assert found.reason is not None


@given(st.lists(st.text(max_size=200), max_size=20))
def test_no_text_makes_the_reader_fail(messages: list[str]) -> None:
    log = parse_builder_log(messages)
    find_gemms(log, [MarkedGemm("a", "int8")])


@given(st.data())
def test_no_cut_of_a_real_log_makes_the_reader_fail_or_pass_an_unseen_gemm(
    data: st.DataObject,
) -> None:
    text = (DATA / "rtx_qkv_without_output_qdq.log").read_text(encoding="utf-8")
    start = data.draw(st.integers(0, len(text)))
    end = data.draw(st.integers(start, len(text)))
    gemm = MarkedGemm("blocks.0.attn.qkv", "int8")
    (found,) = find_gemms(parse_builder_log([text[start:end]]), [gemm])
    assert found.status != "passed"
