"""quantize: fake-quantizers stand where the rules asked, with scales from real data."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gpusq_compile.compilation import Compilation
from gpusq_compile.errors import InputError
from gpusq_compile.obs import Grid, sweep
from gpusq_compile.quantization.calibrate import weight_scale
from gpusq_compile.quantization.fake_quantize import MIN_SCALE, FakeQuantize
from gpusq_compile.remarks import Kind
from gpusq_compile.second_moments import second_moments
from gpusq_compile.sparsity import PATTERNS, magnitude_mask, violations
from tests.compilations import (
    INT8,
    SPARSE,
    begin,
    fork,
    make_rules,
    node_and_plan,
    outputs,
    plan_of,
    remarks_of,
    run_until,
)
from tests.models import Perceptron, Shape, TinyViT, images, noise, seeded
from tests.moments import inverse_factor


def rule(**quantize: Any) -> dict[str, Any]:
    return {"id": "q", "match": {"op": "linear"}, "quantize": {"weight": "int8", **quantize}}


def quantized(
    model: nn.Module, inputs: Tensor, *rules: Any, data: Any = None, **rest: Any
) -> Compilation:
    document = make_rules(*(rules or (rule(),)), **rest)
    return run_until(begin(model, inputs, document, data=data), "quantize")


def quantizer(compilation: Compilation, node: object) -> FakeQuantize:
    assert isinstance(node, torch.fx.Node)
    module = compilation.ir.get_submodule(str(node.target))
    assert isinstance(module, FakeQuantize)
    return module


def test_weights_and_inputs_are_quantized_as_a_plain_computation_would() -> None:
    model, inputs = seeded(Perceptron), noise(8, 32)
    calibration = {"weight": "max", "activation": "max"}
    compilation = quantized(model, inputs, calibration=calibration)

    def rounded(value: Tensor, scale: Tensor) -> Tensor:
        return (value / scale).round().clamp(-128, 127) * scale

    with torch.no_grad():
        first, second = (
            rounded(layer.weight, layer.weight.abs().amax(dim=1, keepdim=True) / 127)
            for layer in (model.first, model.second)
        )
        # Activations are calibrated on the model before any of it is quantized.
        shown = F.gelu(model.first(inputs))
        image = rounded(inputs, inputs.abs().max() / 127)
        hidden = F.gelu(F.linear(image, first, model.first.bias))
        hidden = rounded(hidden, shown.abs().max() / 127)
        expected = F.linear(hidden, second, model.second.bias)
    difference = (compilation.ir(inputs) - expected).abs()
    assert difference.mean() < 1e-4
    # A value on the edge between two levels may fall either way.
    assert difference.max() < 4 * shown.abs().max() / 127 * second.abs().max()


def test_the_error_of_quantizing_is_small_and_measured() -> None:
    change = quantized(seeded(TinyViT, Shape(depth=1)), images(8)).records[-1].change
    assert change is not None
    assert 0 < change < 0.5


def test_each_operator_reads_its_quantized_weight_and_input() -> None:
    compilation = quantized(seeded(Perceptron), noise(2, 32))
    for layer in ("first", "second"):
        node, plan = node_and_plan(compilation, layer)
        assert quantizer(compilation, node.args[0]).channels is None
        weight = quantizer(compilation, node.args[1])
        assert weight.channels == plan.shape[0]
        assert weight.calibrated
        assert plan.applied.weight == "int8"
        assert plan.applied.activation == "int8"
        assert plan.applied.output is None


def test_a_weights_scales_come_from_what_pruning_left() -> None:
    model = seeded(Perceptron)
    both = {**rule(), "sparsity": SPARSE}
    compilation = quantized(model, noise(2, 32), both)
    node, plan = node_and_plan(compilation, "first")
    weight = compilation.ir.get_parameter(plan.weight).detach()
    found = quantizer(compilation, node.args[1]).scale
    torch.testing.assert_close(found.detach(), weight_scale(weight, "mse", 127))
    assert (weight == 0).float().mean() == 0.5


def test_linears_that_read_one_tensor_share_its_quantizer() -> None:
    """Separate Q, K and V stay one INT8 GEMM for TensorRT only over one Q/DQ pair."""
    compilation = quantized(seeded(TinyViT, Shape(depth=1, attention="separate")), images(4))
    inputs = [
        node_and_plan(compilation, f"layers.0.mix.{n}")[0].args[0] for n in ("ask", "key", "val")
    ]
    assert inputs[0] is inputs[1] is inputs[2]
    node, _ = node_and_plan(compilation, "layers.0.feed.up")
    assert node.args[0] is not inputs[0]


def test_an_output_quantizer_stands_between_the_operator_and_all_its_readers() -> None:
    compilation = quantized(seeded(Perceptron), noise(2, 32), rule(output="int8"))
    for layer in ("first", "second"):
        node, plan = node_and_plan(compilation, layer)
        [reader] = node.users
        assert quantizer(compilation, reader).channels is None
        assert plan.applied.output == "int8"


class Chain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(32, 32), nn.Linear(32, 32)

    def forward(self, x: Tensor) -> Tensor:
        return self.two(self.one(x))


def test_an_output_that_is_quantized_already_is_not_quantized_again_as_the_next_input() -> None:
    compilation = quantized(seeded(Chain), noise(2, 32), rule(output="int8"))
    first, _ = node_and_plan(compilation, "one")
    second, plan = node_and_plan(compilation, "two")
    [output] = first.users
    assert second.args[0] is output
    assert quantizer(compilation, output).calibrated
    assert plan.applied.activation == "int8"


def test_a_weight_alone_is_quantized_without_data() -> None:
    model, inputs = seeded(Perceptron), noise(2, 32)
    compilation = begin(model, inputs, make_rules(rule(activation="none")))
    compilation.source.calibration_data = None
    run_until(compilation, "quantize")
    plan = plan_of(compilation, "first")
    assert (plan.applied.weight, plan.applied.activation) == ("int8", None)


def test_only_what_was_asked_for_is_quantized() -> None:
    only = {**rule(), "match": {"name": "second"}}
    compilation = quantized(seeded(Perceptron), noise(2, 32), only)
    assert plan_of(compilation, "first").applied.weight is None
    assert sum(isinstance(m, FakeQuantize) for m in compilation.ir.modules()) == 2
    record = compilation.records[-1]
    assert (record.matched, record.changed, record.skipped) == (1, 1, 0)


@pytest.mark.parametrize("precision", ["fp16", "fp32"])
def test_scales_have_the_targets_type(precision: str) -> None:
    compilation = quantized(seeded(Perceptron), noise(2, 32), precision=precision)
    modules = [m for m in compilation.ir.modules() if isinstance(m, FakeQuantize)]
    dtype = {"fp16": torch.float16, "fp32": torch.float32}[precision]
    for module in modules:
        scale = module.exported_scale().detach()
        assert torch.equal(scale.to(dtype).float(), scale)


# --- calibration ---------------------------------------------------------------------------------


def input_scale(compilation: Compilation, layer: str = "first") -> float:
    node, _ = node_and_plan(compilation, layer)
    return quantizer(compilation, node.args[0]).scale.item()


def test_as_many_batches_calibrate_as_the_rules_say() -> None:
    data = [torch.full((2, 32), float(value)) for value in (1, 2, 4)]
    for count, largest in ((1, 1.0), (2, 2.0), (9, 4.0)):
        compilation = quantized(
            seeded(Perceptron),
            data[0],
            data=data,
            calibration={"batches": count, "activation": "max"},
        )
        assert input_scale(compilation) == pytest.approx(largest / 127)
        [remark] = remarks_of(compilation, "quantize", Kind.ANALYSIS)
        assert f"2 tensors from {2 * min(count, 3)} images of calibration_data" in remark.reason


def test_training_data_calibrates_where_there_is_no_other() -> None:
    inputs = torch.ones(2, 32)
    compilation = begin(
        seeded(Perceptron),
        inputs,
        make_rules(rule()),
        train_data=[(3 * inputs, torch.zeros(2).long())],
    )
    compilation.source.calibration_data = None
    run_until(compilation, "quantize")
    assert input_scale(compilation) == pytest.approx(3 / 127, rel=1e-3)


def test_the_quantizers_are_calibrated_on_the_float_model_and_let_go_of_what_they_saw() -> None:
    compilation = quantized(seeded(Perceptron), noise(2, 32))
    modules = [m for m in compilation.ir.modules() if isinstance(m, FakeQuantize)]
    assert all(module.observer is None and module.calibrated for module in modules)


def test_no_data_is_an_error_that_says_what_to_define() -> None:
    compilation = begin(seeded(Perceptron), noise(2, 32), make_rules(rule()))
    compilation.source.calibration_data = None
    with pytest.raises(InputError) as caught:
        run_until(compilation, "quantize")
    assert caught.value.code == "no-calibration-data"
    assert "Perceptron" in caught.value.message
    assert "calibration_data" in str(caught.value.hint)


def test_an_activation_that_is_not_finite_names_its_layer() -> None:
    model = seeded(Perceptron)
    compilation = begin(model, torch.ones(2, 32), make_rules(rule()))
    run_until(compilation, "tap")
    overflowing = torch.full((2, 32), 3e38)
    compilation.source.calibration_data = lambda: [overflowing]
    with pytest.raises(InputError) as caught:
        run_until(compilation, "quantize")
    assert caught.value.code == "activation-not-finite"
    assert "second" in caught.value.message


def test_an_activation_that_no_scale_of_the_target_reaches_is_refused() -> None:
    """Such a scale would be infinite in the file."""
    compilation = begin(
        seeded(Perceptron), 1e8 * noise(2, 32), make_rules(rule(), precision="fp16")
    )
    with pytest.raises(InputError) as caught:
        run_until(compilation, "quantize")
    assert caught.value.code == "activation-too-large"
    assert "first" in caught.value.message
    assert "precision: fp32" in str(caught.value.hint)


def test_an_activation_of_zeros_gets_the_smallest_scale_and_is_told() -> None:
    compilation = quantized(seeded(Perceptron), torch.zeros(2, 32))
    [remark] = remarks_of(compilation, "quantize", Kind.MISSED)
    assert (remark.code, remark.layer) == ("dead-activation", "first")
    assert input_scale(compilation) == pytest.approx(MIN_SCALE)
    assert torch.isfinite(outputs(compilation)[0]).all()


def test_scales_are_parameters_that_a_fine_tune_can_train() -> None:
    compilation = fork(quantized(seeded(Perceptron), noise(2, 32), rule(**INT8)))
    names = [name for name, _ in compilation.ir.named_parameters() if name.endswith(".log_scale")]
    assert len(names) == 4


# --- rounding that looks at the inputs -----------------------------------------------------------

GPTQ = {"rounding": "gptq"}


def weights_as_read(compilation: Compilation, layer: str) -> tuple[Tensor, Tensor]:
    """The stored weight, and the one that the operator reads."""
    node, plan = node_and_plan(compilation, layer)
    stored = compilation.ir.get_parameter(plan.weight).detach()
    source = node.args[1]
    chain = []
    while isinstance(source, torch.fx.Node) and source.op == "call_module":
        chain.append(compilation.ir.get_submodule(str(source.target)))
        source = source.args[0]
    read = stored
    for module in reversed(chain):
        read = module(read)
    return stored, read.detach()


def shared_directions(rows: int, columns: int, seed: int = 0) -> Tensor:
    hidden = noise(rows, columns // 4, seed=seed) @ noise(columns // 4, columns, seed=99)
    return hidden + 0.3 * noise(rows, columns, seed=seed + 1000)


@pytest.mark.parametrize("precision", ["fp16", "fp32"])
@pytest.mark.parametrize("method", ["none", "magnitude", "obs"])
def test_gptq_stores_values_that_fake_quantization_leaves_as_they_are(
    method: str, precision: str
) -> None:
    block: dict[str, Any] = rule(**GPTQ)
    if method != "none":
        block["sparsity"] = {**SPARSE, "method": method}
    compilation = quantized(
        seeded(Perceptron), shared_directions(64, 32), block, precision=precision
    )
    for layer in ("first", "second"):
        stored, read = weights_as_read(compilation, layer)
        assert torch.equal(stored, read)
        if method != "none":
            assert violations(stored, PATTERNS["2:4"]) == 0


def test_gptq_keeps_the_scales_and_the_mask() -> None:
    found = {}
    for rounding in ("nearest", "gptq"):
        block = {**rule(rounding=rounding), "sparsity": SPARSE}
        compilation = quantized(seeded(Perceptron), shared_directions(64, 32), block)
        node, _ = node_and_plan(compilation, "first")
        scale = quantizer(compilation, node.args[1]).scale.detach()
        found[rounding] = (scale, weights_as_read(compilation, "first")[1])
    (scale, nearest), (same_scale, rounded) = found["nearest"], found["gptq"]
    assert torch.equal(scale, same_scale)
    assert not torch.equal(nearest, rounded)
    masked = magnitude_mask(seeded(Perceptron).first.weight.detach(), PATTERNS["2:4"]).logical_not()
    assert not rounded[masked].any()


def test_gptq_rounds_each_layer_on_the_inputs_that_the_deployed_model_gives_it() -> None:
    model, inputs = seeded(Perceptron), shared_directions(64, 32)
    before = model.second.weight.detach().clone()
    compilation = quantized(model, inputs, rule(**GPTQ))
    node, _ = node_and_plan(compilation, "second")
    shown, expected = [], quantizer(compilation, node.args[1])
    module = quantizer(compilation, node.args[0])
    handle = module.register_forward_hook(lambda _, __, output: shown.append(output.detach()))
    with torch.no_grad():
        compilation.ir(inputs)
    handle.remove()
    grid = Grid(expected.exported_scale().detach(), expected.grid)
    weight, _ = sweep(before, inverse_factor(second_moments(shown), 0.01), grid=grid)
    assert torch.equal(weights_as_read(compilation, "second")[0], weight)


def test_gptq_is_closer_to_the_float_model_than_rounding_to_the_nearest_and_says_by_how_much() -> (
    None
):
    held_out = shared_directions(256, 32, seed=5)
    errors = {}
    for rounding in ("nearest", "gptq"):
        model = seeded(Perceptron)
        with torch.no_grad():
            dense = model(held_out)
        block = rule(rounding=rounding, activation="none")
        compilation = quantized(model, shared_directions(512, 32), block)
        with torch.no_grad():
            errors[rounding] = float((compilation.ir(held_out) - dense).norm() / dense.norm())
    assert errors["gptq"] < 0.9 * errors["nearest"]
    told = [r for r in remarks_of(compilation, "quantize") if r.code == "rounded"]
    assert [remark.layer for remark in told] == ["first", "second"]
    for remark in told:
        gptq, nearest = (float(number) for number in re.findall(r"([\d.]+)%", remark.reason))
        assert gptq < nearest


def joint_rules(**finetune: Any) -> dict[str, Any]:
    block = {**rule(**GPTQ), "sparsity": {**SPARSE, "method": "obs"}}
    return make_rules(block, finetune=finetune)


def test_obs_and_gptq_are_one_sweep_where_nothing_runs_between() -> None:
    model, inputs = seeded(Perceptron), shared_directions(64, 32)
    dense = model.first.weight.detach().clone()
    compilation = begin(model, inputs, joint_rules())
    run_until(compilation, "sparsify")
    scale = weight_scale(dense * magnitude_mask(dense, PATTERNS["2:4"]), "mse", 127)
    swept = compilation.ir.get_parameter("first.weight").detach().clone()
    told = remarks_of(compilation, "sparsify", Kind.PASSED)[0].reason
    assert told.endswith("rounded to int8 in the same sweep")
    run_until(compilation, "quantize")
    node, _ = node_and_plan(compilation, "first")
    module = quantizer(compilation, node.args[1])
    torch.testing.assert_close(module.scale.detach(), scale)
    stored, read = weights_as_read(compilation, "first")
    assert torch.equal(stored, swept)
    assert torch.equal(read, swept)
    grid = Grid(module.exported_scale().detach(), module.grid)
    expected, _ = sweep(
        dense, inverse_factor(second_moments([inputs]), 0.01), pattern=PATTERNS["2:4"], grid=grid
    )
    assert torch.equal(swept, expected)
    assert [r for r in remarks_of(compilation, "quantize") if r.code == "rounded"] == []


@pytest.mark.parametrize(
    ("finetune", "joint"),
    [
        ({"sparse": "none", "quantize": "none"}, True),
        ({"sparse": {"epochs": 1}, "quantize": "none"}, False),
        ({"sparse": "none"}, False),
    ],
)
def test_a_fine_tune_that_follows_gets_weights_that_are_pruned_and_not_rounded(
    finetune: dict[str, Any], joint: bool
) -> None:
    """The sparse phase would leave the grid; the quantized one learns from the sparse float
    model."""
    inputs = shared_directions(64, 32)
    data = [(inputs, torch.zeros(64).long())]
    compilation = begin(
        seeded(Perceptron), inputs, joint_rules(**finetune), train_data=data, finetune=True
    )
    run_until(compilation, "sparsify")
    for remark in remarks_of(compilation, "sparsify", Kind.PASSED):
        assert ("in the same sweep" in remark.reason) == joint


@pytest.mark.parametrize(("first", "joint"), [("sparsify", False), ("smooth", True)])
def test_scales_that_move_into_the_weight_afterwards_keep_rounding_apart(
    first: str, joint: bool
) -> None:
    order = ["permute", "tap", "sparsify", "finetune_sparse", "smooth", "quantize"]
    order += ["reconstruct", "finetune_quantized"]
    if first == "smooth":
        order.remove("smooth")
        order.insert(0, "smooth")
    block = {**rule(**GPTQ, smooth=0.5), "sparsity": {**SPARSE, "method": "obs"}}
    compilation = begin(seeded(Perceptron), noise(16, 32), make_rules(block, passes=order))
    run_until(compilation, "sparsify")
    for remark in remarks_of(compilation, "sparsify", Kind.PASSED):
        assert ("in the same sweep" in remark.reason) == joint


def test_gptq_without_data_is_an_error_that_says_so() -> None:
    block = rule(activation="none", **GPTQ)
    compilation = begin(seeded(Perceptron), noise(2, 32), make_rules(block))
    compilation.source.calibration_data = None
    with pytest.raises(InputError) as caught:
        run_until(compilation, "quantize")
    assert caught.value.code == "no-calibration-data"
    assert "rounding gptq looks at the inputs" in caught.value.message


def test_gptq_on_generated_noise_is_told() -> None:
    block = rule(activation="none", **GPTQ)
    compilation = begin(seeded(Perceptron), noise(2, 32), make_rules(block))
    compilation.source.synthetic = True
    run_until(compilation, "quantize")
    [remark] = remarks_of(compilation, "quantize", Kind.MISSED)
    assert remark.code == "synthetic-calibration"


@pytest.mark.parametrize("weight", ["int8", "int4"])
def test_channels_whose_scale_is_the_smallest_there_is_are_remarked(weight: str) -> None:
    model = seeded(Perceptron)
    with torch.no_grad():
        model.first.weight[:3] = 0
        model.first.weight[3] *= 1e-7
    compilation = run_until(
        begin(model, noise(8, 32), make_rules(rule(weight=weight, activation="none"))), "quantize"
    )
    found = {r.code: r for r in remarks_of(compilation, "quantize") if "-weights" in r.code}
    assert {remark.layer for remark in found.values()} == {"first"}
    assert found["dead-weights"].kind is Kind.ANALYSIS
    assert found["dead-weights"].reason.startswith("all weights of 3 of 64 output")
    assert found["tiny-weights"].kind is Kind.MISSED
    assert found["tiny-weights"].reason.startswith("the weights of 1 of 64 output")
