"""A phase reads its data as given, ends when it should, keeps the best, says what went wrong."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from gpusq_compile.accuracy import evaluate
from gpusq_compile.compilation import Compilation
from gpusq_compile.errors import CheckFailed, InputError
from gpusq_compile.finetune import loop
from gpusq_compile.finetune.limits import SMOOTHING, Limits
from gpusq_compile.finetune.loop import thinned
from gpusq_compile.finetune.teacher import zero_masked_weights
from gpusq_compile.language.training import Phase
from tests.compilations import fork, run_until
from tests.finetuning import DATA, run_phase, tiny, weights_of
from tests.models import CLASSES


@pytest.fixture(scope="module")
def masked() -> Compilation:
    """Tapped and masked, both phases still to come."""
    return run_until(tiny(), "sparsify")


@pytest.fixture
def sparse(masked: Compilation) -> Compilation:
    """About to enter the sparse phase."""
    return fork(masked)


# --- the end of a phase --------------------------------------------------------------------------


def test_a_phase_ends_with_its_budget(sparse: Compilation) -> None:
    report = run_phase(sparse, Phase(max_steps=2))
    assert (report.steps, report.stopped_by) == (2, "budget")
    assert report.images == 16


def test_a_phase_ends_once_the_loss_is_below_the_threshold(sparse: Compilation) -> None:
    report = run_phase(sparse, Phase(epochs=4, threshold=1e6))
    assert (report.steps, report.stopped_by) == (1, "threshold")


def test_a_phase_ends_when_the_loss_stays_on_a_plateau(sparse: Compilation) -> None:
    # Steps this small improve nothing that counts.
    report = run_phase(sparse, Phase(epochs=100, lr=1e-12, patience=3))
    assert report.stopped_by == "plateau"
    assert 3 < report.steps < 300


def test_a_negative_loss_that_stays_is_a_plateau() -> None:
    limits = Limits(Phase(patience=3))
    assert [limits.met(-2.0) for _ in range(4)] == [None, None, None, "plateau"]


def test_a_loss_that_falls_is_no_plateau() -> None:
    limits = Limits(Phase(patience=2))
    assert [limits.met(10.0 * 0.9**step) for step in range(30)] == [None] * 30


def test_the_loss_is_judged_smoothed() -> None:
    limits = Limits(Phase(threshold=1.0))
    assert limits.met(2.0) is None
    assert limits.met(0.0) is None  # One good batch is not enough.
    assert limits.smoothed == pytest.approx(2.0 * SMOOTHING)
    reached = next(step for step in range(100) if limits.met(0.0))
    assert reached + 2 == math.ceil(math.log(0.5) / math.log(SMOOTHING))


def test_training_lowers_the_loss(sparse: Compilation) -> None:
    report = run_phase(sparse, Phase(epochs=10, lr=1e-3))
    assert report.curve[-1]["soft"] < 0.5 * report.curve[0]["soft"]
    assert report.curve[-1]["feature"] < 0.8 * report.curve[0]["feature"]


def test_the_best_weights_are_kept_and_the_evaluations_reported(sparse: Compilation) -> None:
    sparse.source.eval_data = lambda: DATA
    # Steps that get larger and larger leave the best weights behind.
    phase = Phase(max_steps=6, epochs=9, lr=0.3, eval_every=1, keep="best", schedule="constant")
    report = run_phase(sparse, phase)
    scores = [entry["top1"] for entry in report.evaluations]
    assert [entry["step"] for entry in report.evaluations] == [1, 2, 3, 4, 5, 6]
    assert report.kept_step == 1 + scores.index(max(scores))
    kept = weights_of(sparse)
    assert evaluate(sparse, sparse.ir)["top1"] == max(scores)
    assert scores[-1] < max(scores)
    last = fork(sparse)
    again = run_phase(last, phase.model_copy(update={"keep": "last"}))
    assert again.kept_step is None
    assert any(not torch.equal(kept[name], value) for name, value in weights_of(last).items())


def test_the_best_is_looked_for_after_every_epoch(sparse: Compilation) -> None:
    sparse.source.eval_data = lambda: DATA
    report = run_phase(sparse, Phase(epochs=2, keep="best"))
    assert [entry["step"] for entry in report.evaluations] == [3, 6]


def test_without_evaluation_data_the_last_weights_are_kept_and_a_remark_says_so(
    sparse: Compilation,
) -> None:
    report = run_phase(sparse, Phase(max_steps=1, keep="best"))
    assert [remark.code for remark in report.remarks] == ["no-eval-data"]
    assert report.evaluations == []


def test_evaluation_data_that_says_nothing_leaves_a_remark(sparse: Compilation) -> None:
    sparse.source.eval_data = lambda: [DATA[0][0]]
    report = run_phase(sparse, Phase(max_steps=2, keep="best", eval_every=1))
    assert [remark.code for remark in report.remarks] == ["no-best"]


def test_evaluating_on_the_way_changes_nothing(sparse: Compilation) -> None:
    found = []
    for every in (None, 1):
        compilation = fork(sparse)
        compilation.source.eval_data = compilation.source.train_data = shuffled
        run_phase(compilation, Phase(epochs=1, eval_every=every))
        found.append(weights_of(compilation))
    assert all(torch.equal(found[0][name], value) for name, value in found[1].items())


def test_accumulated_batches_train_as_one_batch(sparse: Compilation) -> None:
    whole = tuple(torch.cat(parts) for parts in zip(*DATA, strict=True))
    found = []
    for data, size in (([whole], None), (DATA, 24)):
        compilation = fork(sparse)
        compilation.source.train_data = partial(identity, data)
        report = run_phase(
            compilation, Phase(max_steps=2, epochs=9, optimizer="sgd", lr=0.01, batch_size=size)
        )
        assert report.images == 48
        found.append((weights_of(compilation), report.curve))
    (one, curve), (several, accumulated) = found
    for name, value in one.items():
        torch.testing.assert_close(several[name], value, rtol=1e-3, atol=1e-4)
    for before, now in zip(curve, accumulated, strict=True):
        assert now == pytest.approx(before, rel=1e-3)


# --- the data ------------------------------------------------------------------------------------


def test_batches_with_and_without_labels_may_alternate(sparse: Compilation) -> None:
    (inputs, labels), *_ = DATA
    sparse.source.train_data = lambda: [(inputs, labels), inputs]
    report = run_phase(sparse, Phase(epochs=1, lr=1e-12))
    with_labels, without = report.curve
    assert with_labels["soft"] == pytest.approx(without["soft"], rel=1e-4)
    assert with_labels["hard"] != pytest.approx(without["hard"], rel=1e-3)


def test_soft_labels_stand_in_for_missing_ones(sparse: Compilation) -> None:
    (inputs, _), *_ = DATA
    hard_parts = []
    for labels in ("hard", "soft"):
        compilation = tiny(train_data=[inputs])
        finetune = compilation.rules.finetune.model_copy(update={"labels": labels})
        file = compilation.rules.file.model_copy(update={"finetune": finetune})
        compilation.rules = replace(compilation.rules, file=file)
        run_until(compilation, "sparsify")
        hard_parts.append(run_phase(compilation, Phase(max_steps=1)).curve[0]["hard"])
    assert hard_parts[0] != pytest.approx(hard_parts[1], rel=1e-4)


def test_batches_of_any_size_train(sparse: Compilation) -> None:
    (inputs, labels), *_ = DATA
    sparse.source.train_data = lambda: [(inputs[:n], labels[:n]) for n in (8, 1, 5)]
    report = run_phase(sparse, Phase(epochs=2))
    assert (report.steps, report.images) == (6, 28)


def test_data_without_a_length_is_counted_and_read_again_each_epoch(sparse: Compilation) -> None:
    reads = []

    def generate() -> Iterator[tuple[Tensor, Tensor]]:
        reads.append(True)
        yield from DATA[:2]

    sparse.source.train_data = generate
    report = run_phase(sparse, Phase(epochs=2))
    assert report.steps == 4
    assert len(reads) == 3


def test_the_reports_curve_keeps_its_ends_and_is_never_too_long() -> None:
    curve = [{"step": float(step)} for step in range(1, 1001)]
    kept = thinned(curve)
    assert len(kept) == loop.CURVE_POINTS
    assert (kept[0], kept[-1]) == (curve[0], curve[-1])
    assert thinned(curve[:5]) == curve[:5]


# --- repeatability -------------------------------------------------------------------------------


def shuffled() -> Iterator[tuple[Tensor, Tensor]]:
    """Data whose order and noise follow torch's global seed, as a DataLoader's do."""
    for index in torch.randperm(len(DATA)).tolist():
        inputs, labels = DATA[index]
        yield inputs + 0.1 * torch.randn_like(inputs), labels


def test_equal_seeds_give_equal_weights_and_others_do_not(sparse: Compilation) -> None:
    found: list[dict[str, Tensor]] = []
    for seed in (3, 3, 4):
        compilation = fork(sparse)
        compilation.options = replace(compilation.options, seed=seed)
        compilation.source.train_data = shuffled
        torch.manual_seed(len(found))  # What ran before has no say.
        run_phase(compilation, Phase(epochs=1, lr=1e-2))
        found.append(weights_of(compilation))
    first, second, other = found
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert any(not torch.equal(first[name], other[name]) for name in first)


# --- what can go wrong ---------------------------------------------------------------------------


def test_a_loss_that_is_not_finite_names_the_step_and_the_tap(sparse: Compilation) -> None:
    with pytest.raises(CheckFailed) as caught:
        run_phase(sparse, Phase(epochs=20, lr=1e20, optimizer="sgd", schedule="constant"))
    assert caught.value.code == "loss-not-finite"
    assert "at step" in caught.value.message
    assert "first at tap stem" in caught.value.message
    assert "clip_norm" in str(caught.value.hint)


def test_a_gradient_that_is_not_finite_changes_no_weight(sparse: Compilation) -> None:
    before = weights_of(sparse)
    weight = sparse.ir.get_parameter("last_norm.weight").requires_grad_()
    # A loss that is finite, whose derivative is not.
    handle = weight.register_hook(lambda gradient: gradient * float("inf"))
    with pytest.raises(CheckFailed) as caught:
        run_phase(sparse, Phase(max_steps=2))
    handle.remove()
    assert caught.value.code == "loss-not-finite"
    assert "the gradient of phase sparse is not finite at step 1" in caught.value.message
    zero_masked_weights(sparse.ir)
    assert torch.equal(weights_of(sparse)["last_norm.weight"], before["last_norm.weight"])


def test_labels_outside_the_models_classes_name_the_step(sparse: Compilation) -> None:
    inputs, labels = DATA[0]
    sparse.source.train_data = lambda: [(inputs, labels + CLASSES)]
    with pytest.raises(InputError) as caught:
        run_phase(sparse, Phase(max_steps=1))
    assert caught.value.code == "labels-range"
    assert "step 1" in caught.value.message


def test_data_that_ends_before_its_first_batch_is_an_error(sparse: Compilation) -> None:
    empty: tuple[Any, ...] = ([], iter(()))
    for data in empty:
        sparse.source.train_data = partial(identity, data)
        with pytest.raises(InputError, match="yielded no batch"):
            run_phase(sparse, Phase(epochs=1))


def identity(value: Any) -> Any:
    return value


def test_no_training_data_names_the_phase_that_asks_for_it(sparse: Compilation) -> None:
    sparse.source.train_data = None
    with pytest.raises(InputError) as caught:
        run_phase(sparse, Phase(max_steps=1))
    assert caught.value.code == "no-training-data"
    assert "finetune.sparse" in caught.value.message
    assert "--no-finetune" in str(caught.value.hint)
