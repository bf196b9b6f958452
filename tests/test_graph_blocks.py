"""Blocks: the graph is cut where one tensor carries all, found from the dataflow alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
import torch.fx
from torch import Tensor, nn

from gpusq_compile.graph.blocks import (
    Block,
    activations,
    block_module,
    cut_points,
    find_blocks,
    owned_parameters,
)
from gpusq_compile.graph.query import output_nodes
from gpusq_compile.graph.walk import Walk
from gpusq_compile.plan import planned
from tests.compilations import EVERYTHING, begin, make_rules, run_until
from tests.models import (
    Detector,
    FusedAttention,
    GeluMlp,
    Perceptron,
    Shape,
    TinyPyramid,
    TinyViT,
    images,
    noise,
    seeded,
)


def compiled(model: nn.Module, inputs: Any, **options: Any) -> torch.fx.GraphModule:
    """The graph with masks, fake-quantizers and taps in it."""
    taps = {"id": "t", "match": {"role": "stage_end"}, "distill": {"loss": "mse"}, "optional": True}
    rules = make_rules(EVERYTHING, taps)
    return run_until(begin(model, inputs, rules, **options), "quantize").ir


def layers_by_block(graph_module: torch.fx.GraphModule) -> list[list[str]]:
    names = {node: plan.name for node, plan in planned(graph_module.graph)}
    return [
        [names[node] for node in block.nodes if node in names]
        for block in find_blocks(graph_module)
    ]


def run_blocks(graph_module: torch.fx.GraphModule, args: Sequence[Any]) -> list[Tensor]:
    """The graph's outputs, computed block by block; what no block computes comes from a walk."""
    walk = Walk(graph_module, [(tuple(args), {})])
    known: dict[torch.fx.Node, Any] = {}
    for block in find_blocks(graph_module):
        last = max(block.inputs)
        if not walk.has_passed(last):
            walk.run_past(last)
        inputs = [known.get(node, walk.values_of(node)[0]) for node in block.inputs]
        known.update(zip(block.targets, block_module(graph_module, block)(*inputs), strict=True))
    return [known[node] for node in output_nodes(graph_module.graph) if node in known]


MODELS: dict[str, tuple[Any, tuple[int, int, int]]] = {
    "fused": (lambda: TinyViT(), (2, 8, 8)),
    "softmax": (lambda: TinyViT(Shape(attention="softmax", mlp="swiglu", pool="token")), (2, 8, 8)),
    "multihead": (lambda: TinyViT(Shape(attention="multihead", mlp="fused_swiglu")), (2, 8, 8)),
    "pyramid": (lambda: TinyPyramid(stages=2), (2, 32, 32)),
}


@pytest.fixture(scope="module", params=MODELS)
def case(request: pytest.FixtureRequest) -> tuple[torch.fx.GraphModule, Tensor]:
    build, size = MODELS[request.param]
    return compiled(seeded(build), images(2, size=size)), images(3, size=size)


def test_one_block_after_the_other_computes_the_graph(
    case: tuple[torch.fx.GraphModule, Tensor],
) -> None:
    graph_module, inputs = case
    with torch.no_grad():
        [found] = run_blocks(graph_module, (inputs,))
        assert torch.equal(found, graph_module(inputs))


def test_every_layer_is_in_one_block_and_every_parameter_belongs_to_one(
    case: tuple[torch.fx.GraphModule, Tensor],
) -> None:
    graph_module, _ = case
    blocks = find_blocks(graph_module)
    names = [name for block in layers_by_block(graph_module) for name in block]
    assert names == [plan.name for _, plan in planned(graph_module.graph)]
    owned = [name for block in blocks for name in owned_parameters(graph_module, block)]
    assert sorted(owned) == sorted(name for name, _ in graph_module.named_parameters())


def test_attention_and_mlp_are_blocks_of_their_own() -> None:
    assert layers_by_block(compiled(seeded(TinyViT, Shape(depth=2)), images(2))) == [
        ["stem"],
        ["layers.0.mix.wide", "layers.0.mix.back"],
        ["layers.0.feed.up", "layers.0.feed.down"],
        ["layers.1.mix.wide", "layers.1.mix.back"],
        ["layers.1.feed.up", "layers.1.feed.down"],
        ["logits"],
    ]


def test_a_patch_merging_is_a_block_of_its_own() -> None:
    found = layers_by_block(compiled(seeded(TinyPyramid, stages=2), images(2, size=(2, 32, 32))))
    assert [block for block in found if "stages.1.0.shrink" in block] == [["stages.1.0.shrink"]]


def test_a_graph_without_a_residual_stream_is_one_block() -> None:
    graph_module = compiled(seeded(Perceptron), noise(2, 32))
    assert cut_points(graph_module) == []
    [block] = find_blocks(graph_module)
    assert [node.op for node in block.inputs] == ["placeholder"]
    assert layers_by_block(graph_module) == [["first", "second"]]


def test_it_cuts_only_where_it_may() -> None:
    graph_module = compiled(seeded(TinyViT, Shape(depth=1)), images(2))
    _, first, last = cut_points(graph_module)
    assert cut_points(graph_module, lambda node: node is not first)[1:] == [last]
    blocks = find_blocks(graph_module, lambda node: node is last)
    assert [block.targets for block in blocks] == [(last,), tuple(output_nodes(graph_module.graph))]


class Parallel(nn.Module):
    """Attention and MLP read one normalized tensor, so nothing can be cut between them."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(32)
        self.mix, self.feed = FusedAttention(32, 2), GeluMlp(32)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        x = x + self.mix(y)
        return x + self.feed(y)


def test_it_does_not_cut_where_a_second_activation_is_read_later() -> None:
    model = nn.Sequential(nn.Linear(32, 32), seeded(Parallel), seeded(Parallel)).eval()
    found = layers_by_block(compiled(model, noise(2, 4, 32)))
    assert found == [
        ["0"],
        ["1.mix.wide", "1.mix.back", "1.feed.up", "1.feed.down"],
        ["2.mix.wide", "2.mix.back", "2.feed.up", "2.feed.down"],
    ]


class Backbone(nn.Module):
    """As detectors use it: returns the normalized feature map of every level."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(32, 32)
        self.levels = nn.ModuleList(GeluMlp(32) for _ in range(3))
        self.norms = nn.ModuleList(nn.LayerNorm(32) for _ in range(3))

    def forward(self, x: Tensor) -> list[Tensor]:
        x = self.stem(x)
        maps = []
        for level, norm in zip(self.levels, self.norms, strict=True):
            x = x + level(x)
            maps.append(norm(x))
        return maps


def test_a_branch_that_leaves_the_stream_prevents_no_cut() -> None:
    graph_module = compiled(seeded(Backbone), noise(2, 4, 32))
    assert layers_by_block(graph_module) == [
        ["stem"],
        *[[f"levels.{i}.up", f"levels.{i}.down"] for i in range(3)],
        [],
    ]
    for index, block in enumerate(find_blocks(graph_module)[1:4]):
        owned = owned_parameters(graph_module, block)
        assert owned
        assert all(f"levels.{index}" in n or f"levels_{index}" in n for n in owned)


class Masked(nn.Module):
    """Every block weighs its tokens with a second input, prepared in the first block."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(32, 32)
        self.parts = nn.ModuleList(GeluMlp(32) for _ in range(2))

    def forward(self, x: Tensor, weights: Tensor) -> Tensor:
        x = self.stem(x)
        kept = weights.sigmoid().unsqueeze(-1)
        for part in self.parts:
            x = x + kept * part(x)
        return x


def test_what_depends_on_inputs_alone_prevents_no_cut_and_is_an_input_of_each_block() -> None:
    args = (noise(2, 4, 32), noise(2, 4, seed=1))
    graph_module = compiled(seeded(Masked), args)
    blocks = find_blocks(graph_module)
    assert [len(block) for block in layers_by_block(graph_module)] == [1, 2, 2]
    assert [len(block.inputs) for block in blocks] == [1, 2, 2]
    with torch.no_grad():
        assert torch.equal(run_blocks(graph_module, args)[0], graph_module(*args))


class Tied(nn.Module):
    """Two residual units with one module."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.unit = nn.Linear(32, 32), GeluMlp(32)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = x + self.unit(x)
        return x + self.unit(x)


def test_a_parameter_that_two_blocks_read_belongs_to_neither() -> None:
    graph_module = run_until(begin(seeded(Tied), noise(2, 4, 32), make_rules()), "mark").ir
    owned = [set(owned_parameters(graph_module, block)) for block in find_blocks(graph_module)]
    assert owned == [{"stem.weight", "stem.bias"}, set(), set()]


def test_a_block_alone_shares_the_parameters_of_the_graph() -> None:
    graph_module = compiled(seeded(TinyViT, Shape(depth=1)), images(2))
    whole = dict(graph_module.named_parameters())
    for block in find_blocks(graph_module):
        part = dict(block_module(graph_module, block).named_parameters())
        assert part
        assert all(value is whole[name] for name, value in part.items())


def test_a_batch_size_is_no_activation() -> None:
    graph_module = compiled(seeded(TinyViT, Shape(pool="token")), images(2))
    active = activations(graph_module)
    sizes = [node for node in graph_module.graph.nodes if "sym_size" in str(node.target)]
    assert sizes
    assert active.isdisjoint(sizes)
    tokens = [node for node in graph_module.graph.nodes if "expand" in str(node.target)]
    assert tokens
    assert active.isdisjoint(tokens)


def test_a_scoped_backbone_ends_in_its_feature_map() -> None:
    graph_module = compiled(seeded(Detector), images(2), scope="backbone")
    blocks: list[Block] = find_blocks(graph_module)
    assert len(blocks) == 4
    assert blocks[-1].targets == tuple(output_nodes(graph_module.graph))
