"""What is held at a layer: each value once, views with what they look at, until its last reader."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from gpusq_compile import second_moments
from gpusq_compile.graph.liveness import live_bytes
from gpusq_compile.graph.query import op_of
from gpusq_compile.graph.walk import Walk
from gpusq_compile.plan import planned
from tests.compilations import begin, make_rules, remarks_of, run_until
from tests.models import Attention, Shape, TinyViT, images, labelled, noise, seeded

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
    assert live_bytes(graph, [up]) == 2 * 32 * FLOAT, "the input"
    assert live_bytes(graph, [down]) == 2 * (32 + 64) * FLOAT, "the input and what relu gave"
    assert live_bytes(graph, [up, down]) == 2 * (32 + 64) * FLOAT, "the most of them"
    assert live_bytes(graph, []) == 0


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
        assert inputs <= live_bytes(compilation.ir.graph, [node]) <= 1.5 * inputs


def method(name: str) -> dict[str, Any]:
    sparsity = {"pattern": "2:4", "method": name}
    return {"id": "all", "match": {"op": "linear"}, "sparsity": sparsity}


def test_of_many_samples_only_those_are_looked_at_whose_values_may_be_held(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def masks_after(data: Any) -> tuple[dict[str, torch.Tensor], list[str]]:
        model = seeded(TinyViT, Shape(depth=1))
        compilation = begin(model, images(2), make_rules(method("obs")), data=data)
        run_until(compilation, "sparsify")
        masks = {n: v for n, v in compilation.ir.named_buffers() if n.endswith("mask")}
        said = [r.reason for r in remarks_of(compilation, "sparsify") if r.code == "fewer-samples"]
        return masks, said

    data = labelled(4)
    [size] = {len(batch) for batch, _ in data}
    everything, said = masks_after(data)
    assert not said
    given = begin(seeded(TinyViT, Shape(depth=1)), images(2), make_rules(method("obs")), data=data)
    each = second_moments.bytes_of_a_sample(run_until(given, "mark"))
    cases = [
        (size, data[:1]),
        (2 * size + 3, [*data[:2], part(data[2], 3)]),
        (0, [part(data[0], 2)]),
    ]
    for samples, same_as in cases:
        monkeypatch.undo()
        expected, said = masks_after(same_as)
        assert not said
        assert any(not torch.equal(everything[name], expected[name]) for name in expected)
        monkeypatch.setattr(second_moments, "MOST_BYTES", int(each * (samples + 0.5)))
        found, said = masks_after(data)
        assert said == [
            f"sparsity method obs looked at {max(samples, 2)} samples of calibration_data() alone: "
            "the values of more would take over 0 MiB at one layer"
        ]
        assert all(torch.equal(found[name], expected[name]) for name in expected)


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
    run_until(compilation, "sparsify")
    said = [r.reason for r in remarks_of(compilation, "sparsify") if r.code == "fewer-samples"]
    assert len(said) == batches - 1, "of a single batch nothing is left out"
    assert all(f"looked at {len(data[0][0])} samples" in text for text in said)


def part(batch: Any, samples: int) -> Any:
    return tuple(value[:samples] for value in batch)


def test_a_sample_is_the_models_whatever_a_scope_makes_of_it() -> None:
    class Windows(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 32))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.inner(x.reshape(-1, 4, 32)).reshape(-1, 64, 32).mean(1)

    model = begin(seeded(Windows), noise(2, 64, 32), make_rules(), scope="inner")
    assert second_moments.bytes_of_a_sample(run_until(model, "mark")) == 64 * 64 * FLOAT
