"""Walk: every batch's values at each node, computed with the layers as they are by then."""

from __future__ import annotations

import copy
import weakref
from typing import Any, cast

import pytest
import torch
import torch.fx
from torch import Tensor, nn

from gpusq_compile.finetune.taps import Tap
from gpusq_compile.graph.edit import finish, insert_behind, insert_module_call, set_tensor
from gpusq_compile.graph.query import is_weighted, output_nodes
from gpusq_compile.graph.walk import Call, Walk
from gpusq_compile.sparsity import Mask
from tests.compilations import begin, make_rules, run_until
from tests.models import Shape, TinyViT, images, noise, seeded

CALLS: list[Call] = [((images(size, seed=size),), {}) for size in (3, 5)]


@pytest.fixture(scope="module")
def traced() -> torch.fx.GraphModule:
    return run_until(begin(seeded(TinyViT, Shape(depth=1)), images(2), make_rules()), "trace").ir


@pytest.fixture
def vit(traced: torch.fx.GraphModule) -> torch.fx.GraphModule:
    return copy.deepcopy(traced)


def linears(graph_module: torch.fx.GraphModule) -> list[torch.fx.Node]:
    return [node for node in graph_module.graph.nodes if is_weighted(node)]


def held(walk: Walk) -> set[str]:
    """The tensors that one batch holds, by node."""
    return {node.name for node, value in walk.runs[0].env.items() if torch.is_tensor(value)}


def finished(walk: Walk, graph_module: torch.fx.GraphModule) -> list[Tensor]:
    [result] = output_nodes(graph_module.graph)
    walk.run_past(result)
    return walk.values_of(result)


def test_each_batch_ends_with_the_outputs_of_the_graph(vit: torch.fx.GraphModule) -> None:
    walk = Walk(vit, CALLS)
    shapes = [[value.shape for value in walk.inputs_of(node)] for node in linears(vit)]
    assert [[shape[0] for shape in per_batch] for per_batch in shapes] == [[3, 5]] * 6
    for (args, _), result in zip(CALLS, finished(walk, vit), strict=True):
        assert torch.equal(result, vit(*args))


def test_a_value_is_dropped_after_its_last_use(vit: torch.fx.GraphModule) -> None:
    walk = Walk(vit, CALLS)
    adds = [node for node in vit.graph.nodes if node.target is torch.ops.aten.add.Tensor]
    for add in adds:
        walk.run_past(add)
        assert held(walk) == {add.name}
    finished(walk, vit)
    assert held(walk) == {output_nodes(vit.graph)[0].name}


def test_between_two_stops_one_batch_is_done_before_the_next_begins(
    vit: torch.fx.GraphModule,
) -> None:
    """All batches' intermediate values at once would be most of the memory."""
    seen: list[tuple[str, int]] = []

    def note(module: nn.Module, args: Any) -> None:
        assert isinstance(module, Tap)
        seen.append((module.name, args[0].shape[0]))

    for name, node in zip("ab", linears(vit), strict=False):
        tap = Tap(name, "role", 1.0)
        tap.register_forward_pre_hook(note)
        insert_behind(vit, f"taps.{name}", tap, node)
    finish(vit)
    finished(Walk(vit, CALLS), vit)
    assert seen == [("a", 3), ("b", 3), ("a", 5), ("b", 5)]


def test_a_layer_is_run_with_the_weight_it_has_by_then(vit: torch.fx.GraphModule) -> None:
    """Also where the parameter was not changed in place but replaced."""
    walk = Walk(vit, CALLS)
    for node in linears(vit):
        walk.run_to(node)
        weight = node.args[1]
        assert isinstance(weight, torch.fx.Node)
        path = str(weight.target)
        set_tensor(vit, path, 0.5 * vit.get_parameter(path).detach(), trainable=True)
    for (args, _), result in zip(CALLS, finished(walk, vit), strict=True):
        assert torch.equal(result, vit(*args))


def test_a_mask_inserted_at_the_layer_reached_is_applied(vit: torch.fx.GraphModule) -> None:
    walk = Walk(vit, CALLS)
    for index, node in enumerate(linears(vit)):
        walk.run_to(node)
        weight = node.args[1]
        assert isinstance(weight, torch.fx.Node)
        mask = Mask(noise(*vit.get_parameter(str(weight.target)).shape) > 0)
        masked = insert_module_call(vit, f"masks.m{index}", mask, weight, before=node)
        node.replace_input_with(weight, masked)
    found = finished(walk, vit)
    vit.recompile()
    for (args, _), result in zip(CALLS, found, strict=True):
        assert torch.equal(result, vit(*args))


def test_a_masked_weight_is_computed_where_it_is_read(vit: torch.fx.GraphModule) -> None:
    """Held by each batch meanwhile, it would take as many weights as there are batches."""
    for index, node in enumerate(linears(vit)):
        weight = node.args[1]
        assert isinstance(weight, torch.fx.Node)
        mask = Mask(noise(*vit.get_parameter(str(weight.target)).shape) > 0)
        masked = insert_module_call(vit, f"masks.m{index}", mask, weight, before=node)
        node.replace_input_with(weight, masked)
    finish(vit)
    walk = Walk(vit, CALLS)
    for node in linears(vit):
        walk.run_to(node)
        masked = cast(torch.fx.Node, node.args[1])
        assert masked.name not in held(walk)
        for value in walk.values_of(masked):
            assert torch.equal(value, vit.get_submodule(str(masked.target))(weight_of(vit, masked)))
    for (args, _), result in zip(CALLS, finished(walk, vit), strict=True):
        assert torch.equal(result, vit(*args))


def weight_of(graph_module: torch.fx.GraphModule, masked: torch.fx.Node) -> Tensor:
    [source] = masked.all_input_nodes
    return graph_module.get_parameter(str(source.target))


def test_inputs_are_let_go_when_they_are_read(vit: torch.fx.GraphModule) -> None:
    batch = images(3)
    known = weakref.ref(batch)
    walk = Walk(vit, [((batch,), {})])
    del batch
    first, second, *_, last = linears(vit)
    walk.run_to(second)
    assert known() is None
    walk.run_to(last)
    with pytest.raises(KeyError, match="is not held any more"):
        walk.values_of(first)


def test_it_goes_on_from_replaced_values(vit: torch.fx.GraphModule) -> None:
    walk = Walk(vit, CALLS)
    [*_, last] = linears(vit)
    values = walk.inputs_of(last)
    source = last.args[0]
    assert isinstance(source, torch.fx.Node)
    walk.replace_values(source, [torch.zeros_like(value) for value in values])
    bias = vit.get_parameter("logits.bias")
    for result in finished(walk, vit):
        torch.testing.assert_close(result, bias.expand_as(result))


@pytest.mark.parametrize("masked", [False, True])
def test_it_goes_on_from_a_replaced_weight_until_its_last_use(
    vit: torch.fx.GraphModule, masked: bool
) -> None:
    """Whether the layer reads the parameter itself or a node that was just inserted."""
    walk = Walk(vit, CALLS)
    [*_, last] = linears(vit)
    walk.run_to(last)
    source = last.args[1]
    assert isinstance(source, torch.fx.Node)
    weight = torch.zeros_like(vit.get_parameter(str(source.target)))
    if masked:
        mask = Mask(torch.ones_like(weight, dtype=torch.bool))
        after = insert_module_call(vit, "masks.last", mask, source, before=last)
        last.replace_input_with(source, after)
        source = after
    walk.replace_values(source, [weight] * 2)
    bias = vit.get_parameter("logits.bias")
    for result in finished(walk, vit):
        torch.testing.assert_close(result, bias.expand_as(result))
    assert held(walk) == {output_nodes(vit.graph)[0].name}


def test_inputs_of_a_constant_argument_are_the_constant(vit: torch.fx.GraphModule) -> None:
    node = linears(vit)[0]
    first, second = Walk(vit, CALLS).inputs_of(node, 1)
    assert first is second is vit.get_parameter("stem.weight")


def test_it_does_not_go_back(vit: torch.fx.GraphModule) -> None:
    walk = Walk(vit, CALLS)
    first, second, *_ = linears(vit)
    walk.run_to(second)
    assert walk.has_passed(first)
    assert not walk.has_passed(second)
    walk.run_to(second)  # Stays where it is.
    for move in (walk.run_to, walk.run_past):
        with pytest.raises(ValueError, match="has been passed"):
            move(first)


def test_it_may_begin_before_the_first_node(vit: torch.fx.GraphModule) -> None:
    walk = Walk(vit, CALLS)
    walk.run_to(next(iter(vit.graph.nodes)))
    assert held(walk) == set()
    assert torch.equal(finished(walk, vit)[0], vit(*CALLS[0][0]))


class Difference(nn.Module):
    def forward(self, plus: Tensor, minus: Tensor) -> Tensor:
        return plus - minus


def test_keywords_may_come_in_any_order() -> None:
    plus, minus = noise(4, 8), noise(4, 8, seed=1)
    exported = torch.export.export(Difference(), (), {"plus": plus, "minus": minus}).module()
    graph_module = torch.fx.GraphModule(exported, exported.graph)
    for keywords in ({"plus": plus, "minus": minus}, {"minus": minus, "plus": plus}):
        [result] = finished(Walk(graph_module, [((), keywords)]), graph_module)
        assert torch.equal(result, plus - minus)


def test_batches_that_wait_meet_the_layers_as_those_before_left_them(
    vit: torch.fx.GraphModule,
) -> None:
    walk = Walk(vit, CALLS, started=0)
    first, second, *_, last = linears(vit)
    walk.run_to(first)
    assert walk.values_of(first) == []
    walk.start(1)
    assert len(walk.inputs_of(first)) == 1
    weight = first.args[1]
    assert isinstance(weight, torch.fx.Node)
    with torch.no_grad():
        vit.get_parameter(str(weight.target)).mul_(0.5)
    assert len(walk.inputs_of(second)) == 1
    walk.start(len(CALLS) + 1)
    assert len(walk.inputs_of(last)) == len(CALLS)
    for (args, _), result in zip(CALLS, finished(walk, vit), strict=True):
        assert torch.equal(result, vit(*args))
