"""Each law of the IR is checked, and a broken one names the pass and the node."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import nn

from gpusq_compile.compilation import Compilation
from gpusq_compile.errors import InternalError
from gpusq_compile.graph.edit import insert_module_call
from gpusq_compile.plan import update_plan
from gpusq_compile.sparsity import Mask
from gpusq_compile.verifier import LAWS, verify_ir
from tests.compilations import begin, fork, make_rules, node_and_plan, plan_of, run_until
from tests.models import Perceptron, noise, seeded


@pytest.fixture(scope="module")
def quantized() -> Compilation:
    """A graph with masks and fake-quantizers in it."""
    return run_until(begin(seeded(Perceptron), noise(4, 32), make_rules()), "quantize")


def lose_a_shape(compilation: Compilation) -> None:
    node, _ = node_and_plan(compilation, "first")
    del node.meta["val"]


def call_a_stranger(compilation: Compilation) -> None:
    node, _ = node_and_plan(compilation, "first")
    insert_module_call(compilation.ir, "stranger", nn.Identity(), node)


def plan_for_another_weight(compilation: Compilation) -> None:
    node, plan = node_and_plan(compilation, "first")
    update_plan(node, replace(plan, weight="second.weight"))


def name_two_layers_alike(compilation: Compilation) -> None:
    node, plan = node_and_plan(compilation, "second")
    update_plan(node, replace(plan, name="first"))


def mask_after_quantizing(compilation: Compilation) -> None:
    node, _ = node_and_plan(compilation, "first")
    quantized_weight = node.args[1]
    assert isinstance(quantized_weight, torch.fx.Node)
    shape = plan_of(compilation, "first").shape
    late = insert_module_call(compilation.ir, "late", Mask(torch.ones(shape)), quantized_weight)
    node.replace_input_with(quantized_weight, late)


def share_a_mask(compilation: Compilation) -> None:
    node, _ = node_and_plan(compilation, "second")
    other, _ = node_and_plan(compilation, "first")
    weight, activation = node.args[1], other.args[0]
    assert isinstance(weight, torch.fx.Node)
    assert isinstance(activation, torch.fx.Node)
    weight.target = activation.target


CASES: dict[str, tuple[Callable[[Compilation], None], str]] = {
    "every_insertion_has_its_own_module": (share_a_mask, "gpusq.activation.first is called twice"),
    "every_value_has_a_shape": (lose_a_shape, "node linear carries no value metadata"),
    "only_known_modules_are_called": (call_a_stranger, "calls Identity, which is neither mask"),
    "plans_name_their_weight": (
        plan_for_another_weight,
        "layer first reads first.weight, but plans for second.weight",
    ),
    "layer_names_are_unique": (name_two_layers_alike, "two layers are named first"),
    "quantized_weights_are_masked_first": (
        mask_after_quantizing,
        "node late masks a value that is already quantized",
    ),
}


def test_a_graph_as_the_passes_leave_it_keeps_every_law(quantized: Compilation) -> None:
    verify_ir(quantized.ir, "quantize")


@pytest.mark.parametrize("law", CASES)
def test_a_broken_law_names_the_pass_and_the_node(quantized: Compilation, law: str) -> None:
    damage, text = CASES[law]
    damaged = fork(quantized)
    damage(damaged)
    with pytest.raises(InternalError) as caught:
        verify_ir(damaged.ir, "a pass")
    assert caught.value.code == "ir-law"
    assert "after pass 'a pass'" in caught.value.message
    assert text in caught.value.message
    assert caught.value.exit_code == 3


def test_every_law_has_a_case_that_breaks_it() -> None:
    assert {law.__name__ for law in LAWS} == set(CASES)


def test_several_broken_laws_are_counted(quantized: Compilation) -> None:
    damaged = fork(quantized)
    lose_a_shape(damaged)
    name_two_layers_alike(damaged)
    with pytest.raises(InternalError, match=r"\(and 1 more\)"):
        verify_ir(damaged.ir, "a pass")


def test_a_malformed_graph_is_an_error_of_the_pass(quantized: Compilation) -> None:
    damaged = fork(quantized)
    nodes = list(damaged.ir.graph.nodes)
    nodes[-1].prepend(nodes[0])  # The input now comes after what reads it.
    with pytest.raises(InternalError) as caught:
        verify_ir(damaged.ir, "a pass")
    assert caught.value.code == "ir-lint"
    assert "after pass 'a pass'" in caught.value.message
