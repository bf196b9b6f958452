"""reconstruct: each sparse quantized block comes closer to the dense one, without labels."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.fx
from torch import Tensor, nn

from gpusq_compile.compilation import Compilation
from gpusq_compile.errors import CheckFailed, InputError
from gpusq_compile.graph.query import module_calls, value_dependent
from gpusq_compile.graph.roles import residual_adds
from gpusq_compile.language.loader import load_rules
from gpusq_compile.load_model import load_source
from gpusq_compile.passes import ordered
from gpusq_compile.remarks import Kind
from gpusq_compile.report.terminal import finetune_lines
from gpusq_compile.sparsity import PATTERNS, Mask, violations
from tests.compilations import (
    EVERYTHING,
    INT8,
    SPARSE,
    begin,
    fork,
    make_rules,
    plans_of,
    remarks_of,
    run_until,
)
from tests.models import Detector, GeluMlp, Perceptron, TinyViT, images, noise, seeded

DATA = [images(8, seed=seed) for seed in (11, 12, 13)]
HELD_OUT = [images(8, seed=seed) for seed in (21, 22)]
CLASSIFIER = {"id": "c", "match": {"role": "classifier"}, "sparsity": "none", "quantize": "none"}
SETTINGS = {"steps": 30, "lr": 1e-3, "scale_lr": 1e-3, "batches": 3}


def prepared(
    *rules: Any,
    model: nn.Module | None = None,
    inputs: Any = None,
    reconstruct: Any = SETTINGS,
    **options: Any,
) -> Compilation:
    """Ready for the pass; activations are clipped hard, so that there is something to mend."""
    document = make_rules(
        *(rules or (EVERYTHING, CLASSIFIER)),
        calibration={"activation": "percentile", "percentile": 95.0},
        finetune={"sparse": "none", "quantize": "none", "reconstruct": reconstruct},
    )
    chosen: dict[str, Any] = {"finetune": True, "data": DATA, "train_data": DATA, **options}
    network = seeded(TinyViT) if model is None else model
    example = images(2) if inputs is None else inputs
    return run_until(begin(network, example, document, **chosen), "quantize")


def state(compilation: Compilation) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in compilation.ir.named_parameters()}


def error(ours: torch.fx.GraphModule, dense: torch.fx.GraphModule, data: list[Tensor]) -> float:
    with torch.no_grad():
        pairs = [(ours(batch), dense(batch)) for batch in data]
    return float(torch.stack([(a - b).square().mean() / b.var() for a, b in pairs]).mean())


@pytest.fixture(scope="module")
def before() -> Compilation:
    return prepared()


@pytest.fixture(scope="module")
def after(before: Compilation) -> Compilation:
    return run_until(fork(before), "reconstruct")


def test_each_block_comes_closer_to_the_dense_one(after: Compilation) -> None:
    blocks = after.finetune["reconstruct"]["blocks"]
    assert [block["layers"] for block in blocks] == [
        ["stem"],
        *[
            [f"layers.{depth}.{part}" for part in parts]
            for depth in (0, 1)
            for parts in (("mix.wide", "mix.back"), ("feed.up", "feed.down"))
        ],
    ]
    assert all(0 < block["after"] < block["before"] for block in blocks)


def test_the_whole_model_comes_closer_on_held_out_inputs(
    before: Compilation, after: Compilation
) -> None:
    dense = before.dense_teacher
    assert dense is not None
    assert error(after.ir, dense, HELD_OUT) < 0.85 * error(before.ir, dense, HELD_OUT)


def test_weights_and_scales_train_and_pruned_weights_stay_zero(
    before: Compilation, after: Compilation
) -> None:
    old, new = state(before), state(after)
    changed = {name for name in old if not torch.equal(old[name], new[name])}
    assert {name for name in old if name.endswith(".log_scale")} <= changed
    masks = {str(n.target): m for n, m in module_calls(after.ir) if isinstance(m, Mask)}
    assert len(masks) == 9
    for plan in plans_of(after).values():
        if plan.applied.sparsity:
            assert plan.weight in changed
            assert violations(new[plan.weight], PATTERNS["2:4"]) == 0
            zeros = old[plan.weight] == 0
            assert torch.equal(new[plan.weight][zeros], old[plan.weight][zeros])
    for name, mask in masks.items():
        assert torch.equal(mask.mask, before.ir.get_buffer(f"{name}.mask"))


def test_what_lies_in_no_compressed_block_stays_as_it_was(
    before: Compilation, after: Compilation
) -> None:
    old, new = state(before), state(after)
    for name in ("last_norm.weight", "last_norm.bias", "logits.weight", "logits.bias"):
        assert torch.equal(old[name], new[name])


def test_nothing_is_trainable_afterwards_and_the_teacher_is_dropped(after: Compilation) -> None:
    assert not any(parameter.requires_grad for parameter in after.ir.parameters())
    assert all(parameter.grad is None for parameter in after.ir.parameters())
    assert after.dense_teacher is None
    assert "reconstructed" in after.facts


def test_the_report_says_what_became_of_each_block(after: Compilation) -> None:
    report = after.finetune["reconstruct"]
    assert (report["steps"], report["images"], report["settings"]) == (150, 24, SETTINGS)
    remarks = remarks_of(after, "reconstruct", Kind.PASSED)
    assert [remark.layer for remark in remarks][:2] == [
        "stem",
        "layers.0.mix.wide .. layers.0.mix.back",
    ]
    first = report["blocks"][0]
    expected = f"error {first['before']:.2e} -> {first['after']:.2e} of the variance in 30 steps"
    assert remarks[0].reason == expected
    [line] = finetune_lines({"finetune": {"reconstruct": report}})
    assert line.startswith("reconstruct: 5 blocks in ")


def test_the_reported_error_is_that_of_the_block(before: Compilation) -> None:
    """A block that ends the graph can be checked from outside."""
    perceptron = prepared(EVERYTHING, model=seeded(Perceptron), inputs=noise(2, 32), data=TOKENS)
    dense = perceptron.dense_teacher
    assert dense is not None
    errors = [error(perceptron.ir, dense, TOKENS)]
    run_until(perceptron, "reconstruct")
    errors.append(error(perceptron.ir, dense, TOKENS))
    [block] = perceptron.finetune["reconstruct"]["blocks"]
    assert [block["before"], block["after"]] == pytest.approx(errors, rel=1e-2)


TOKENS = [noise(64, 32, seed=seed) for seed in (1, 2)]


def test_the_same_seed_gives_the_same_weights(before: Compilation, after: Compilation) -> None:
    again = run_until(fork(before), "reconstruct")
    old, new = state(after), state(again)
    assert all(torch.equal(old[name], new[name]) for name in old)


def test_a_block_that_would_get_worse_stays_as_it_was() -> None:
    compilation = prepared(reconstruct={**SETTINGS, "steps": 3, "lr": 10.0})
    old = state(compilation)
    run_until(compilation, "reconstruct")
    new = state(compilation)
    assert all(torch.equal(old[name], new[name]) for name in old)
    remarks = remarks_of(compilation, "reconstruct")
    assert {(remark.kind, remark.code) for remark in remarks} == {
        (Kind.MISSED, "not-reconstructed")
    }
    assert "so the block stays as it was" in remarks[0].reason
    assert compilation.records[-1].skipped == 5
    assert all(b["after"] == b["before"] for b in compilation.finetune["reconstruct"]["blocks"])


def test_later_blocks_are_fitted_to_what_earlier_ones_give(
    before: Compilation, after: Compilation
) -> None:
    """With the first blocks mended, the error that reaches the last is smaller to begin with."""
    short = fork(before)
    finetune = short.rules.finetune
    assert finetune.reconstruct != "none"
    settings = finetune.reconstruct.model_copy(update={"steps": 1, "lr": 1e-12, "scale_lr": 1e-12})
    rules = replace(
        short.rules,
        file=short.rules.file.model_copy(
            update={"finetune": finetune.model_copy(update={"reconstruct": settings})}
        ),
    )
    run_until(replace(short, rules=rules), "reconstruct")
    unmended = short.finetune["reconstruct"]["blocks"]
    mended = after.finetune["reconstruct"]["blocks"]
    assert mended[0]["before"] == unmended[0]["before"]
    assert mended[-1]["before"] < 0.9 * unmended[-1]["before"]


class Unit(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.unit = nn.Linear(32, 32), GeluMlp(32)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        return x + self.unit(x)


def test_what_the_user_froze_stays_frozen_but_for_compressed_weights() -> None:
    model = seeded(Unit)
    for name in ("stem.bias", "unit.up.weight"):
        model.get_parameter(name).requires_grad_(False)
    data = [noise(8, 4, 32, seed=seed) for seed in (1, 2)]
    compilation = prepared(EVERYTHING, model=model, inputs=noise(2, 4, 32), data=data)
    old = state(compilation)
    run_until(compilation, "reconstruct")
    new = state(compilation)
    assert torch.equal(old["stem.bias"], new["stem.bias"])
    assert not torch.equal(old["unit.up.weight"], new["unit.up.weight"])
    assert not torch.equal(old["unit.up.bias"], new["unit.up.bias"])


def test_it_fits_a_submodule_that_is_called_by_keyword() -> None:
    compilation = prepared(EVERYTHING, model=seeded(Detector), scope="backbone")
    run_until(compilation, "reconstruct")
    blocks = compilation.finetune["reconstruct"]["blocks"]
    assert len(blocks) == 3
    assert all(block["after"] < block["before"] for block in blocks)


def test_it_mends_a_dense_quantized_model_too() -> None:
    compilation = prepared({"id": "q", "match": {"op": "linear"}, "quantize": INT8}, CLASSIFIER)
    run_until(compilation, "reconstruct")
    blocks = compilation.finetune["reconstruct"]["blocks"]
    assert all(block["after"] < block["before"] for block in blocks)


@pytest.mark.parametrize(
    ("rules", "settings", "options", "reason"),
    [
        ((), SETTINGS, {"finetune": False}, "switched off (--no-finetune)"),
        ((), "none", {}, "switched off by the rules (finetune.reconstruct: none)"),
        (
            ({"id": "s", "match": {"op": "linear"}, "sparsity": SPARSE},),
            SETTINGS,
            {},
            "no layer is quantized",
        ),
    ],
)
def test_a_reconstruction_that_does_not_run_says_why(
    rules: Any, settings: Any, options: Any, reason: str
) -> None:
    compilation = prepared(*rules, reconstruct=settings, **options)
    run_until(compilation, "reconstruct")
    [remark] = remarks_of(compilation, "reconstruct")
    assert (remark.kind, remark.code) == (Kind.ANALYSIS, "reconstruct-skipped")
    assert remark.reason == reason
    report = compilation.finetune["reconstruct"]
    assert (report["stopped_by"], report["reason"], report["blocks"]) == ("skipped", reason, [])
    assert finetune_lines({"finetune": {"reconstruct": report}}) == [
        f"fine-tune reconstruct: {reason}"
    ]


def test_a_block_whose_outputs_are_not_finite_is_an_error(before: Compilation) -> None:
    compilation = fork(before)
    with torch.no_grad():
        compilation.ir.get_parameter("layers.1.between.bias").fill_(float("nan"))
    with pytest.raises(CheckFailed) as caught:
        run_until(compilation, "reconstruct")
    assert caught.value.code == "loss-not-finite"
    assert "block layers.1.feed.up .. layers.1.feed.down" in str(caught.value)


def test_where_the_teacher_has_no_counterpart_two_blocks_are_fitted_as_one(
    before: Compilation,
) -> None:
    """As after a pass that rewrote the operator: its node in the teacher has another name."""
    compilation = fork(before)
    dense = copy.deepcopy(before.dense_teacher)
    assert dense is not None
    adds = residual_adds(dense.graph, value_dependent(dense.graph))
    adds[0].name = "something_else"
    run_until(replace(compilation, dense_teacher=dense), "reconstruct")
    blocks = compilation.finetune["reconstruct"]["blocks"]
    assert [len(block["layers"]) for block in blocks] == [1, 4, 2, 2]
    assert all(block["after"] < block["before"] for block in blocks)


def test_it_needs_a_quantized_graph_and_may_follow_the_phase() -> None:
    start = ["permute", "tap", "sparsify", "finetune_sparse", "smooth"]
    ordered([*start, "quantize", "finetune_quantized", "reconstruct"])
    with pytest.raises(InputError, match="'reconstruct' comes too early"):
        ordered([*start, "reconstruct", "quantize", "finetune_quantized"])


def test_the_digits_are_recognized_again() -> None:
    """Real images without their labels: one-shot 2:4 INT8 loses a tenth of top-1."""
    pytest.importorskip("sklearn")
    digits = load_source("examples/digits_vit.py")
    assert digits.calibration_data is not None
    assert digits.eval_data is not None
    calibration = [inputs for inputs, _ in digits.calibration_data()][:3]
    held_out = list(digits.eval_data())
    [gemms] = [entry for entry in load_rules("int8").as_dict()["rules"] if entry["id"] == "gemms"]
    rules = {
        "version": 1,
        "extends": "int8",
        "rules": [{**gemms, "sparsity": SPARSE}],
        "finetune": {
            "sparse": "none",
            "quantize": "none",
            "reconstruct": {**SETTINGS, "steps": 8},
        },
    }
    compilation = begin(
        digits.module, digits.example_inputs, rules, data=calibration, finetune=True
    )
    run_until(compilation, "quantize")

    def top1() -> float:
        with torch.no_grad():
            pairs = [(compilation.ir(inputs), labels) for inputs, labels in held_out]
        right = sum(int((logits.argmax(dim=1) == labels).sum()) for logits, labels in pairs)
        return right / 360

    one_shot = top1()
    run_until(compilation, "reconstruct")
    assert one_shot < 0.93
    assert top1() > one_shot + 0.03
