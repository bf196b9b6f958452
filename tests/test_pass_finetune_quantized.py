"""finetune_quantized: the sparse model teaches the sparse quantized one, each tap by its W_j."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from gpusq_compile.compilation import Compilation
from gpusq_compile.finetune.taps import taps_of
from gpusq_compile.remarks import Kind
from gpusq_compile.sparsity import PATTERNS, violations
from tests.compilations import (
    INT8,
    SPARSE,
    TAPS,
    fork,
    make_rules,
    plans_of,
    remarks_of,
    run_until,
)
from tests.finetuning import DATA, begin_training

PRUNE = {"id": "s", "match": {"op": "linear"}, "sparsity": SPARSE}
QUANTIZE = {"id": "q", "match": {"op": "linear"}, "quantize": INT8}


def prepared(*rules: Any, phases: Any = None, **options: Any) -> Compilation:
    """Ready for the phase: activations are clipped hard, so that there is something to mend."""
    both = {"sparse": {"max_steps": 2}, "quantize": {"epochs": 4, "lr": 1e-3, "scale_lr": 1e-3}}
    document = make_rules(
        *rules,
        calibration={"activation": "percentile", "percentile": 90.0},
        finetune={"loss": {"alpha": 0}, **both, **(phases or {})},
    )
    return run_until(begin_training(document, **options), "quantize")


@pytest.fixture(scope="module")
def before() -> Compilation:
    return prepared(TAPS, PRUNE, QUANTIZE)


@pytest.fixture(scope="module")
def after(before: Compilation) -> Compilation:
    return run_until(fork(before), "finetune_quantized")


def test_it_brings_the_quantized_model_closer_to_the_sparse_one(
    before: Compilation, after: Compilation
) -> None:
    teacher = before.sparse_teacher
    assert teacher is not None
    errors = []
    with torch.no_grad():
        for compilation in (before, after):
            found = [
                (compilation.ir(inputs) - teacher(inputs)).square().mean() for inputs, _ in DATA
            ]
            errors.append(sum(found))
    assert errors[1] < errors[0]


def test_weights_and_scales_train_and_pruned_weights_stay_zero(
    before: Compilation, after: Compilation
) -> None:
    old, new = (dict(compilation.ir.named_parameters()) for compilation in (before, after))
    scales = [name for name in old if name.endswith(".log_scale")]
    assert len(scales) == 12
    assert not any(torch.equal(old[name], new[name]) for name in scales)
    for plan in plans_of(after).values():
        assert not torch.equal(old[plan.weight], new[plan.weight])
        assert violations(new[plan.weight], PATTERNS["2:4"]) == 0


def test_each_tap_counts_with_its_share_of_the_prune_loss(after: Compilation) -> None:
    report = after.finetune["quantize"]
    names = [tap.name for tap in taps_of(after.ir)]
    assert report["tap_weights"] == dict(zip(names, after.tap_weights or [], strict=True))
    assert sum(report["tap_weights"].values()) == pytest.approx(1.0)
    assert (report["steps"], report["stopped_by"]) == (12, "budget")
    [remark] = remarks_of(after, "finetune_quantized", Kind.PASSED)
    assert remark.reason == "12 steps, stopped by budget"


@pytest.mark.parametrize(
    ("rules", "phases", "options", "reason"),
    [
        ((TAPS, PRUNE, QUANTIZE), {}, {"finetune": False}, "switched off (--no-finetune)"),
        (
            (TAPS, PRUNE, QUANTIZE),
            {"quantize": "none"},
            {},
            "switched off by the rules (finetune.quantize: none)",
        ),
        ((TAPS, PRUNE), {}, {}, "no layer is quantized"),
    ],
)
def test_a_phase_that_does_not_run_says_why(
    rules: Any, phases: Any, options: Any, reason: str
) -> None:
    compilation = run_until(prepared(*rules, phases=phases, **options), "finetune_quantized")
    [remark] = remarks_of(compilation, "finetune_quantized")
    assert (remark.kind, remark.code, remark.reason) == (Kind.ANALYSIS, "finetune-skipped", reason)
    assert compilation.finetune["quantize"]["stopped_by"] == "skipped"
    assert compilation.records[-1].change == 0.0


def test_a_dense_quantized_model_is_tuned_too() -> None:
    """Nothing was pruned, so the taps count alike."""
    compilation = run_until(prepared(TAPS, QUANTIZE, steps=1), "finetune_quantized")
    assert compilation.finetune["sparse"]["stopped_by"] == "skipped"
    assert compilation.finetune["quantize"]["steps"] == 1
    assert compilation.tap_weights == [1 / 3] * 3
