"""Both fine-tune phases of Algorithm 1, on a tiny model: what trains, what stays, when it ends."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import Any, Literal

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from gpusq_compile.accuracy import evaluate
from gpusq_compile.compilation import Compilation
from gpusq_compile.data import Batch
from gpusq_compile.errors import CheckFailed, InputError
from gpusq_compile.finetune import loop
from gpusq_compile.finetune.distill import distillation_loss
from gpusq_compile.finetune.limits import SMOOTHING, Limits
from gpusq_compile.finetune.loop import tap_shares, thinned, train
from gpusq_compile.finetune.optimizer import make_optimizer, unfreeze
from gpusq_compile.finetune.taps import features_of, listen, taps_of
from gpusq_compile.finetune.teacher import frozen_copy, zero_masked_weights
from gpusq_compile.graph.query import tensor_attribute
from gpusq_compile.language.training import Phase, QuantizePhase
from gpusq_compile.plan import planned
from gpusq_compile.quantization.fake_quantize import FakeQuantize
from gpusq_compile.sparsity import Mask
from tests.compilations import INT8, SPARSE, TAPS, begin, fork, make_rules, run_until
from tests.models import CLASSES, Shape, TinyViT, images, labelled, seeded

EVERYTHING = {"id": "all", "match": {"op": "linear"}, "sparsity": SPARSE, "quantize": INT8}
FINETUNE: dict[str, Any] = {
    "loss": {"alpha": 1, "beta": 10, "gamma": 5, "temperature": 2},
    "sparse": {"epochs": 1},
    "quantize": {"epochs": 1},
}
DATA = labelled(3)
steady = settings(deadline=None, max_examples=12)  # A busy machine is no failure.


def tiny(**rest: Any) -> Compilation:
    """A tiny ViT before its first pass, with the fine-tune on."""
    document = make_rules({**TAPS, "distill": {"theta": 2.0}}, EVERYTHING, finetune=FINETUNE)
    options = {"finetune": True, "train_data": DATA, "data": DATA, **rest}
    return begin(seeded(TinyViT, Shape(depth=1)), images(2), document, **options)


@pytest.fixture(scope="module")
def masked() -> Compilation:
    """Tapped and masked, both phases still to come."""
    return run_until(tiny(), "sparsify")


@pytest.fixture(scope="module")
def quantized(masked: Compilation) -> Compilation:
    """Fake-quantized after a sparse phase; the quantize phase is still to come."""
    return run_until(fork(masked), "quantize")


@pytest.fixture
def sparse(masked: Compilation) -> Compilation:
    """About to enter the sparse phase."""
    return fork(masked)


@pytest.mark.parametrize("kind", ["adamw", "sgd"])
def test_a_step_is_seen_in_the_versions_of_the_parameters(
    sparse: Compilation, kind: Literal["adamw", "sgd"]
) -> None:
    unfreeze(sparse.ir, sparse.frozen)
    optimizer = make_optimizer(sparse.ir, Phase(optimizer=kind))
    before = {name: p._version for name, p in sparse.ir.named_parameters()}
    sparse.ir(images(2))[0].sum().backward()
    optimizer.step()
    assert all(p._version > before[name] for name, p in sparse.ir.named_parameters())


def test_what_the_quantize_phase_changed_is_measured(quantized: Compilation) -> None:
    compilation = run_until(fork(quantized), "finetune_quantized")
    assert compilation.records[-1].change


def weights_of(compilation: Compilation) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in compilation.ir.named_parameters()}


def scales_of(compilation: Compilation) -> dict[str, Tensor]:
    return {name: w for name, w in weights_of(compilation).items() if name.endswith(".log_scale")}


def run_phase(compilation: Compilation, phase: Phase, teacher: Any = None) -> loop.PhaseReport:
    """One phase as its pass runs it."""
    second = isinstance(phase, QuantizePhase)
    name = "quantize" if second else "sparse"
    teacher = teacher or (compilation.sparse_teacher if second else compilation.dense_teacher)
    assert teacher is not None
    zero_masked_weights(compilation.ir)
    taps = [1.0] * len(taps_of(compilation.ir))
    return train(compilation, teacher, phase, name=name, tap_weights=taps)


# --- the loss of one batch, line by line ---------------------------------------------------------


@pytest.mark.parametrize("with_labels", [True, False])
def test_the_loss_is_that_of_the_algorithm(masked: Compilation, with_labels: bool) -> None:
    compilation = fork(masked)
    dense = compilation.dense_teacher
    assert dense is not None
    zero_masked_weights(compilation.ir)
    inputs, labels = DATA[0]
    batch = Batch((inputs,), labels if with_labels else None)
    listen(compilation.ir)
    listen(dense)
    found = distillation_loss(compilation, compilation.ir, dense, batch, [2.0, 3.0, 4.0], "it")

    student, teacher = compilation.ir(inputs), dense(inputs)
    ours, theirs = (features_of(taps_of(graph)) for graph in (compilation.ir, dense))
    feature = sum(
        weight * (a - b).square().mean()
        for weight, a, b in zip([2, 3, 4], ours, theirs, strict=True)
    )
    truth = labels if with_labels else teacher.argmax(dim=1)
    hard = -student.log_softmax(dim=1)[torch.arange(len(truth)), truth].mean()
    soft_student, soft_teacher = (student / 2).log_softmax(dim=1), (teacher / 2).log_softmax(dim=1)
    soft = (soft_teacher.exp() * (soft_teacher - soft_student)).sum(dim=1).mean() * 4
    torch.testing.assert_close(found.hard, hard)
    torch.testing.assert_close(found.soft, soft)
    torch.testing.assert_close(found.feature, feature)
    torch.testing.assert_close(found.total, hard + 10 * soft + 5 * feature)


def test_the_dense_and_the_sparse_teacher_are_the_student_without_its_inserted_nodes(
    quantized: Compilation,
) -> None:
    batch = images(4)
    sparse_teacher = quantized.sparse_teacher
    assert sparse_teacher is not None
    assert not any(isinstance(m, FakeQuantize) for m in sparse_teacher.modules())
    assert any(isinstance(m, Mask) for m in sparse_teacher.modules())
    assert not any(p.requires_grad for p in sparse_teacher.parameters())
    student = fork(quantized)
    for module in student.ir.modules():
        if isinstance(module, FakeQuantize):
            module.calibrated = False
    assert torch.equal(sparse_teacher(batch), student.ir(batch))
    assert len(taps_of(sparse_teacher)) == len(taps_of(quantized.ir)) == 3


# --- tap weights ---------------------------------------------------------------------------------


def test_tap_weights_are_each_taps_share_of_the_loss_between_dense_and_sparse(
    masked: Compilation,
) -> None:
    compilation = fork(masked)
    dense = compilation.dense_teacher
    assert dense is not None
    zero_masked_weights(compilation.ir)
    shares = tap_shares(compilation, dense, compilation.ir)
    assert not any(tap.listening for tap in (*taps_of(compilation.ir), *taps_of(dense)))
    thetas = [tap.theta for tap in taps_of(compilation.ir)]
    assert thetas == [2.0, 2.0, 2.0]
    parts = torch.zeros(3)
    for inputs, _ in DATA:
        listen(compilation.ir)
        listen(dense)
        with torch.no_grad():
            compilation.ir(inputs)
            dense(inputs)
        features = zip(
            features_of(taps_of(compilation.ir)), features_of(taps_of(dense)), strict=True
        )
        parts += torch.stack([2.0 * F.mse_loss(ours, theirs) for ours, theirs in features])
    assert sum(shares) == pytest.approx(1.0)
    torch.testing.assert_close(torch.tensor(shares), parts / parts.sum())


def test_models_that_agree_give_every_tap_the_same_weight(masked: Compilation) -> None:
    same = frozen_copy(masked.ir)
    assert tap_shares(masked, same, masked.ir) == [1 / 3] * 3


# --- what trains and what stays ------------------------------------------------------------------

phases = st.fixed_dictionaries(
    {
        "optimizer": st.sampled_from(["adamw", "sgd"]),
        "lr": st.sampled_from([1e-4, 1e-2]),
        "weight_decay": st.sampled_from([0.0, 0.01, 0.5]),
        "momentum": st.sampled_from([0.0, 0.9]),
        "schedule": st.sampled_from(["cosine", "constant", "polynomial"]),
        "autocast": st.sampled_from([None, "bfloat16"]),
        "warmup_steps": st.integers(0, 2),
        "clip_norm": st.sampled_from([None, 0.1]),
        "max_steps": st.integers(1, 4),
    }
)


def masked_entries(compilation: Compilation) -> Iterator[tuple[str, Tensor]]:
    """(layer, the stored values at pruned places)."""
    for node, plan in planned(compilation.ir.graph):
        [call] = [n for n in _upstream(node) if isinstance(_module(compilation, n), Mask)]
        mask = _module(compilation, call).mask
        yield plan.name, tensor_attribute(compilation.ir, plan.weight)[~mask]


def _upstream(node: torch.fx.Node) -> Iterator[torch.fx.Node]:
    source = node.args[1]
    while isinstance(source, torch.fx.Node) and source.op == "call_module":
        yield source
        source = source.args[0]


def _module(compilation: Compilation, node: torch.fx.Node) -> Any:
    return compilation.ir.get_submodule(str(node.target))


@steady
@given(phases, st.booleans())
def test_pruned_weights_are_exactly_zero_after_any_phase_with_any_optimizer(
    masked: Compilation, quantized: Compilation, settings: dict[str, Any], second: bool
) -> None:
    compilation = fork(quantized if second else masked)
    before = weights_of(compilation)
    phase = QuantizePhase(**settings) if second else Phase(**settings)
    run_phase(compilation, phase)
    entries = list(masked_entries(compilation))
    assert len(entries) == 6
    for layer, values in entries:
        assert values.numel() > 0
        assert not values.any(), layer
    after = weights_of(compilation)
    assert any(not torch.equal(before[name], after[name]) for name in before)


@steady
@given(phases)
def test_pruned_weights_have_neither_gradient_nor_optimizer_state(
    masked: Compilation, settings: dict[str, Any]
) -> None:
    compilation = fork(masked)
    zero_masked_weights(compilation.ir)
    assert compilation.dense_teacher is not None
    weights = [1.0] * len(taps_of(compilation.ir))
    run = loop._Run(compilation, compilation.dense_teacher, Phase(**settings), "sparse", weights)
    with loop.listening(run.student, run.teacher):
        for number in range(1, settings["max_steps"] + 1):
            run.step(number)
    checked = 0
    for node, plan in planned(compilation.ir.graph):
        [call] = [n for n in _upstream(node) if isinstance(_module(compilation, n), Mask)]
        pruned = ~_module(compilation, call).mask.bool()
        parameter = compilation.ir.get_parameter(plan.weight)
        assert parameter.grad is not None
        assert not parameter.grad[pruned].any()
        for state in run.optimizer.state[parameter].values():
            if torch.is_tensor(state) and state.shape == pruned.shape:
                assert not state[pruned].any()
                checked += 1
    assert checked or settings["optimizer"] == "sgd"


def test_the_teacher_never_changes(masked: Compilation, quantized: Compilation) -> None:
    for start, phase in (
        (masked, Phase(max_steps=3, lr=0.1)),
        (quantized, QuantizePhase(max_steps=3, lr=0.1, scale_lr=0.1)),
    ):
        compilation = fork(start)
        teacher = start.dense_teacher if start is masked else start.sparse_teacher
        assert teacher is not None
        before = {name: value.clone() for name, value in teacher.state_dict().items()}
        run_phase(compilation, phase, teacher)
        assert all(torch.equal(value, before[name]) for name, value in teacher.state_dict().items())


def test_scale_factors_train_in_the_second_phase_only(
    sparse: Compilation, quantized: Compilation
) -> None:
    assert scales_of(sparse) == {}
    compilation = fork(quantized)
    before = scales_of(compilation)
    run_phase(compilation, QuantizePhase(max_steps=2, scale_lr=1e-3))
    after = scales_of(compilation)
    assert len(before) == 12  # A weight's and an input's for each of six linears.
    unchanged = [name for name in before if torch.equal(before[name], after[name])]
    assert unchanged == []


def test_scales_have_a_learning_rate_of_their_own(quantized: Compilation) -> None:
    fixed = fork(quantized)
    before = scales_of(fixed)
    run_phase(fixed, QuantizePhase(max_steps=1, scale_lr=1e-30))
    after = scales_of(fixed)
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_weight_decay_reaches_matrices_and_neither_vectors_nor_scales(
    quantized: Compilation,
) -> None:
    optimizer = make_optimizer(
        trainable(quantized).ir, QuantizePhase(weight_decay=0.3, lr=0.1, scale_lr=0.2)
    )
    matrices, vectors, scales = optimizer.param_groups
    assert matrices["weight_decay"] == 0.3
    assert all(parameter.ndim >= 2 for parameter in matrices["params"])
    assert vectors["weight_decay"] == scales["weight_decay"] == 0.0
    assert all(parameter.ndim < 2 for parameter in vectors["params"])
    assert (vectors["lr"], scales["lr"]) == (0.1, 0.2)
    assert len(scales["params"]) == 12


def trainable(compilation: Compilation) -> Compilation:
    forked = fork(compilation)
    unfreeze(forked.ir, forked.frozen)
    return forked


def test_what_the_user_froze_stays_frozen_unless_it_is_compressed() -> None:
    model = seeded(TinyViT, Shape(depth=1))
    model.layers[0].requires_grad_(False)
    rules = make_rules({**EVERYTHING, "match": {"name": "**.up"}}, finetune=FINETUNE)
    compilation = begin(model, images(2), rules, finetune=True, train_data=DATA, data=DATA)
    before = {name: value.detach().clone() for name, value in model.named_parameters()}
    run_until(compilation, "finetune_sparse")
    after = weights_of(compilation)
    changed = {
        name for name in after if not torch.equal(after[name], before[name].view_as(after[name]))
    }
    assert "layers.0.feed.up.weight" in changed
    assert {name for name in changed if name.startswith("layers.0")} == {"layers.0.feed.up.weight"}
    assert "last_norm.weight" in changed


def test_a_model_that_is_frozen_as_a_whole_was_made_for_inference_and_trains() -> None:
    model = seeded(TinyViT, Shape(depth=1)).requires_grad_(False)
    rules = make_rules(EVERYTHING, finetune=FINETUNE)
    compilation = begin(model, images(2), rules, finetune=True, train_data=DATA, data=DATA)
    before = model.last_norm.weight.clone()
    run_until(compilation, "finetune_sparse")
    assert not torch.equal(weights_of(compilation)["last_norm.weight"], before)


def test_afterwards_nothing_asks_for_gradients_and_no_tap_listens(sparse: Compilation) -> None:
    run_phase(sparse, Phase(max_steps=1))
    assert not any(parameter.requires_grad for parameter in sparse.ir.parameters())
    assert not any(tap.listening or tap.feature is not None for tap in taps_of(sparse.ir))


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


# --- evaluation, accumulation, precision ---------------------------------------------------------


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


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("second", [False, True], ids=["sparse", "quantize"])
def test_autocast_trains_float32_weights_to_about_the_same_losses(
    dtype: Any, second: bool, masked: Compilation, quantized: Compilation
) -> None:
    start = quantized if second else masked
    kind = QuantizePhase if second else Phase
    curves = []
    for autocast in (None, dtype):
        compilation = fork(start)
        report = run_phase(compilation, kind(epochs=3, lr=1e-3, autocast=autocast))
        assert all(value.dtype == torch.float32 for value in weights_of(compilation).values())
        curves.append([entry["total"] for entry in report.curve])
    assert curves[0] != curves[1]
    assert curves[1] == pytest.approx(curves[0], rel=0.1)


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
