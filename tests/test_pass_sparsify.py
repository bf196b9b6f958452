"""sparsify: a fixed mask stands between each marked weight and its operator."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gpusq_compile.compilation import Compilation
from gpusq_compile.graph.query import tensor_attribute
from gpusq_compile.remarks import Kind
from gpusq_compile.sparsity import PATTERNS, Mask, magnitude_mask, violations
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
from tests.models import Convolution, Perceptron, noise, seeded

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


def test_a_convolution_is_masked_along_its_input_channels() -> None:
    compilation = sparsified(seeded(Convolution, 8, 4, 3), noise(2, 8, 6, 6))
    mask = mask_of(compilation, "conv")
    assert mask.shape == (4, 8, 3, 3)
    assert violations(mask.float(), PATTERNS["2:4"]) == 0
    assert mask.sum() == mask.numel() // 2


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
