"""Decisions: in the fine-tune the student computes with its teacher's, elsewhere with its own."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gpusq_compile.compilation import Compilation
from gpusq_compile.data import Batch
from gpusq_compile.errors import InputError
from gpusq_compile.finetune.decisions import (
    decisions_of,
    find_decisions,
    following,
)
from gpusq_compile.finetune.distill import distillation_loss
from gpusq_compile.finetune.taps import listen
from gpusq_compile.finetune.teacher import frozen_copy
from gpusq_compile.remarks import Kind
from tests.compilations import LINEARS, TAPS, begin, make_rules, remarks_of, run_until
from tests.models import IMAGE, images, seeded

BATCHES = [(images(8, seed=seed), torch.arange(8) % 4) for seed in (1, 2)]


class Gate(nn.Module):
    """Of each sample's features those stay whose score is above zero."""

    def forward(self, x: Tensor) -> Tensor:
        return x * (x.sin() > 0).to(x.dtype)


class Gated(nn.Module):
    """Two linears with a hard gate, and a leaky activation written as a comparison."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(IMAGE[0] * IMAGE[1] * IMAGE[2], 64)
        self.gate = Gate()
        self.second = nn.Linear(64, 64)
        self.head = nn.Linear(64, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.gate(self.first(x.flatten(1)))
        x = self.second(x)
        x = torch.where(x > 0, x, 0.1 * x)
        x = x.masked_fill(x > 3, 3.0)
        return self.head(x)


class Routed(nn.Module):
    """The two channels with the largest scores, by `topk`; what the input says is no choice."""

    def __init__(self) -> None:
        super().__init__()
        self.score = nn.Linear(8, 8)
        self.head = nn.Linear(2, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = x * (x > 0)
        best = self.score(x).topk(2, dim=1).indices
        return self.head(x.gather(1, best))


def tapped(**finetune: Any) -> Compilation:
    training = {"sparse": {"epochs": 1}, "quantize": {"epochs": 1}, **finetune}
    rules = make_rules(LINEARS, {**TAPS, "match": {"name": "second"}}, finetune=training)
    compilation = begin(
        seeded(Gated), images(2), rules, data=BATCHES, train_data=BATCHES, finetune=True
    )
    return run_until(compilation, "tap")


@pytest.fixture(scope="module")
def gated() -> Compilation:
    return run_until(tapped(), "sparsify")


def other(graph: torch.fx.GraphModule) -> torch.fx.GraphModule:
    """A copy whose first layer has other weights, so that it decides otherwise."""
    found = frozen_copy(graph)
    with torch.no_grad():
        found.get_parameter("first.weight").neg_()
    return found


def test_a_comparison_behind_a_layer_is_a_decision_and_an_activation_is_none(
    gated: Compilation,
) -> None:
    assert [decision.name for decision in decisions_of(gated.ir)] == ["gate.gt"]
    remark = next(r for r in remarks_of(gated, "tap", Kind.PASSED) if r.code == "decision-shared")
    assert remark.layer == "gate.gt"


def test_topk_behind_a_layer_is_a_decision_and_a_mask_of_the_input_is_none() -> None:
    program = torch.export.export(seeded(Routed), (torch.randn(2, 8),))
    found = find_decisions(program.module().graph)
    assert len(found) == 1
    assert found[0][1].meta["val"].dtype == torch.int64


def test_the_student_computes_with_the_teachers_decision(gated: Compilation) -> None:
    student, teacher = gated.ir, other(gated.ir)
    batch = images(8, seed=5)
    with torch.no_grad():
        alone = student(batch)
        mask = outcome(teacher, batch)
        assert not torch.equal(mask, outcome(student, batch))
        with following(student, teacher):
            teacher(batch)
            led = student(batch)
        again = student(batch)
    handle = decisions_of(student)[0].register_forward_hook(lambda *_: mask)
    with torch.no_grad():
        by_hand = student(batch)
    handle.remove()
    torch.testing.assert_close(led, by_hand)
    assert not torch.allclose(led, alone)
    torch.testing.assert_close(again, alone)


def outcome(graph: torch.fx.GraphModule, batch: Tensor) -> Tensor:
    """What the graph's one decision says."""
    seen: list[Tensor] = []
    decision = decisions_of(graph)[0]
    handle = decision.register_forward_hook(lambda _, __, output: seen.append(output))
    graph(batch)
    handle.remove()
    return seen[0]


def test_the_loss_of_a_step_is_that_of_shared_decisions(gated: Compilation) -> None:
    student, teacher = gated.ir, other(gated.ir)
    batch = Batch((images(8, seed=5),), None)
    seen: list[Tensor] = []
    handles = [
        decision.register_forward_hook(lambda _, __, output: seen.append(output))
        for graph in (teacher, student)
        for decision in decisions_of(graph)
    ]
    listen(student)
    listen(teacher)
    distillation_loss(gated, student, teacher, batch, [1.0], "a batch")
    for handle in handles:
        handle.remove()
    listen(student, False)
    assert len(seen) == 2
    assert torch.equal(seen[0], seen[1])


def test_a_decision_that_the_teacher_did_not_make_is_named(gated: Compilation) -> None:
    student, teacher = gated.ir, other(gated.ir)
    with torch.no_grad(), following(student, teacher):
        teacher(images(4))
        with pytest.raises(InputError, match=r"decision gate\.gt") as caught:
            student(images(8))
    assert caught.value.code == "decision-apart"
    with torch.no_grad():
        assert student(images(8)).shape == (8, 4)


@pytest.mark.parametrize("finetune", [{"decisions": "own"}, {"sparse": "none", "quantize": "none"}])
def test_nothing_is_shared_where_the_rules_say_so_or_nothing_trains(
    finetune: dict[str, Any],
) -> None:
    assert decisions_of(tapped(**finetune).ir) == []


def test_the_folded_graph_decides_for_itself(gated: Compilation) -> None:
    compilation = run_until(gated, "fold")
    assert decisions_of(compilation.ir) == []
    assert compilation.finetune["quantize"]["steps"] == 2
