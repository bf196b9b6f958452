"""permute: more of the weight survives its mask, and the function is the one it was."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gpusq_compile.driver import run_passes
from gpusq_compile.passes import COMPRESSION
from gpusq_compile.remarks import Kind
from gpusq_compile.sparsity import PATTERNS
from tests.compilations import SPARSE, begin, fork, make_rules, outputs, remarks_of, run_until
from tests.models import (
    Attention,
    Mlp,
    Perceptron,
    Shape,
    TinyPyramid,
    TinyViT,
    images,
    noise,
    seeded,
)
from tests.permuting import PERMUTED, energy_kept, layers, permuted, permuted_in

# --- real networks -------------------------------------------------------------------------------


@pytest.mark.parametrize("attention", ["fused", "separate", "multihead", "softmax", "qk_norm"])
def test_v_to_proj_is_permuted_within_each_head(attention: Attention) -> None:
    model = seeded(TinyViT, Shape(attention=attention, depth=1))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    compilation = permuted(model, images(2))
    assert 0 < (compilation.records[-1].change or 0) < 1e-5
    names = {
        "fused": ("mix.back", "mix.wide", 64),
        "multihead": ("mix.inner.out_proj", "mix.inner.in_proj", 64),
    }
    back, values, offset = names.get(attention, ("mix.back", "mix.val", 0))
    assert f"layers.0.{back}" in layers(compilation, Kind.PASSED)
    after = compilation.ir.state_dict()
    old, new = before[f"layers.0.{back}.weight"], after[f"layers.0.{back}.weight"]
    assert energy_kept(new) > energy_kept(old) * 1.001
    order = [int((column == old.T).all(dim=1).nonzero()) for column in new.T]
    assert sorted(order[:16]) == list(range(16))
    assert sorted(order[16:]) == list(range(16, 32))
    assert order != list(range(32))
    joint = "_weight" if attention == "multihead" else ".weight"
    rows, moved = before[f"layers.0.{values}{joint}"], after[f"layers.0.{values}{joint}"]
    assert torch.equal(moved[offset:], rows[offset:][order])
    assert torch.equal(moved[:offset], rows[:offset])
    bias = joint.replace("weight", "bias")
    moved_bias, old_bias = after[f"layers.0.{values}{bias}"], before[f"layers.0.{values}{bias}"]
    assert torch.equal(moved_bias[offset:], old_bias[offset:][order])


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("mlp", ["gelu", "swiglu", "fused_swiglu"])
def test_the_hidden_axis_of_an_mlp_is_permuted(mlp: Mlp, pattern: str) -> None:
    model = seeded(TinyViT, Shape(mlp=mlp, depth=1))
    old = model.layers[0].feed.down.weight.detach().clone()
    compilation = permuted(model, images(2), permuted_in(pattern))
    assert 0 < (compilation.records[-1].change or 0) < 1e-5
    assert layers(compilation, Kind.PASSED)["layers.0.feed.down"].startswith(f"{pattern} keeps")
    new = compilation.ir.state_dict()["layers.0.feed.down.weight"]
    assert energy_kept(new, PATTERNS[pattern]) > energy_kept(old, PATTERNS[pattern]) * 1.005


@pytest.mark.parametrize("pattern", ["pair4:8", "portable"])
def test_pairs_stay_within_their_head_and_the_function_stays(pattern: str) -> None:
    model = seeded(TinyViT, Shape(depth=1))
    old = model.layers[0].mix.back.weight.detach().clone()
    compilation = permuted(model, images(2), permuted_in(pattern))
    assert 0 < (compilation.records[-1].change or 0) < 1e-5
    new = compilation.ir.state_dict()["layers.0.mix.back.weight"]
    order = [int((column == old.T).all(dim=1).nonzero()) for column in new.T]
    assert sorted(order[:16]) == list(range(16))
    assert energy_kept(new, PATTERNS[pattern]) > energy_kept(old, PATTERNS[pattern]) * 1.005


def test_each_layer_gets_an_order_for_its_own_pattern() -> None:
    model = seeded(TinyViT, Shape(depth=1))
    rules = [
        {**permuted_in("pair4:8"), "id": "a", "match": {"name": "**.back"}},
        {**permuted_in("portable"), "id": "b", "match": {"name": "**.down"}},
        {**permuted_in("2:4"), "id": "c", "match": {"name": "**.up"}},
    ]
    compilation = permuted(model, images(2), *rules)
    assert (compilation.records[-1].change or 0) < 1e-5
    done = {layer: reason.split()[0] for layer, reason in layers(compilation, Kind.PASSED).items()}
    assert done == {"layers.0.mix.back": "pair4:8", "layers.0.feed.down": "portable"}


def test_windows_and_several_stages_are_followed() -> None:
    compilation = permuted(seeded(TinyPyramid, stages=2), images(2, size=(2, 32, 32)))
    done = layers(compilation, Kind.PASSED)
    assert {name for name in done if name and name.endswith(("mix.back", "feed.down"))} == set(done)
    assert len(done) == 4
    assert (compilation.records[-1].change or 0) < 1e-5


def test_every_other_layer_is_told_why_not_and_names_and_shapes_stay() -> None:
    model = seeded(TinyViT, Shape(depth=1))
    shapes = {name: value.shape for name, value in model.state_dict().items()}
    compilation = permuted(model, images(2))
    record = compilation.records[-1]
    assert (record.matched, record.changed, record.skipped) == (6, 2, 4)
    fixed = layers(compilation, Kind.ANALYSIS)
    assert fixed.keys() == {"stem", "layers.0.mix.wide", "layers.0.feed.up", "logits"}
    assert fixed["stem"].endswith("it reads the model's input")
    assert fixed["layers.0.feed.up"].endswith(
        "reads the output of layer_norm, whose channels others share"
    )
    assert fixed["logits"].endswith("its input goes through mean, which is not followed")
    assert layers(compilation, Kind.MISSED) == {}
    found = dict(compilation.ir.named_parameters())
    assert {name: found[name].shape for name in shapes if name != "stem.weight"} == {
        name: shape for name, shape in shapes.items() if name != "stem.weight"
    }


@pytest.mark.parametrize("pattern", PATTERNS)
def test_the_mask_that_comes_after_keeps_what_the_remark_says(pattern: str) -> None:
    compilation = permuted(seeded(TinyViT, Shape(depth=1)), images(2), permuted_in(pattern))
    said = layers(compilation, Kind.PASSED)["layers.0.feed.down"]
    run_until(compilation, "sparsify")
    [kept] = [
        remark.reason
        for remark in remarks_of(compilation, "sparsify")
        if remark.layer == "layers.0.feed.down"
    ]
    share = float(said.split("%")[1].split()[-1])
    assert float(kept.split("%")[0].split()[-1]) == pytest.approx(share, abs=0.06)


def test_the_seed_decides_and_rules_that_do_not_ask_change_nothing() -> None:
    def weights(rule: dict[str, Any], seed: int) -> Tensor:
        compilation = begin(seeded(Perceptron), noise(4, 32), make_rules(rule), seed=seed)
        run_until(compilation, "permute")
        weight: Tensor = compilation.ir.state_dict()["second.weight"]
        return weight

    plain = {**PERMUTED, "sparsity": SPARSE}
    assert torch.equal(weights(plain, 0), seeded(Perceptron).second.weight)
    assert torch.equal(weights(PERMUTED, 0), weights(PERMUTED, 0))
    assert not torch.equal(weights(PERMUTED, 0), weights(PERMUTED, 1))


def test_a_mask_chosen_by_inputs_gets_an_order_for_those_inputs() -> None:
    model = seeded(Perceptron)
    with torch.no_grad():
        # Half of the hidden channels are loud, next to each other, with weights like the others'.
        model.first.weight[:32] *= 20
    rule = {**PERMUTED, "sparsity": {**PERMUTED["sparsity"], "method": "wanda"}}
    compilation = permuted(model, noise(64, 32), rule)
    reason = layers(compilation, Kind.PASSED)["second"]
    assert "of the energy, weighed by its inputs" in reason
    before, after = (float(part.split()[-1]) for part in reason.split("%")[:2])
    assert after > before + 10
    norms = compilation.ir.state_dict()["first.weight"].norm(dim=1)
    loud = (norms > norms.mean()).reshape(-1, 4).sum(dim=1)
    assert loud.tolist() == [2] * 16


@pytest.mark.parametrize(("look", "read"), [(1, 1), (10**9, 4)])
def test_of_a_large_model_fewer_batches_are_looked_at(
    look: int, read: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gpusq_compile.passes.permute.LOOK", look)
    data = [noise(4, 32, seed=seed) for seed in range(4)]
    seen = []

    class Data:
        def __iter__(self) -> Iterator[Tensor]:
            for batch in data:
                seen.append(batch)
                yield batch

    wanda = {**PERMUTED, "sparsity": {**SPARSE, "method": "wanda", "permute": True}}
    rules = make_rules(wanda, calibration={"batches": 4})
    compilation = begin(seeded(Perceptron), data[0], rules, data=Data())
    run_until(compilation, "split_attention")
    seen.clear()
    run_until(compilation, "permute")
    assert len(seen) == read
    assert layers(compilation, Kind.PASSED)


def test_bias_parts_that_the_graph_joins_move_with_the_rows() -> None:
    class Joined(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(noise(64, 32))
            self.low = nn.Parameter(noise(24, seed=1))
            self.high = nn.Parameter(noise(40, seed=2))
            self.down = nn.Linear(64, 32)

        def forward(self, x: Tensor) -> Tensor:
            bias = torch.cat([self.low, self.high])
            return self.down(F.relu(F.linear(x, self.weight, bias)))

    model = seeded(Joined)
    low = model.low.detach().clone()
    compilation = permuted(model, noise(4, 32))
    assert "down" in layers(compilation, Kind.PASSED)
    assert 0 < (compilation.records[-1].change or 0) < 1e-5
    assert not torch.equal(compilation.ir.state_dict()["low"], low)


def test_permuting_again_changes_nothing_but_the_order() -> None:
    compilation = permuted(seeded(TinyViT, Shape(depth=1)), images(2))
    again = fork(compilation)
    run_passes(again, [COMPRESSION["permute"]])
    torch.testing.assert_close(outputs(again), outputs(compilation), rtol=1e-4, atol=1e-5)
    weight = "layers.0.feed.down.weight"
    assert energy_kept(again.ir.state_dict()[weight]) >= energy_kept(
        compilation.ir.state_dict()[weight]
    )
