"""What is held at a layer: each value once, views with what they look at, until its last reader."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from gpusq_compile import second_moments
from gpusq_compile.compilation import Compilation
from gpusq_compile.graph.liveness import live_bytes
from gpusq_compile.graph.query import op_of
from gpusq_compile.graph.walk import Walk
from gpusq_compile.plan import planned
from gpusq_compile.second_moments import MOST_BYTES, even_ends, samples_with_room
from tests.compilations import begin, make_rules, node_and_plan, remarks_of, run_until
from tests.models import Attention, Shape, TinyViT, images, labelled, noise, seeded
from tests.moments import inverse_factor

FLOAT = 4


class Residual(nn.Module):
    """Holds its input over two linears, and a view of the first one's output."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(32, 64), nn.Linear(64, 32)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = F.relu(self.up(x))
        return x + self.down(hidden.reshape(-1, 2, 32).transpose(1, 2).reshape(-1, 64))


def test_values_count_until_their_last_reader_and_views_do_not_count() -> None:
    graph = run_until(begin(seeded(Residual), noise(2, 32), make_rules()), "mark").ir.graph
    up, down = [node for node in graph.nodes if op_of(node) == "linear"]
    held = live_bytes(graph)
    assert held[up] == 2 * 32 * FLOAT, "the input"
    assert held[down] == 2 * (32 + 64) * FLOAT, "the input and what relu gave"
    assert list(held) == list(graph.nodes)


@pytest.mark.parametrize("attention", ["fused", "separate", "softmax"])
def test_it_is_what_a_walk_holds(attention: Attention) -> None:
    model = seeded(TinyViT, Shape(depth=2, attention=attention))
    compilation = run_until(begin(model, images(2), make_rules()), "mark")
    walk = Walk(compilation.ir, [compilation.probe])
    for node, _ in planned(compilation.ir.graph):
        walk.run_to(node)
        held = [value for value in walk.runs[0].env.values() if isinstance(value, torch.Tensor)]
        storages = {value.untyped_storage().data_ptr(): value.untyped_storage() for value in held}
        # Its last argument is still needed, and so is what a view of it looks at.
        inputs = sum(storage.nbytes() for storage in storages.values())
        assert inputs <= live_bytes(compilation.ir.graph)[node] <= 1.5 * inputs


def method(name: str) -> dict[str, Any]:
    sparsity = {"pattern": "2:4", "method": name}
    return {"id": "all", "match": {"op": "linear"}, "sparsity": sparsity}


def fewer_samples(compilation: Compilation) -> list[str]:
    return [r.reason for r in remarks_of(compilation, "sparsify") if r.code == "fewer-samples"]


def test_where_not_all_values_may_be_held_the_later_samples_wait(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Those that wait are looked at by the layers from which on there is room, in whose inputs they
    meet the masks of the layers before."""

    def factors_after(samples: float) -> tuple[dict[str, torch.Tensor], list[int], Compilation]:
        compilation = begin(
            seeded(Narrowing), noise(2, 64), make_rules(method("obs")), data=noise(12, 64).split(6)
        )
        run_until(compilation, "tap")
        each = max(live_bytes(compilation.ir.graph).values()) / compilation.probe_samples
        monkeypatch.setattr(second_moments, "MOST_BYTES", int(each * samples))
        found, looked = {}, []
        own = second_moments.LayerInputs.moments

        def moments(self: Any, node: torch.fx.Node, layer: str) -> second_moments.SecondMoments:
            moments = own(self, node, layer)
            found[layer] = moments.inverse_factor(0.01).triu()
            looked.append(self.samples[len(self.walk.runs) - 1])
            return moments

        monkeypatch.setattr(second_moments.LayerInputs, "moments", moments)
        run_until(compilation, "sparsify")
        monkeypatch.undo()
        return found, looked, compilation

    everything, looked, all_at_once = factors_after(12.5)
    assert (looked, fewer_samples(all_at_once)) == ([12, 12, 12, 12], [])
    found, looked, compilation = factors_after(4.5)
    assert looked == [3, 3, 12, 12]
    assert fewer_samples(compilation) == [
        "sparsity method obs looked at 3 of 12 samples at up and 1 more: the values of all would "
        "take over 0 MiB there or behind"
    ]
    same = {name: torch.allclose(found[name], everything[name]) for name in found}
    assert same == {"up": False, "down": False, "first": False, "second": False}
    # By the layers before as they were left, whichever samples these were left by.
    for layer in ("first", "second"):
        [expected] = inputs_of(compilation, layer, noise(12, 64))
        square = second_moments.second_moments([expected])
        factor = inverse_factor(square, 0.01)
        torch.testing.assert_close(found[layer], factor, rtol=1e-3, atol=1e-4)
        assert not torch.allclose(everything[layer], factor, rtol=1e-3, atol=1e-4)


class Narrowing(nn.Module):
    """Holds many values at its first layers, and few at its last."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(64, 256), nn.Linear(256, 16)
        self.first, self.second = nn.Linear(16, 16), nn.Linear(16, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.relu(self.down(F.relu(self.up(x))))
        return self.second(F.relu(self.first(x)))


def inputs_of(compilation: Compilation, layer: str, data: torch.Tensor) -> list[Any]:
    node, _ = node_and_plan(compilation, layer)
    return Walk(compilation.ir, [((data,), {})]).inputs_of(node)


def test_of_many_rows_some_samples_are_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(second_moments, "MOST_BYTES", 1)
    monkeypatch.setattr(second_moments, "MOST_ROWS", 2)
    model = seeded(TinyViT, Shape(depth=1))
    compilation = begin(model, images(2), make_rules(method("obs")), data=labelled(2))
    assert not fewer_samples(run_until(compilation, "sparsify"))


@pytest.mark.parametrize("most", [2, 3, 5, 100])
@pytest.mark.parametrize("size", [1, 2, 3, 4, 7, 32])
def test_batches_are_cut_into_even_parts(size: int, most: int) -> None:
    parts = [end - start for start, end in pairwise(even_ends(size, most))]
    assert sum(parts) == size
    assert max(parts) - min(parts) <= 1
    assert min(parts) >= min(size, 2)
    assert max(parts) <= max(most, 3)


@pytest.mark.parametrize("batches", [1, 2])
def test_a_batch_that_may_not_be_cut_is_looked_at_whole(
    batches: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = labelled(batches)
    compilation = begin(
        seeded(TinyViT, Shape(depth=1)), images(2), make_rules(method("obs")), data=data
    )
    compilation.source.dynamic_shapes = ({0: torch.export.Dim("batch")},)
    monkeypatch.setattr(second_moments, "MOST_BYTES", 1)
    said = fewer_samples(run_until(compilation, "sparsify"))
    assert len(said) == batches - 1, "of a single batch nothing waits"
    size = len(data[0][0])
    assert all(f"looked at {size} of {2 * size} samples" in text for text in said)


def test_a_sample_is_the_models_whatever_a_scope_makes_of_it() -> None:
    class Windows(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 32))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.inner(x.reshape(-1, 4, 32)).reshape(-1, 64, 32).mean(1)

    model = begin(seeded(Windows), noise(2, 64, 32), make_rules(), scope="inner")
    run_until(model, "mark")
    assert set(samples_with_room(model).values()) == {MOST_BYTES // (64 * 64 * FLOAT)}
