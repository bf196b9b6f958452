"""Both fine-tune phases of Algorithm 1, on a tiny model: what trains, what stays, when it ends."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from gpusq_compile.compilation import Compilation
from gpusq_compile.data import Batch
from gpusq_compile.finetune import loop
from gpusq_compile.finetune.distill import distillation_loss
from gpusq_compile.finetune.loop import tap_shares
from gpusq_compile.finetune.optimizer import make_optimizer, unfreeze
from gpusq_compile.finetune.taps import features_of, listen, taps_of
from gpusq_compile.finetune.teacher import frozen_copy, zero_masked_weights
from gpusq_compile.graph.query import tensor_attribute
from gpusq_compile.language.training import Phase, QuantizePhase
from gpusq_compile.plan import planned
from gpusq_compile.quantization.fake_quantize import FakeQuantize
from gpusq_compile.sparsity import Mask
from tests.compilations import EVERYTHING, begin, fork, make_rules, run_until
from tests.finetuning import DATA, FINETUNE, run_phase, tiny, weights_of
from tests.models import Shape, TinyViT, images, seeded

steady = settings(deadline=None, max_examples=12)  # A busy machine is no failure.


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


def scales_of(compilation: Compilation) -> dict[str, Tensor]:
    return {name: w for name, w in weights_of(compilation).items() if name.endswith(".log_scale")}


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


# --- precision -----------------------------------------------------------------------------------


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
