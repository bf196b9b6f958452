"""fold: masks and scales become stored integers and zeros, and the function stays the same."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from gpusq_compile.compilation import Compilation
from gpusq_compile.graph.query import tensor_attribute
from gpusq_compile.quantization.fake_quantize import (
    ACTIVATION_RANGES,
    WEIGHT_RANGES,
    quantize_values,
)
from gpusq_compile.sparsity import PATTERNS, violations
from tests.compilations import (
    INT8,
    SPARSE,
    TAPS,
    begin,
    fork,
    make_rules,
    node_and_plan,
    outputs,
    plan_of,
    run_until,
    targets,
)
from tests.models import Convolution, Perceptron, Shape, TinyViT, images, labelled, noise, seeded

ALL = {"op": ["linear", "conv2d"]}
INT4 = {"weight": "int4", "activation": "int4", "output": "int4"}
PRUNE = {"id": "s", "match": ALL, "sparsity": SPARSE}
QUANTIZE = {"id": "q", "match": ALL, "quantize": {**INT8, "output": "int8"}}


@pytest.fixture(scope="module")
def quantized() -> Compilation:
    document = make_rules(TAPS, PRUNE, QUANTIZE)
    compilation = begin(seeded(TinyViT, Shape(depth=1)), images(4), document)
    return run_until(compilation, "finetune_quantized")


@pytest.fixture(scope="module")
def folded(quantized: Compilation) -> Compilation:
    return run_until(fork(quantized), "fold")


def folded_with(model: nn.Module, inputs: Tensor, *rules: Any) -> Compilation:
    return run_until(begin(model, inputs, make_rules(*rules)), "fold")


def test_the_folded_graph_is_the_fake_quantized_one_bit_for_bit(
    quantized: Compilation, folded: Compilation
) -> None:
    for count in (1, 5):
        batch = images(count, seed=count)
        assert torch.equal(folded.ir(batch), quantized.ir(batch))
    assert folded.records[-1].change == 0.0


def test_no_inserted_module_is_left(folded: Compilation) -> None:
    assert not [node for node in folded.ir.graph.nodes if node.op == "call_module"]
    names = {type(module).__name__ for module in folded.ir.modules()}
    assert names.isdisjoint({"Mask", "FakeQuantize", "Tap"})
    assert {"sparse", "quantized", "tapped"}.isdisjoint(folded.facts)


def test_weights_are_stored_as_sparse_integers_with_a_scale_per_output_channel(
    folded: Compilation,
) -> None:
    node, plan = node_and_plan(folded, "layers.0.feed.up")
    levels = tensor_attribute(folded.ir, plan.weight)
    scale = tensor_attribute(folded.ir, "gpusq.weight_scale.layers_0_feed_up")
    assert levels.dtype == torch.int8
    assert levels.shape == plan.shape
    assert scale.shape == plan.shape[:1]
    assert violations(levels, PATTERNS["2:4"]) == 0
    assert int(levels.abs().max()) == 127
    assert plan.weight not in dict(folded.ir.named_parameters())
    weight = node.args[1]
    assert isinstance(weight, torch.fx.Node)
    assert [str(source.target) for source in weight.all_input_nodes] == [
        plan.weight,
        "gpusq.weight_scale.layers_0_feed_up",
    ]


def test_each_tensor_is_quantized_and_dequantized_by_operators(folded: Compilation) -> None:
    found = targets(folded)
    # Of each of six layers: the weight, the input and the output; all inputs differ here.
    assert found.count("gpusq.quantize.default") == 12
    assert found.count("gpusq.dequantize.default") == 18


def test_a_layer_that_is_only_pruned_keeps_a_float_parameter_with_zeros() -> None:
    compilation = folded_with(seeded(Perceptron), noise(2, 32), PRUNE)
    weight = compilation.ir.get_parameter("first.weight")
    assert weight.dtype == torch.float32
    assert violations(weight, PATTERNS["2:4"]) == 0
    assert not any("gpusq" in target for target in targets(compilation))


def test_a_weight_alone_is_dequantized_and_its_input_stays_float() -> None:
    rule = {"id": "w", "match": ALL, "quantize": {"weight": "int8", "activation": "none"}}
    compilation = folded_with(seeded(Perceptron), noise(2, 32), rule)
    found = targets(compilation)
    assert found.count("gpusq.dequantize.default") == 2
    assert found.count("gpusq.quantize.default") == 0


def test_an_input_alone_leaves_the_weight_a_parameter() -> None:
    rule = {"id": "a", "match": ALL, "quantize": {"weight": "none", "activation": "int8"}}
    compilation = folded_with(seeded(Perceptron), noise(2, 32), rule)
    assert compilation.ir.get_parameter("first.weight").dtype == torch.float32
    assert targets(compilation).count("gpusq.quantize.default") == 2


def test_a_convolution_is_folded_like_a_linear() -> None:
    model, inputs = seeded(Convolution, 8, 4, 3), noise(2, 8, 6, 6)
    compilation = run_until(begin(model, inputs, make_rules(PRUNE, QUANTIZE)), "finetune_quantized")
    before = outputs(compilation)
    run_until(compilation, "fold")
    assert torch.equal(outputs(compilation)[0], before[0])
    levels = tensor_attribute(compilation.ir, "conv.weight")
    assert (levels.dtype, levels.shape) == (torch.int8, (4, 8, 3, 3))
    assert violations(levels, PATTERNS["2:4"]) == 0


def test_layers_that_nobody_asked_for_are_left_alone() -> None:
    rule = {**QUANTIZE, "match": {"name": "first"}}
    compilation = folded_with(seeded(Perceptron), noise(2, 32), rule)
    original = seeded(Perceptron).second.weight
    assert torch.equal(compilation.ir.get_parameter("second.weight"), original)
    assert plan_of(compilation, "second").applied.weight is None


def test_what_the_final_file_must_reproduce_is_recorded_on_evaluation_data_first() -> None:
    data, held_out = labelled(1, seed=1), labelled(4, seed=2)
    model = seeded(TinyViT, Shape(depth=1))
    compilation = begin(model, images(2), make_rules(QUANTIZE), data=data, eval_data=held_out)
    run_until(compilation, "finetune_quantized")
    expected = [compilation.ir(inputs) for inputs, _ in held_out[:2]]
    run_until(compilation, "fold")
    assert len(compilation.expected) == 2
    for record, (inputs, _), outputs_ in zip(
        compilation.expected, held_out, expected, strict=False
    ):
        assert torch.equal(record.inputs[0], inputs)
        assert torch.equal(record.outputs[0], outputs_)


def test_a_model_without_data_is_compared_on_the_example() -> None:
    rule = {"id": "w", "match": ALL, "quantize": {"weight": "int8", "activation": "none"}}
    compilation = begin(seeded(Perceptron), noise(3, 32), make_rules(rule))
    compilation.source.calibration_data = None
    run_until(compilation, "fold")
    [record] = compilation.expected
    assert torch.equal(record.inputs[0], compilation.probe[0][0])


# --- 4-bit values in int8 ------------------------------------------------------------------------


@pytest.fixture(scope="module")
def quantized4() -> Compilation:
    rule = {"id": "q", "match": ALL, "quantize": INT4}
    compilation = begin(seeded(TinyViT, Shape(depth=1)), images(4), make_rules(TAPS, PRUNE, rule))
    return run_until(compilation, "finetune_quantized")


@pytest.fixture(scope="module")
def folded4(quantized4: Compilation) -> Compilation:
    return run_until(fork(quantized4), "fold")


def test_four_bits_fold_into_the_fake_quantized_graph_bit_for_bit(
    quantized4: Compilation, folded4: Compilation
) -> None:
    """Far outside the calibrated range too, where int8 alone would not saturate."""
    for factor in (1.0, 30.0):
        batch = factor * images(5, seed=7)
        assert torch.equal(folded4.ir(batch), quantized4.ir(batch))
    assert folded4.records[-1].change == 0.0


def test_four_bit_weights_are_stored_in_int8_within_their_own_range(folded4: Compilation) -> None:
    for name in ("layers.0.feed.up", "layers.0.mix.wide"):
        levels = tensor_attribute(folded4.ir, plan_of(folded4, name).weight)
        assert levels.dtype == torch.int8
        assert (int(levels.min()), int(levels.max())) == (-7, 7)
        assert violations(levels, PATTERNS["2:4"]) == 0


def test_each_four_bit_activation_is_clipped_ahead_of_its_quantizer(folded4: Compilation) -> None:
    quantizers = [
        node for node in folded4.ir.graph.nodes if node.target is torch.ops.gpusq.quantize.default
    ]
    assert len(quantizers) == 12
    for node in quantizers:
        clip, scale = node.args
        assert isinstance(clip, torch.fx.Node)
        assert isinstance(scale, torch.fx.Node)
        assert clip.target is torch.ops.aten.clamp.default
        step = tensor_attribute(folded4.ir, str(scale.target)).item()
        assert clip.args[1:] == (-8 * step, 7 * step)


def test_eight_bit_activations_are_not_clipped(folded: Compilation) -> None:
    assert "aten.clamp.default" not in targets(folded)


@settings(deadline=None)
@given(
    step=st.floats(2.0**-18, 8000.0),
    levels=st.lists(st.floats(-40, 40), min_size=1, max_size=50),
)
def test_borders_rounded_to_fp16_clip_to_the_same_levels(step: float, levels: list[float]) -> None:
    """What the final FP16 file computes: scale, borders and values are FP16 numbers."""
    scale = torch.tensor(step).half().float()
    values = (torch.tensor(levels) * scale).half().float()
    values = values.nan_to_num(posinf=65504.0, neginf=-65504.0)
    grid = ACTIVATION_RANGES["int4"]
    low, high = (
        (torch.tensor(level) * scale).clamp(-65504.0, 65504.0).half().float()
        for level in (grid.qmin, grid.qmax)
    )
    clipped = torch.ops.gpusq.quantize(values.clamp(low, high), scale)
    assert torch.equal(clipped, quantize_values(values, scale, grid))


@pytest.mark.parametrize(("weight", "activation"), [("int4", "int8"), ("int8", "int4")])
def test_weight_and_activation_may_differ_in_width(weight: str, activation: str) -> None:
    rule = {**QUANTIZE, "quantize": {"weight": weight, "activation": activation}}
    document = make_rules(PRUNE, rule)
    before = run_until(begin(seeded(Perceptron), noise(8, 32), document), "finetune_quantized")
    expected = outputs(before)[0]
    after = run_until(before, "fold")
    assert torch.equal(outputs(after)[0], expected)
    levels = tensor_attribute(after.ir, "first.weight")
    assert int(levels.abs().max()) == WEIGHT_RANGES[weight].qmax
    assert targets(after).count("aten.clamp.default") == (2 if activation == "int4" else 0)


def test_one_tensor_may_be_read_in_eight_and_in_four_bits() -> None:
    eight = {"id": "q8", "match": {"name": "**.wide"}, "quantize": {**INT8, "output": "int8"}}
    four = {"id": "q4", "match": ALL, "quantize": {**INT4, "output": "none"}}
    document = make_rules(PRUNE, four, eight)
    before = begin(seeded(TinyViT, Shape(depth=1)), images(4), document)
    expected = outputs(run_until(before, "finetune_quantized"))[0]
    after = run_until(before, "fold")
    assert torch.equal(outputs(after)[0], expected)
