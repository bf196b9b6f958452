"""sparsify: a fixed mask stands between each marked weight and its operator."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gpusq_compile.compilation import Compilation
from gpusq_compile.errors import InputError
from gpusq_compile.graph.query import tensor_attribute
from gpusq_compile.obs import sweep
from gpusq_compile.remarks import Kind
from gpusq_compile.second_moments import second_moments
from gpusq_compile.sparsity import PATTERNS, Mask, magnitude_mask, violations, wanda_mask
from tests.compilations import (
    SPARSE,
    begin,
    make_rules,
    node_and_plan,
    outputs,
    plan_of,
    remarks_of,
    run_until,
)
from tests.models import Convolution, Perceptron, Shape, TinyViT, images, noise, seeded
from tests.moments import inverse_factor, output_error

RULE: dict[str, Any] = {"id": "s", "match": {"op": ["linear", "conv2d"]}, "sparsity": SPARSE}


def sparsified(model: nn.Module, inputs: Tensor, *rules: Any) -> Compilation:
    return run_until(begin(model, inputs, make_rules(*(rules or (RULE,)))), "sparsify")


def mask_of(compilation: Compilation, layer: str) -> Tensor:
    """The mask that the layer's operator really reads its weight through."""
    node, plan = node_and_plan(compilation, layer)
    call = node.args[1]
    assert isinstance(call, torch.fx.Node)
    module = compilation.ir.get_submodule(str(call.target))
    assert isinstance(module, Mask)
    [source] = call.all_input_nodes
    assert (source.op, source.target) == ("get_attr", plan.weight)
    return module.mask


def test_the_graph_computes_with_masked_weights() -> None:
    model, inputs = seeded(Perceptron), noise(2, 32)
    compilation = sparsified(model, inputs)
    first, second = (
        layer.weight.detach() * mask_of(compilation, name)
        for name, layer in (("first", model.first), ("second", model.second))
    )
    with torch.no_grad():
        hidden = F.gelu(F.linear(inputs, first, model.first.bias))
        expected = F.linear(hidden, second, model.second.bias)
    torch.testing.assert_close(outputs(compilation), [expected])


def test_the_mask_is_the_magnitude_mask_of_the_dense_weight_and_the_weight_stays_dense() -> None:
    model = seeded(Perceptron)
    weight = model.first.weight.detach().clone()
    compilation = sparsified(model, noise(2, 32))
    assert torch.equal(mask_of(compilation, "first"), magnitude_mask(weight, PATTERNS["2:4"]))
    assert torch.equal(tensor_attribute(compilation.ir, "first.weight"), weight)


@pytest.mark.parametrize("how", ["magnitude", "wanda", "obs"])
@pytest.mark.parametrize("pattern", PATTERNS)
def test_linears_and_convolutions_are_masked_along_their_input_channels(
    pattern: str, how: str
) -> None:
    rule = {**RULE, "sparsity": {"pattern": pattern, "method": how}}
    convolution = sparsified(seeded(Convolution, 8, 4, 3), noise(6, 8, 6, 6), rule)
    linear = sparsified(seeded(Perceptron), correlated(64, 32), rule)
    layers = {"conv": (convolution, (4, 8, 3, 3)), "first": (linear, (64, 32))}
    for layer, (compilation, shape) in layers.items():
        mask = mask_of(compilation, layer)
        assert mask.shape == shape
        assert violations(mask, PATTERNS[pattern]) == 0
        assert mask.sum() == mask.numel() // 2
        assert plan_of(compilation, layer).applied.sparsity == pattern
        [told] = [r.reason for r in remarks_of(compilation, "sparsify") if r.layer == layer]
        assert told.startswith(f"{pattern} keeps ")


def test_a_patch_embedding_is_masked_along_all_of_its_patch() -> None:
    """Three input channels have no groups of four; the rewritten 3 * 4 * 4 have."""
    compilation = sparsified(seeded(Convolution, 3, 8, 4, stride=4), noise(2, 3, 8, 8))
    assert mask_of(compilation, "conv").shape == (8, 48)


def test_only_what_was_asked_for_is_masked() -> None:
    rule = {**RULE, "match": {"name": "first"}}
    compilation = sparsified(seeded(Perceptron), noise(2, 32), rule)
    assert plan_of(compilation, "first").applied.sparsity == "2:4"
    assert plan_of(compilation, "second").applied.sparsity is None
    masks = [module for module in compilation.ir.modules() if isinstance(module, Mask)]
    assert len(masks) == 1
    record = compilation.records[-1]
    assert (record.matched, record.changed, record.skipped) == (1, 1, 0)


def test_a_refused_layer_gets_no_mask() -> None:
    compilation = sparsified(seeded(Perceptron, (30, 64, 32)), noise(2, 30))
    assert plan_of(compilation, "first").applied.sparsity is None
    assert plan_of(compilation, "second").applied.sparsity == "2:4"


def test_the_share_of_the_energy_that_is_kept_is_told() -> None:
    model = seeded(Perceptron)
    with torch.no_grad():
        # In each group 9 + 16 of 30 parts of the energy are kept.
        model.first.weight.copy_(torch.tensor([1.0, 2.0, 3.0, 4.0]).repeat(64, 8))
        model.second.weight.zero_()
    compilation = sparsified(model, noise(2, 32))
    found = {r.layer: r.reason for r in remarks_of(compilation, "sparsify", Kind.PASSED)}
    assert found["first"] == "2:4 keeps 83.3% of the energy"
    # Nothing was lost of a weight that is zero.
    assert "second" in found


def test_the_error_of_pruning_is_measured() -> None:
    change = sparsified(seeded(Perceptron), noise(2, 32)).records[-1].change
    assert change is not None
    assert change == pytest.approx(change, abs=10)
    assert change > 0


# --- masks that look at the inputs ---------------------------------------------------------------


def method(name: str) -> dict[str, Any]:
    return {**RULE, "sparsity": {**SPARSE, "method": name}}


def correlated(rows: int, columns: int, seed: int = 0) -> Tensor:
    """Inputs [rows, columns] that share a few directions, as real activations do."""
    hidden = noise(rows, columns // 4, seed=seed) @ noise(columns // 4, columns, seed=99)
    return hidden + 0.3 * noise(rows, columns, seed=seed + 1000)


def test_wanda_takes_the_norms_of_inputs_that_pruned_layers_put_out_and_moves_no_weight() -> None:
    model = seeded(Perceptron)
    data = [noise(9, 32, seed=seed) * torch.linspace(0.1, 5, 32) for seed in range(3)]
    before = {name: value.clone() for name, value in model.state_dict().items()}
    compilation = run_until(
        begin(model, data[0], make_rules(method("wanda")), data=data), "sparsify"
    )
    shown = torch.cat(data)
    first, second = before["first.weight"], before["second.weight"]
    mask = wanda_mask(first, shown.square().mean(dim=0), PATTERNS["2:4"])
    hidden = F.gelu(F.linear(shown, first * mask, before["first.bias"]))
    assert torch.equal(mask_of(compilation, "first"), mask)
    expected = wanda_mask(second, hidden.square().mean(dim=0), PATTERNS["2:4"])
    assert torch.equal(mask_of(compilation, "second"), expected)
    assert not torch.equal(mask, magnitude_mask(first, PATTERNS["2:4"]))
    for name, value in before.items():
        assert torch.equal(tensor_attribute(compilation.ir, name), value)


def test_obs_stores_the_compensated_weight_and_goes_on_from_what_it_puts_out() -> None:
    model = seeded(Perceptron)
    data = [correlated(50, 32, seed) for seed in range(2)]
    before = {name: value.clone() for name, value in model.state_dict().items()}
    rules = make_rules(method("obs"), calibration={"damping": 0.05})
    compilation = run_until(begin(model, data[0], rules, data=data), "sparsify")
    rows = data
    for layer in ("first", "second"):
        dense = before[f"{layer}.weight"]
        weight, mask = sweep(
            dense, inverse_factor(second_moments(rows), 0.05), pattern=PATTERNS["2:4"]
        )
        torch.testing.assert_close(tensor_attribute(compilation.ir, f"{layer}.weight"), weight)
        assert torch.equal(mask_of(compilation, layer), mask)
        rows = [F.gelu(F.linear(part, weight, before[f"{layer}.bias"])) for part in rows]


@pytest.mark.parametrize("kind", ["linear", "conv2d"])
def test_obs_is_closer_to_the_dense_layer_than_magnitude_on_other_images(kind: str) -> None:
    linear = kind == "linear"
    model = seeded(Perceptron) if linear else seeded(Convolution, 8, 16, 3, padding=1)
    data, held_out = (
        correlated(512, 32, seed) if linear else correlated(6 * 8 * 8 * 8, 8, seed)
        for seed in (0, 5)
    )
    if not linear:
        data, held_out = (part.reshape(-1, 8, 8, 8).movedim(-1, 1) for part in (data, held_out))
    with torch.no_grad():
        dense = model(held_out)
    errors = {}
    for name in ("magnitude", "obs"):
        rules = make_rules(method(name))
        copied = seeded(Perceptron) if linear else seeded(Convolution, 8, 16, 3, padding=1)
        compilation = run_until(begin(copied, data, rules), "sparsify")
        with torch.no_grad():
            errors[name] = float((compilation.ir(held_out) - dense).norm() / dense.norm())
    assert errors["obs"] < 0.8 * errors["magnitude"]


def test_each_layer_may_have_its_own_method() -> None:
    model = seeded(TinyViT, Shape(depth=1, attention="separate"))
    rules = make_rules(
        RULE,
        {**method("obs"), "id": "o", "match": {"name": ["**.key", "**.down"]}},
        {**method("wanda"), "id": "w", "match": {"name": "**.up"}},
    )
    compilation = run_until(begin(model, images(8), rules), "sparsify")
    found = {r.layer: r.reason for r in remarks_of(compilation, "sparsify", Kind.PASSED)}
    compensated = {layer for layer, reason in found.items() if "output error" in reason}
    assert compensated == {"layers.0.mix.key", "layers.0.feed.down"}
    for layer in found:
        assert layer is not None
        mask = mask_of(compilation, layer)
        assert mask.sum() == mask.numel() // 2
        weight = tensor_attribute(compilation.ir, plan_of(compilation, layer).weight)
        assert (violations(weight, PATTERNS["2:4"]) == 0) == (layer in compensated)


def test_the_error_of_obs_is_told_beside_that_of_magnitude() -> None:
    model, inputs = seeded(Perceptron), correlated(64, 32)
    dense = model.first.weight.detach().clone()
    compilation = run_until(begin(model, inputs, make_rules(method("obs"))), "sparsify")
    moments = second_moments([inputs])
    found = tensor_attribute(compilation.ir, "first.weight").detach()
    plain = dense * magnitude_mask(dense, PATTERNS["2:4"])
    error, other = (output_error(dense, after, moments) for after in (found, plain))
    told = remarks_of(compilation, "sparsify", Kind.PASSED)[0].reason
    assert told.startswith("2:4 keeps ")
    assert told.endswith(f"of the energy, output error {error:.1%} (magnitude: {other:.1%})")


def test_the_dense_teacher_keeps_the_dense_weight() -> None:
    model, inputs = seeded(Perceptron), correlated(64, 32)
    dense = model.first.weight.detach().clone()
    data = [(inputs, torch.zeros(64).long())]
    compilation = begin(
        model, inputs, make_rules(method("obs")), data=data, train_data=data, finetune=True
    )
    run_until(compilation, "sparsify")
    assert compilation.dense_teacher is not None
    assert torch.equal(tensor_attribute(compilation.dense_teacher, "first.weight"), dense)
    assert not torch.equal(tensor_attribute(compilation.ir, "first.weight"), dense)


@pytest.mark.parametrize("name", ["wanda", "obs"])
def test_a_method_that_looks_at_inputs_needs_some(name: str) -> None:
    compilation = begin(seeded(Perceptron), noise(2, 32), make_rules(method(name)))
    compilation.source.calibration_data = None
    with pytest.raises(InputError) as caught:
        run_until(compilation, "sparsify")
    assert caught.value.code == "no-calibration-data"
    assert f"sparsity method {name} looks at the inputs" in caught.value.message
    assert "calibration_data" in str(caught.value.hint)


def test_generated_noise_is_no_basis_and_that_is_told() -> None:
    compilation = begin(seeded(Perceptron), noise(2, 32), make_rules(method("obs")))
    compilation.source.synthetic = True
    run_until(compilation, "sparsify")
    [remark] = remarks_of(compilation, "sparsify", Kind.MISSED)
    assert remark.code == "synthetic-calibration"


@pytest.mark.parametrize(("name", "layer"), [("wanda", "second"), ("obs", "first")])
def test_an_input_that_is_not_finite_names_its_layer(name: str, layer: str) -> None:
    """The products of such inputs overflow a layer before their sums do."""
    compilation = begin(seeded(Perceptron), torch.ones(2, 32), make_rules(method(name)))
    run_until(compilation, "tap")
    compilation.source.calibration_data = lambda: [torch.full((2, 32), 3e38)]
    with pytest.raises(InputError) as caught:
        run_until(compilation, "sparsify")
    assert caught.value.code == "activation-not-finite"
    assert layer in caught.value.message


@pytest.mark.parametrize("name", ["wanda", "obs"])
def test_inputs_that_are_always_zero_are_survived(name: str) -> None:
    compilation = run_until(
        begin(seeded(Perceptron), torch.zeros(4, 32), make_rules(method(name))), "sparsify"
    )
    mask = mask_of(compilation, "first")
    weight = tensor_attribute(compilation.ir, "first.weight").detach()
    assert torch.equal(mask, magnitude_mask(weight, PATTERNS["2:4"])) or name == "obs"
    assert violations(weight * mask, PATTERNS["2:4"]) == 0
    assert outputs(compilation)[0].isfinite().all()
