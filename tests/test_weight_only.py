"""INT4 weights in blocks under float activations, from the rules to the engine."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, numpy_helper
from torch import Tensor, nn

from gpusq_compile.api import CompileResult
from gpusq_compile.compilation import Compilation
from gpusq_compile.engine import MarkedGemm, find_gemms, parse_builder_log
from gpusq_compile.errors import InputError
from gpusq_compile.graph.query import tensor_attribute
from gpusq_compile.passes.build_engine import marked_gemms
from gpusq_compile.quantization.fake_quantize import MIN_SCALE, FakeQuantize, broadcastable
from gpusq_compile.remarks import Kind
from gpusq_compile.sparsity import PATTERNS, violations
from tests.compilations import (
    SPARSE,
    TAPS,
    begin,
    fork,
    make_rules,
    node_and_plan,
    outputs,
    plan_of,
    plans_of,
    remarks_of,
    run_until,
    targets,
)
from tests.models import Convolution, Perceptron, Shape, TinyViT, images, labelled, noise, seeded

try:
    import tensorrt_rtx  # noqa: F401

    MISSING = ""
except Exception as error:
    MISSING = f"tensorrt_rtx cannot be imported: {error}"

needs_rtx = pytest.mark.skipif(bool(MISSING), reason=MISSING or "tensorrt_rtx is here")

LAYERS = [f"layers.0.{name}" for name in ("mix.wide", "mix.back", "feed.up", "feed.down")]
LAYER = "layers.0.feed.up"
DATA = labelled(2)


def weight_only(block: int, **more: Any) -> dict[str, Any]:
    """A rule for every linear and convolution."""
    quantize = {"weight": "int4", "activation": "none", "block": block, **more}
    return {"id": "w", "match": {"op": ["linear", "conv2d"]}, "quantize": quantize}


def vit(dim: int = 128) -> nn.Module:
    model: nn.Module = seeded(TinyViT, Shape(depth=1, dim=dim))
    return model


def quantizer_of(compilation: Compilation, layer: str) -> FakeQuantize:
    source = node_and_plan(compilation, layer)[0].args[1]
    assert isinstance(source, torch.fx.Node)
    module = compilation.ir.get_submodule(str(source.target))
    assert isinstance(module, FakeQuantize)
    return module


# --- what the rules ask for ----------------------------------------------------------------------


def refusal(model: nn.Module, inputs: Tensor, block: int, layer: str) -> str:
    compilation = run_until(begin(model, inputs, make_rules(weight_only(block))), "mark")
    plan = plan_of(compilation, layer)
    assert plan.quantize is None
    assert plan.requested.weight == "int4"
    [remark] = [r for r in remarks_of(compilation, "mark", Kind.MISSED) if r.layer == layer]
    assert plan.reasons == (remark.reason,)
    return remark.reason


@pytest.mark.parametrize(
    ("size", "block", "reason"),
    [
        (192, 128, "blocks of 128 do not divide its 192 input channels; blocks of 64 do"),
        (96, 128, "blocks of 128 do not divide its 96 input channels; nor do blocks of 64"),
        (96, 64, "blocks of 64 do not divide its 96 input channels; nor do blocks of 128"),
    ],
)
def test_a_block_that_does_not_divide_the_input_channels_is_refused(
    size: int, block: int, reason: str
) -> None:
    model = seeded(Perceptron, (size, 64, 32))
    assert refusal(model, noise(2, size), block, "first") == reason


def test_blocks_on_a_convolution_are_refused() -> None:
    model = seeded(Convolution, 64, 32, 3, padding=1)
    compilation = run_until(begin(model, noise(2, 64, 6, 6), make_rules(weight_only(64))), "fold")
    assert plan_of(compilation, "conv").applied.weight is None
    reason = refusal(model, noise(2, 64, 6, 6), 64, "conv")
    assert reason.startswith("blocks of 64: TensorRT's kernels with INT4 weights are GEMMs")


def test_what_is_refused_leaves_the_sparsity_and_the_other_layers_as_they_were_asked() -> None:
    rule = {**weight_only(128), "sparsity": SPARSE}
    model = seeded(Perceptron, (64, 256, 32))
    compilation = run_until(begin(model, noise(2, 64), make_rules(rule)), "fold")
    first, second = (plan_of(compilation, name).applied for name in ("first", "second"))
    assert (first.sparsity, first.weight) == ("2:4", None)
    assert (second.sparsity, second.weight, second.activation) == ("2:4", "int4", None)


@pytest.mark.parametrize(
    "quantize",
    [
        {"weight": "int4", "activation": "int8", "block": 64},
        {"weight": "int4", "activation": "int4", "block": 128},
        {"weight": "int8", "activation": "none", "block": 64},
        {"weight": "int4", "activation": "none", "output": "int8", "block": 64},
    ],
)
def test_blocks_beside_integer_activations_are_a_contradiction(quantize: dict[str, Any]) -> None:
    rule = {"id": "w", "match": {"op": "linear"}, "quantize": quantize}
    with pytest.raises(InputError) as caught:
        begin(seeded(Perceptron), noise(2, 32), make_rules(rule))
    assert caught.value.code == "contradiction"
    assert "block divides the scales of INT4 weights" in caught.value.message
    weight, activation = quantize["weight"], quantize["activation"]
    found = (
        f"weight is {weight}, activation {activation} and output {quantize.get('output', 'none')}"
    )
    assert found in caught.value.message


# --- the graph -----------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=["fp16", "fp32"])
def quantized(request: pytest.FixtureRequest, tmp_path_factory: Any) -> Compilation:
    document = make_rules(TAPS, weight_only(64), precision=request.param)
    workdir = tmp_path_factory.mktemp("weight_only")
    compilation = begin(vit(), images(4), document, workdir, data=DATA)
    return run_until(compilation, "finetune_quantized")


@pytest.fixture(scope="module")
def folded(quantized: Compilation) -> Compilation:
    return run_until(fork(quantized), "fold")


@pytest.fixture(scope="module")
def verified(folded: Compilation) -> Compilation:
    return run_until(fork(folded), "verify_onnx")


def test_each_block_of_each_output_channel_has_a_scale_that_trains(quantized: Compilation) -> None:
    for layer in LAYERS:
        module = quantizer_of(quantized, layer)
        out, size = plan_of(quantized, layer).shape
        assert module.scale.shape == (out, size // 64)
        assert module.calibrated
        assert isinstance(module.log_scale, nn.Parameter)
    quantizers = [m for m in quantized.ir.modules() if isinstance(m, FakeQuantize)]
    assert len(quantizers) == 5  # Of weights alone.
    told = [r for r in remarks_of(quantized, "quantize") if r.layer == LAYER]
    assert [remark.reason for remark in told] == ["weight int4 in blocks of 64"]


def test_folding_keeps_the_function_bit_for_bit_in_levels_and_scales_of_blocks(
    quantized: Compilation, folded: Compilation
) -> None:
    batch = images(5, seed=7)
    assert torch.equal(folded.ir(batch), quantized.ir(batch))
    for layer in LAYERS:
        plan = plan_of(folded, layer)
        levels = tensor_attribute(folded.ir, plan.weight)
        scale = tensor_attribute(folded.ir, f"gpusq.weight_scale.{layer.replace('.', '_')}")
        assert (levels.dtype, levels.shape) == (torch.int8, plan.shape)
        assert (int(levels.min()), int(levels.max())) == (-7, 7)
        assert scale.shape == (plan.shape[0], plan.shape[1] // 64)
    found = targets(folded)
    assert found.count("gpusq.dequantize.default") == 5
    assert found.count("gpusq.quantize.default") == 0


def test_a_block_of_zeros_has_a_positive_scale_in_the_file(tmp_path: Path) -> None:
    model = seeded(Perceptron, (128, 64, 32))
    with torch.no_grad():
        model.first.weight[3, 64:] = 0.0
    document = make_rules(weight_only(64), precision="fp16")
    compilation = run_until(begin(model, noise(4, 128), document, tmp_path), "verify_onnx")
    scale = tensor_attribute(compilation.ir, "gpusq.weight_scale.first")
    assert scale[3, 1].item() == pytest.approx(MIN_SCALE)
    assert compilation.verify["ok"] is True


def test_the_users_state_dict_holds_the_dequantized_weights(folded: Compilation) -> None:
    result = CompileResult(folded.ir, {}, None, None, [], folded.parameters)
    weight = result.state_dict()[f"{LAYER}.weight"]
    levels = tensor_attribute(folded.ir, f"{LAYER}.weight")
    scale = tensor_attribute(folded.ir, "gpusq.weight_scale.layers_0_feed_up")
    assert torch.equal(weight, levels.float() * broadcastable(scale, levels))
    dense = vit().state_dict()[f"{LAYER}.weight"]
    assert torch.nn.functional.cosine_similarity(weight, dense).min() > 0.98


# --- the file ------------------------------------------------------------------------------------


def initializers(compilation: Compilation) -> dict[str, onnx.TensorProto]:
    model = onnx.load(compilation.workdir / "model.onnx")
    return {tensor.name: tensor for tensor in model.graph.initializer}


def test_weights_lie_in_the_file_in_four_bits_with_blocks_along_the_reduction_axis(
    verified: Compilation,
) -> None:
    stored = initializers(verified)
    nodes = {node.name: node for node in onnx.load(verified.workdir / "model.onnx").graph.node}
    for layer in LAYERS:
        plan = plan_of(verified, layer)
        out, size = plan.shape
        tensor = stored[plan.weight]
        assert (tensor.data_type, list(tensor.dims)) == (TensorProto.INT4, [size, out])
        assert len(tensor.raw_data) == size * out // 2
        levels = tensor_attribute(verified.ir, plan.weight)
        assert np.array_equal(numpy_helper.to_array(tensor).astype(np.int8), levels.numpy().T)
        dequantize = nodes[f"{layer}/weight_dq"]
        assert {a.name: a.i for a in dequantize.attribute} == {"axis": 0, "block_size": 64}
        scale = numpy_helper.to_array(stored[dequantize.input[1]])
        learned = tensor_attribute(verified.ir, f"gpusq.weight_scale.{layer.replace('.', '_')}")
        assert np.array_equal(scale.astype(np.float32), learned.numpy().T)
        half = verified.rules.target.precision == "fp16"
        assert scale.dtype == (np.float16 if half else np.float32)
        assert nodes[layer].input[1] == dequantize.output[0]
    # The classifier is a Gemm, which keeps [N, K].
    dequantize = nodes["logits/weight_dq"]
    assert {a.name: a.i for a in dequantize.attribute} == {"axis": 1, "block_size": 64}
    assert "QuantizeLinear" not in {node.op_type for node in nodes.values()}


def test_onnx_runtime_computes_what_the_fake_quantized_graph_did(verified: Compilation) -> None:
    numerics = verified.verify["numerics"]
    assert verified.verify["structure"] == {"layers": 5, "attentions": 0, "faults": []}
    exact = verified.rules.target.precision == "fp32"
    assert numerics["max_difference"] < (1e-5 if exact else 1e-2)
    assert numerics["min_cosine"] > (0.999999 if exact else 0.9999)


def test_the_files_bytes_are_half_a_byte_a_weight_and_the_scales(verified: Compilation) -> None:
    scale = 2 if verified.rules.target.precision == "fp16" else 4
    out, size = plan_of(verified, LAYER).shape
    layer = verified.stored[LAYER]
    assert layer.weight_dtype == "int4"
    assert layer.weight_bytes == out * size // 2 + scale * out * size // 64
    assert (layer.mask_ok, layer.faults) == (None, ())


# --- beside a split, beside sparsity, and fine-tuned ---------------------------------------------


def test_a_split_layer_keeps_its_blocks_in_each_part(tmp_path: Path) -> None:
    compilation = begin(
        vit(), images(4), make_rules(weight_only(64, split=True)), tmp_path, data=DATA
    )
    expected = outputs(run_until(compilation, "finetune_quantized"))[0]
    run_until(compilation, "verify_onnx")
    torch.testing.assert_close(outputs(compilation)[0], expected, rtol=1e-4, atol=1e-5)
    for index in range(3):
        layer = compilation.stored[f"layers.0.mix.wide.part{index}"]
        assert (layer.weight_dtype, layer.faults) == ("int4", ())
        assert layer.weight_bytes == 128 * 128 // 2 + 4 * 128 * 2
    assert compilation.verify["ok"] is True


def test_a_sparse_phase_and_then_the_training_of_block_scales(tmp_path: Path) -> None:
    rule = {**weight_only(64, rounding="gptq"), "sparsity": {**SPARSE, "method": "obs"}}
    phases = {"sparse": {"max_steps": 2}, "quantize": {"max_steps": 4, "scale_lr": 1e-2}}
    document = make_rules(TAPS, rule, precision="fp16", finetune={"loss": {"alpha": 0}, **phases})
    options: dict[str, Any] = {"data": DATA, "train_data": DATA, "finetune": True}
    compilation = begin(vit(), images(4), document, tmp_path, **options)
    run_until(compilation, "quantize")
    started = quantizer_of(compilation, LAYER).log_scale.detach().clone()
    run_until(compilation, "finetune_quantized")
    assert not torch.equal(quantizer_of(compilation, LAYER).log_scale, started)
    expected = outputs(compilation)[0]
    run_until(compilation, "verify_onnx")
    assert torch.equal(outputs(compilation)[0], expected)
    for layer in LAYERS:
        levels = tensor_attribute(compilation.ir, f"{layer}.weight")
        assert violations(levels, PATTERNS["2:4"]) == 0
        assert compilation.stored[layer].mask_ok is True
        assert compilation.stored[layer].weight_dtype == "int4"


def test_pruned_and_rounded_in_one_sweep_without_a_fine_tune() -> None:
    rule = {**weight_only(64, rounding="gptq"), "sparsity": {**SPARSE, "method": "obs"}}
    compilation = begin(vit(), images(4), make_rules(rule, precision="fp16"), data=DATA)
    run_until(compilation, "quantize")
    told = [r.reason for r in remarks_of(compilation, "sparsify") if r.layer == LAYER]
    assert "rounded to int4 in the same sweep" in told[0]
    stored = compilation.ir.get_parameter(f"{LAYER}.weight")
    assert torch.equal(quantizer_of(compilation, LAYER)(stored), stored)
    assert violations(stored.detach(), PATTERNS["2:4"]) == 0


def test_the_shipped_rules_give_each_layer_the_longest_block_of_which_it_has_two() -> None:
    model = seeded(TinyViT, Shape(depth=1, dim=192))
    compilation = begin(model, images(4), "int4-weight-only", data=DATA)
    run_until(compilation, "mark")
    blocks = {
        name: plan.quantize.block if plan.quantize else None
        for name, plan in plans_of(compilation).items()
    }
    # 192 input channels but for the second linear of the MLP, which has 384, and 32 pixels.
    assert blocks == {**dict.fromkeys(LAYERS, 64), LAYERS[-1]: 128, "stem": None, "logits": None}
    assert remarks_of(compilation, "mark", Kind.MISSED) == []
    assert [r for r in remarks_of(compilation, "mark") if r.code == "rule-shadowed"] == []


@pytest.mark.parametrize("dim", [128, 256])
def test_the_shipped_rules_have_no_idle_rule_where_all_layers_take_one_block_size(dim: int) -> None:
    compilation = run_until(begin(vit(dim), images(4), "int4-weight-only", data=DATA), "mark")
    assert [r for r in remarks_of(compilation, "mark") if r.code == "rule-shadowed"] == []
    assert plan_of(compilation, LAYER).quantize is not None


def test_the_shipped_rules_compile_and_train_a_dense_model(tmp_path: Path) -> None:
    document = {
        "version": 1,
        "extends": "int4-weight-only",
        "finetune": {"quantize": {"max_steps": 4}},
    }
    options: dict[str, Any] = {"data": DATA, "train_data": DATA, "finetune": True}
    compilation = begin(vit(), images(4), document, tmp_path, **options)
    run_until(compilation, "verify_onnx")
    assert compilation.finetune["quantize"]["steps"] == 4
    assert {compilation.stored[layer].weight_dtype for layer in LAYERS} == {"int4"}
    assert {plan.applied.sparsity for plan in plans_of(compilation).values()} == {None}
    assert compilation.verify["ok"] is True


# --- the engine ----------------------------------------------------------------------------------


def test_the_engine_should_read_four_bits_and_multiply_in_the_targets_precision(
    quantized: Compilation,
) -> None:
    precision = quantized.rules.target.precision
    for gemm in marked_gemms(list(plans_of(quantized).values()), precision, ["sm86"]):
        assert (gemm.expected, gemm.weight) == (precision, "int4")


def test_four_bit_values_in_int8_are_not_expected_in_four_bits() -> None:
    rule = {"id": "w", "match": {"op": "linear"}, "quantize": {"weight": "int4"}}
    compilation = run_until(begin(seeded(Perceptron), noise(2, 32), make_rules(rule)), "quantize")
    gemms = marked_gemms(list(plans_of(compilation).values()), "fp16", ["sm86"])
    assert [gemm.weight for gemm in gemms] == [None, None]


def logged(*gemms: MarkedGemm) -> list[Any]:
    text = Path(__file__).parent / "data" / "engine" / "rtx_int4_blocks.log"
    lines = text.read_text(encoding="utf-8").split("\n")
    return list(find_gemms(parse_builder_log(x for x in lines if x[:1] != "#"), gemms))


def test_a_log_tells_which_weight_reached_its_gemm_in_four_bits() -> None:
    up, down = logged(
        MarkedGemm("layers.0.feed.up", "fp16", weight="int4"),
        MarkedGemm("layers.0.feed.down", "fp16", weight="int4"),
    )
    assert (down.status, down.actual, down.weight, down.reason) == ("passed", "fp16", "int4", None)
    assert down.layer == "__myl_ReplCastMulCastFc_myl0_13"
    assert (up.status, up.actual, up.weight) == ("missed", "fp16", None)
    assert up.reason == (
        "engine layer '__myl_CastMulCast_myl0_11' dequantizes the whole weight ahead of the "
        "product, in a kernel of its own (its one block is one scale per output channel; smaller "
        "blocks stay with the GEMM)"
    )


def test_a_weight_in_another_type_than_asked_for_is_missed() -> None:
    name = "blocks.0.mlp.fc2"
    text = (Path(__file__).parent / "data" / "engine" / "rtx_fp16.log").read_text(encoding="utf-8")
    log = parse_builder_log(line for line in text.split("\n") if not line.startswith("#"))
    [found] = find_gemms(log, [MarkedGemm(name, "fp16", weight="int4")])
    assert (found.status, found.weight) == ("missed", "fp16")
    assert found.reason == (
        "engine layer 'blocks.0.mlp.fc2_myl0_12' holds its weight as fp16, not as int4"
    )
    [found] = find_gemms(log, [MarkedGemm(name, "fp16")])
    assert (found.status, found.reason) == ("passed", None)


def built(rules: Any, workdir: Path, dim: int = 128) -> Compilation:
    options: dict[str, Any] = {"data": DATA, "engine": "tensorrt-rtx"}
    compilation = begin(vit(dim), images(4), rules, workdir, **options)
    return run_until(compilation, "build_engine")


@needs_rtx
@pytest.mark.parametrize(("precision", "more"), [("fp16", {}), ("fp32", {"sparsity": SPARSE})])
def test_every_weight_of_several_blocks_reaches_its_gemm_in_four_bits(
    precision: str, more: dict[str, Any], tmp_path: Path
) -> None:
    rule = {**weight_only(64), **more}
    compilation = built(make_rules(rule, precision=precision), tmp_path)
    assert compilation.engine is not None
    [engine] = compilation.engine.targets.values()
    found = {gemm.name: gemm for gemm in engine.gemms}
    for layer in (*LAYERS, "logits"):
        gemm = found[layer]
        assert (gemm.actual, gemm.weight, gemm.status) == (precision, "int4", "passed")
    assert remarks_of(compilation, "build_engine", Kind.MISSED) == []


@needs_rtx
def test_a_weight_of_one_block_is_missed_with_its_reason(tmp_path: Path) -> None:
    compilation = built(make_rules(weight_only(128), precision="fp16"), tmp_path)
    assert compilation.engine is not None
    [engine] = compilation.engine.targets.values()
    statuses = {gemm.name: gemm.status for gemm in engine.gemms}
    assert statuses == {
        **dict.fromkeys((*LAYERS, "logits"), "missed"),
        "layers.0.feed.down": "passed",
    }
    [remark] = [r for r in remarks_of(compilation, "build_engine") if r.layer == LAYER]
    assert (remark.kind, remark.code) == (Kind.MISSED, "engine-type")
    assert remark.reason.startswith("portable: engine layer '__myl_CastMulCast")
    assert "one block" in remark.reason


@needs_rtx
def test_the_shipped_rules_leave_no_weight_to_be_dequantized_ahead(tmp_path: Path) -> None:
    compilation = built("int4-weight-only", tmp_path)
    assert compilation.engine is not None
    [engine] = compilation.engine.targets.values()
    assert {gemm.name: gemm.weight for gemm in engine.gemms} == dict.fromkeys(LAYERS, "int4")
    assert {gemm.status for gemm in engine.gemms} == {"passed"}
