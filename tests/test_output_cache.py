"""A module is not run twice on one batch while it stays as it is, and the cache cannot lie."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from gpusq_compile import output_cache
from gpusq_compile.accuracy import measure
from gpusq_compile.output_cache import Cached
from tests.compilations import begin, make_rules, run_until
from tests.models import Shape, TinyViT, images, labelled, seeded


class Counted(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.runs = 0
        self.factor = 2.0

    def forward(self, value: torch.Tensor, *, shift: torch.Tensor) -> dict[str, Any]:
        self.runs += 1
        return {"out": value * self.factor + shift, "size": value.shape[0]}


def test_equal_inputs_are_answered_without_a_run() -> None:
    module = Counted()
    cached, value, shift = Cached(module), images(2), torch.ones(1)
    first = cached(value, shift=shift)
    again = cached(value.clone(), shift=shift.clone())
    assert module.runs == 1
    assert torch.equal(first["out"], again["out"])
    assert again["size"] == 2


def test_other_values_types_and_shapes_are_run() -> None:
    module = Counted()
    cached, value, shift = Cached(module), images(2), torch.ones(1)
    cached(value, shift=shift)
    for other in (value + 1e-3, value.double(), value[:1], value[:, :1]):
        expected = Counted()(other, shift=shift)["out"]
        assert torch.equal(cached(other, shift=shift)["out"], expected)
    assert module.runs == 5


def test_writing_into_what_goes_in_and_out_does_not_change_the_answer() -> None:
    module = Counted()
    cached, value, shift = Cached(module), images(2), torch.ones(1)
    before = value.clone()
    expected = module(value, shift=shift)["out"]
    for _ in range(2):
        cached(value, shift=shift)["out"].zero_()
        value.copy_(before)
    assert torch.equal(cached(value, shift=shift)["out"], expected)
    assert module.runs == 2


def test_what_is_too_large_is_run_again(monkeypatch: pytest.MonkeyPatch) -> None:
    module = Counted()
    cached, value, shift = Cached(module), images(2), torch.ones(1)
    size = 2 * value.nbytes + shift.nbytes
    monkeypatch.setattr(output_cache, "MOST_BYTES", size + value.nbytes)
    cached(value, shift=shift)
    for _ in range(2):
        cached(value[:1], shift=shift)
    assert module.runs == 3


def test_of_many_batches_the_first_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(output_cache, "MOST_BATCHES", 3)
    module = Counted()
    cached, shift = Cached(module), torch.ones(1)
    for _ in range(2):
        for seed in range(5):
            cached(images(1, seed=seed), shift=shift)
    assert module.runs == 5 + 2


def test_passes_and_measurements_share_runs_of_a_graph_that_stays(tmp_path: Path) -> None:
    data = labelled(2)
    compilation = begin(
        seeded(TinyViT, Shape(depth=1)),
        images(2),
        make_rules(),
        tmp_path,
        data=data,
        eval_data=data,
    )
    run_until(compilation, "finetune_sparse")
    runs = []
    compilation.ir.register_forward_pre_hook(lambda *_: runs.append(1))
    measured = compilation.accuracy["sparse"]
    measure(compilation, "sparse", compilation.cached_ir)
    assert not runs, "nothing changed since it was measured"
    assert compilation.accuracy["sparse"] == measured
    with torch.no_grad():
        next(iter(compilation.ir.parameters())).mul_(1.5)
    measure(compilation, "sparse", compilation.cached_ir)
    assert len(runs) == 2, "each of two batches again"
