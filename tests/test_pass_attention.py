"""INT8 attention: planned where TensorRT fuses it, refused with its reason elsewhere, exact when
spelled out, trained like other activations, and one INT8 kernel in the engine."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from gpusq_compile.attention_plan import AttentionPlan, planned_attentions
from gpusq_compile.compilation import Compilation
from gpusq_compile.compute import compute_figures
from gpusq_compile.graph.query import module_calls
from gpusq_compile.lowering.check_attention import check_attentions
from gpusq_compile.lowering.runtime import open_session, run_session
from gpusq_compile.numerics import largest_difference
from gpusq_compile.plan import Treatment
from gpusq_compile.quantization.fake_quantize import FakeQuantize
from gpusq_compile.remarks import Kind
from gpusq_compile.report.attention import attention_lines
from gpusq_compile.report.document import make_report
from tests.attentions import (
    ATTENTION_INT8,
    LINEARS_INT8,
    Around,
    Mix,
    Mixer,
    Stack,
    WindowAttention,
    fused,
    spelled_out,
)
from tests.compilations import (
    WORKDIR,
    begin,
    fork,
    make_rules,
    outputs,
    remarks_of,
    run_until,
    targets,
)
from tests.models import noise, seeded

try:
    import tensorrt_rtx  # noqa: F401

    MISSING = ""
except Exception as error:
    MISSING = f"tensorrt_rtx cannot be imported: {error}"

BOTH = (LINEARS_INT8, ATTENTION_INT8)


def compiled(
    model: nn.Module,
    last: str,
    *rules: Any,
    tokens: int = 6,
    workdir: Path = Path(WORKDIR.name),
    precision: str = "fp32",
    **options: Any,
) -> Compilation:
    dim = next(module.in_features for module in model.modules() if isinstance(module, nn.Linear))
    document = make_rules(*(rules or BOTH), precision=precision)
    return run_until(begin(model, noise(2, tokens, dim), document, workdir, **options), last)


def mixing(mix: Mix, *, heads: int = 2, dim: int = 64) -> nn.Module:
    model: nn.Module = seeded(Around, Mixer(mix, heads=heads, dim=dim), dim)
    return model


def plan_of(compilation: Compilation) -> AttentionPlan:
    [(_, plan)] = planned_attentions(compilation.ir.graph)
    return plan


def attention_rule(**quantize: Any) -> dict[str, Any]:
    return {**ATTENTION_INT8, "quantize": {**ATTENTION_INT8["quantize"], **quantize}}


def test_an_attention_is_planned_under_its_modules_name() -> None:
    compilation = compiled(mixing(fused()), "mark")
    plan = plan_of(compilation)
    assert (plan.name, plan.sizes.head_dim, plan.sizes.keys) == ("attn", 32, 6)
    assert plan.requested == Treatment(activation="int8")
    assert plan.reasons == ()
    assert "attention: quantize" in plan.rules[0]


def test_without_a_rule_for_it_an_attention_stays_as_it_is() -> None:
    compilation = compiled(mixing(fused()), "quantize", LINEARS_INT8)
    assert plan_of(compilation).requested == Treatment()
    assert "aten.scaled_dot_product_attention.default" in targets(compilation)
    assert attention_lines(make_report(compilation, None, Path("none"))) == []


def shorter_values(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.cat([fused()(q, k, v[..., :16]), q[..., :16]], dim=-1)


def single_query(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return fused()(q[:, :, :1], k, v)


@pytest.mark.parametrize(
    ("model", "tokens", "reason"),
    [
        (mixing(fused(), dim=48), 6, "heads of 16, 32 or 64, not of 24"),
        (mixing(fused(), dim=256), 6, "heads of 16, 32 or 64, not of 128"),
        (mixing(fused()), 513, "512 keys at most, not over 513"),
        (mixing(fused(), heads=1), 6, "a single head"),
        (mixing(single_query), 6, "a single query"),
        (mixing(shorter_values), 6, "not 32 and 16"),
        (mixing(fused(is_causal=True)), 6, "it is causal"),
        (mixing(spelled_out(torch.tanh)), 6, "tanh lies between"),
    ],
)
def test_an_attention_that_would_not_be_fused_stays_in_float(
    model: nn.Module, tokens: int, reason: str
) -> None:
    compilation = compiled(model, "split_attention", tokens=tokens)
    before = [target for target in targets(compilation) if "attention" in target]
    plan = plan_of(compilation)
    assert plan.quantize is None
    assert reason in plan.reasons[0]
    [remark] = remarks_of(compilation, "mark", Kind.MISSED)
    assert (remark.layer, reason in remark.reason) == ("attn", True)
    run_until(compilation, "quantize")
    assert [target for target in targets(compilation) if "attention" in target] == before


@pytest.mark.parametrize("keys", [511, 512])
def test_the_most_keys_that_are_fused_are_accepted(keys: int) -> None:
    assert plan_of(compiled(mixing(fused()), "mark", tokens=keys)).reasons == ()


def test_a_float_reader_leaves_no_int8_kernel_unless_the_output_is_quantized() -> None:
    model = mixing(fused())
    kept = plan_of(compiled(model, "mark", attention_rule(output="none")))
    assert "attn.proj reads its output in float" in kept.reasons[0]
    settled = plan_of(compiled(model, "mark", ATTENTION_INT8))
    assert settled.requested == Treatment(activation="int8", output="int8")
    quantized = compiled(model, "quantize", ATTENTION_INT8)
    assert any(target.endswith("attn_output") for target in targets(quantized))


@pytest.mark.parametrize(
    ("quantize", "reason"),
    [
        ({"activation": "int4"}, "INT4 attention is not known to any engine"),
        ({"output": "int4"}, "INT4 attention is not known to any engine"),
        ({"activation": "none", "output": "int8"}, "activation is none"),
    ],
)
def test_types_that_no_engine_has_are_refused(quantize: dict[str, str], reason: str) -> None:
    plan = plan_of(compiled(mixing(fused()), "mark", LINEARS_INT8, attention_rule(**quantize)))
    assert reason in plan.reasons[0]
    assert plan.quantize is None


def test_a_weight_asked_of_an_attention_is_told_to_be_none() -> None:
    rule = {
        "id": "everything",
        "match": {"name": "attn**"},
        "sparsity": {"pattern": "2:4"},
        "quantize": {"weight": "int8"},
    }
    compilation = compiled(mixing(fused()), "mark", rule)
    notes = [r.reason for r in remarks_of(compilation, "mark") if r.code == "no-weight"]
    assert notes == [
        "rule 'everything' asks for quantize on 1 attention operator, which has no weight: only "
        "activations are quantized there",
        "rule 'everything' asks for sparsity on 1 attention operator, which has no weight: nothing "
        "is done there",
    ]
    assert plan_of(compilation).quantize is not None


SEEN = torch.eye(6, dtype=torch.bool) | (noise(6, 6) > 0)


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"scale": 0.5},
        {"attn_mask": noise(1, 2, 6, 6)},
        {"attn_mask": noise(6, 6).masked_fill(~SEEN, float("-inf"))},
        {"attn_mask": SEEN},
    ],
)
def test_a_fused_attention_is_spelled_out_exactly(arguments: dict[str, Any]) -> None:
    compilation = compiled(mixing(fused(**arguments)), "mark")
    before = outputs(compilation)
    run_until(compilation, "split_attention")
    assert "aten.scaled_dot_product_attention.default" not in targets(compilation)
    assert targets(compilation).count("aten.matmul.default") == 2
    assert largest_difference(outputs(compilation)[0], before[0]) < 1e-5
    record = compilation.records[-1]
    assert (record.matched, record.changed) == (1, 1)


def test_a_query_that_may_see_no_key_gives_no_nan() -> None:
    mask = SEEN.clone()
    mask[2] = False
    # Only the split itself: what such a query's output is, no definition says.
    compilation = compiled(mixing(fused(attn_mask=mask)), "mark")
    from gpusq_compile.passes.split_attention import run

    run(compilation)
    assert bool(outputs(compilation)[0].isfinite().all())


def quantizers(compilation: Compilation) -> dict[str, FakeQuantize]:
    return {
        str(node.target).removeprefix("gpusq.attention."): module
        for node, module in module_calls(compilation.ir)
        if isinstance(module, FakeQuantize) and "gpusq.attention." in str(node.target)
    }


@pytest.mark.parametrize("mix", [fused(), spelled_out()])
def test_all_that_the_two_products_multiply_is_quantized(mix: Mix) -> None:
    compilation = compiled(mixing(mix), "quantize")
    found = quantizers(compilation)
    assert set(found) == {"attn_query", "attn_key", "attn_value", "attn_softmax"}
    assert all(module.calibrated for module in found.values())
    # The softmax's values are at most 1, so its scale is 1 / 127 at most.
    assert float(found["attn_softmax"].scale.detach()) <= 1.0001 / 127
    assert plan_of(compilation).applied == Treatment(activation="int8")


def test_what_the_layer_before_quantizes_is_not_rounded_twice() -> None:
    wide = {
        "id": "wide",
        "match": {"name": "**.qkv"},
        "quantize": {"weight": "int8", "output": "int8"},
    }
    before = compiled(mixing(spelled_out()), "quantize", LINEARS_INT8, wide, ATTENTION_INT8)
    assert set(quantizers(before)) == {"attn_softmax"}
    # A fused attention scales its queries first: those are other values.
    scaled = compiled(mixing(fused()), "quantize", LINEARS_INT8, wide, ATTENTION_INT8)
    assert set(quantizers(scaled)) == {"attn_query", "attn_softmax"}
    [text] = [r.reason for r in remarks_of(scaled, "quantize") if r.layer == "attn"]
    assert text == "attention int8; key, value with the quantizer of the layer before"


def test_the_fine_tune_reaches_every_scale_of_an_attention() -> None:
    compilation = compiled(mixing(fused()), "quantize")
    args, kwargs = compilation.probe
    sum(leaf.square().sum() for leaf in tree_leaves(compilation.ir(*args, **kwargs))).backward()
    for name, module in quantizers(compilation).items():
        assert module.log_scale.grad is not None, name
        assert float(module.log_scale.grad.abs()) > 0, name


@pytest.fixture(scope="module")
def verified(tmp_path_factory: pytest.TempPathFactory) -> Compilation:
    model = mixing(fused(attn_mask=SEEN))
    workdir = tmp_path_factory.mktemp("attention")
    return compiled(model, "verify_onnx", workdir=workdir, precision="fp16")


@pytest.mark.parametrize("mix", [fused(attn_mask=SEEN), spelled_out(lambda x: x * 0.2 + 1)])
def test_the_folded_graph_is_what_onnx_runtime_computes(mix: Mix, tmp_path: Path) -> None:
    compilation = compiled(mixing(mix), "quantize", workdir=tmp_path)
    quantized = outputs(compilation)
    run_until(compilation, "verify_onnx")
    assert largest_difference(outputs(compilation)[0], quantized[0]) < 1e-5
    args, _ = compilation.probe
    [answer] = run_session(open_session(tmp_path / "model.onnx"), list(args))
    assert largest_difference(answer, quantized[0]) < 1e-4


def test_products_and_quantizers_bear_the_attentions_name(verified: Compilation) -> None:
    model = onnx.load(verified.workdir / "model.onnx")
    names = {node.name: node.op_type for node in model.graph.node if node.name.startswith("attn/")}
    assert names["attn/qk"] == names["attn/av"] == "MatMul"
    assert names["attn/softmax"] == "Softmax"
    for what in ("query", "key", "value", "softmax"):
        assert names[f"attn/{what}_q"] == "QuantizeLinear"
        assert names[f"attn/{what}_dq"] == "DequantizeLinear"


def test_no_value_in_a_half_precision_file_is_infinite(verified: Compilation) -> None:
    model = onnx.load(verified.workdir / "model.onnx")
    for tensor in model.graph.initializer:
        assert bool(torch.tensor(onnx.numpy_helper.to_array(tensor)).isfinite().all()), tensor.name


def rewire(model: onnx.ModelProto, name: str, index: int, source: str) -> None:
    next(node for node in model.graph.node if node.name == name).input[index] = source


def by_name(model: onnx.ModelProto, name: str) -> onnx.NodeProto:
    return next(node for node in model.graph.node if node.name == name)


def test_a_file_that_breaks_a_promise_is_told_which(verified: Compilation) -> None:
    plan = plan_of(verified)
    intact = onnx.load(verified.workdir / "model.onnx")
    assert check_attentions(intact, [plan]) == []

    model = onnx.load(verified.workdir / "model.onnx")
    rewire(model, "attn/qk", 0, by_name(model, "attn/query_q").input[0])
    assert check_attentions(model, [plan]) == ["attn: its query is not quantized"]

    model = onnx.load(verified.workdir / "model.onnx")
    scale = by_name(model, "attn/softmax_q").input[1]
    tensor = next(t for t in model.graph.initializer if t.name == scale)
    tensor.CopyFrom(onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(tensor) * 0, scale))
    assert any("its softmax scale is 0.0" in fault for fault in check_attentions(model, [plan]))

    model = onnx.load(verified.workdir / "model.onnx")
    by_name(model, "attn/av").name = "other"
    assert check_attentions(model, [plan]) == ["attn: no node attn/av in the file"]


@pytest.mark.skipif(bool(MISSING), reason=MISSING or "tensorrt_rtx is here")
def test_each_size_of_head_is_one_int8_kernel_and_others_are_refused(tmp_path: Path) -> None:
    model = seeded(Stack, (8, 4, 2, 16), dim=128)
    compilation = compiled(
        model, "build_engine", workdir=tmp_path, precision="fp16", engine="tensorrt-rtx"
    )
    assert compilation.engine is not None
    [engine] = compilation.engine.targets.values()
    assert [(found.name, found.actual, found.status) for found in engine.attentions] == [
        ("blocks.0", "int8", "passed"),
        ("blocks.1", "int8", "passed"),
        ("blocks.2", "int8", "passed"),
    ]
    lines = attention_lines(make_report(compilation, None, tmp_path / "model.onnx"))
    assert lines == [
        "attention: 3 of 4 in INT8",
        "  portable: 3 of 3 fused in one INT8 kernel each",
        "  refused on 1: TensorRT fuses INT8 attention with heads of 16, 32 or 64, not of 8",
    ]


@pytest.mark.skipif(bool(MISSING), reason=MISSING or "tensorrt_rtx is here")
@pytest.mark.parametrize("spelled", [True, False])
def test_windows_with_bias_and_mask_are_one_int8_kernel(spelled: bool, tmp_path: Path) -> None:
    model = seeded(Around, WindowAttention(49, spelled_out=spelled))
    compilation = compiled(
        model,
        "build_engine",
        tokens=196,
        workdir=tmp_path,
        precision="fp16",
        engine="tensorrt-rtx",
    )
    assert compilation.engine is not None
    [engine] = compilation.engine.targets.values()
    assert [found.status for found in engine.attentions] == ["passed"]


def test_a_refused_attention_is_no_part_of_the_engines_promises(verified: Compilation) -> None:
    compilation = run_until(fork(verified), "build_engine")
    assert compilation.engine is not None
    assert compilation.engine.targets == {}
    assert compilation.records[-1].matched == 4


def test_products_in_int8_count_as_such(verified: Compilation) -> None:
    entries = compute_figures(verified.ir, "fp16").entries
    products = [entry for entry in entries if entry.kind == "attention"]
    assert products
    assert {(entry.weight, entry.activation) for entry in products} == {("int8", "int8")}
