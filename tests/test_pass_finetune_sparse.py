"""finetune_sparse: the dense model teaches the sparse one; without it, the reason is told."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from gpusq_compile.compilation import Compilation
from gpusq_compile.finetune.taps import taps_of
from gpusq_compile.remarks import Kind
from gpusq_compile.sparsity import PATTERNS, Mask, violations
from tests.compilations import (
    INT8,
    SPARSE,
    TAPS,
    begin,
    fork,
    make_rules,
    outputs,
    plans_of,
    remarks_of,
    run_until,
)
from tests.finetuning import DATA, begin_training
from tests.models import Shape, TinyViT, images, seeded

ALL = {"op": "linear"}
PRUNE = {"id": "s", "match": ALL, "sparsity": SPARSE}
QUANTIZE = {"id": "q", "match": ALL, "quantize": INT8}


def tuned(*rules: Any, finetune: Any = None, **options: Any) -> Compilation:
    document = make_rules(
        *rules, finetune={"sparse": {"epochs": 2, "lr": 1e-3}, **(finetune or {})}
    )
    return run_until(begin_training(document, **options), "finetune_sparse")


@pytest.fixture(scope="module")
def compiled() -> Compilation:
    return tuned(TAPS, PRUNE, QUANTIZE)


def stored(compilation: Compilation) -> dict[str, Tensor]:
    return {
        name: compilation.ir.get_parameter(plan.weight).detach()
        for name, plan in plans_of(compilation).items()
    }


def test_the_stored_weights_are_sparse_afterwards_and_trained(compiled: Compilation) -> None:
    original = seeded(TinyViT, Shape(depth=1))
    for name, weight in stored(compiled).items():
        assert violations(weight, PATTERNS["2:4"]) == 0, name
    kept = stored(compiled)["layers.0.feed.up"]
    dense = original.layers[0].feed.up.weight.detach()
    assert not torch.equal(kept[kept != 0], dense[kept != 0])


def test_it_brings_the_sparse_model_closer_to_the_dense_one(compiled: Compilation) -> None:
    dense = seeded(TinyViT, Shape(depth=1))
    untrained = tuned(TAPS, PRUNE, QUANTIZE, **{"finetune": {"sparse": "none"}})
    batch = images(16, seed=5)
    with torch.no_grad():
        expected = dense(batch)
        before = (untrained.ir(batch) - expected).square().mean()
        after = (compiled.ir(batch) - expected).square().mean()
    assert after < before


def test_the_report_says_how_it_went(compiled: Compilation) -> None:
    report = compiled.finetune["sparse"]
    assert (report["steps"], report["stopped_by"], report["images"]) == (6, "budget", 48)
    assert [point["step"] for point in report["loss"]] == [1, 2, 3, 4, 5, 6]
    assert set(report["loss"][0]) == {"step", "total", "hard", "soft", "feature"}
    assert report["settings"]["lr"] == 1e-3
    [remark] = remarks_of(compiled, "finetune_sparse", Kind.PASSED)
    assert remark.reason == "6 steps, stopped by budget"


def test_the_tap_weights_of_the_next_phase_are_found_here(compiled: Compilation) -> None:
    weights = compiled.tap_weights
    assert weights is not None
    assert len(weights) == len(taps_of(compiled.ir)) == 3
    assert sum(weights) == pytest.approx(1.0)
    assert len(set(weights)) == 3
    [remark] = remarks_of(compiled, "finetune_sparse", Kind.ANALYSIS)
    assert remark.code == "tap-weights"


def test_uniform_tap_weights_are_all_alike() -> None:
    compilation = tuned(TAPS, PRUNE, QUANTIZE, finetune={"tap_weights": "uniform"}, steps=1)
    assert compilation.tap_weights == [1 / 3] * 3


@pytest.mark.parametrize("tap_weights", ["uniform", "prune_loss"])
def test_rules_without_taps_train_on_the_logits_alone(tap_weights: str) -> None:
    compilation = tuned(PRUNE, QUANTIZE, finetune={"tap_weights": tap_weights}, steps=1)
    assert compilation.tap_weights == []
    assert compilation.finetune["sparse"]["loss"][0]["feature"] == 0.0


@pytest.mark.parametrize(
    ("rules", "finetune", "options", "reason"),
    [
        ((TAPS, PRUNE), {}, {"finetune": False}, "switched off (--no-finetune)"),
        (
            (TAPS, PRUNE),
            {"sparse": "none"},
            {},
            "switched off by the rules (finetune.sparse: none)",
        ),
        ((TAPS, QUANTIZE), {"quantize": "none"}, {}, "no layer is sparse"),
    ],
)
def test_a_phase_that_does_not_run_says_why(
    rules: Any, finetune: Any, options: Any, reason: str
) -> None:
    document = make_rules(*rules, finetune=finetune)
    chosen = {"finetune": True, "train_data": DATA, "data": DATA, **options}
    compilation = begin(seeded(TinyViT, Shape(depth=1)), images(2), document, **chosen)
    run_until(compilation, "finetune_sparse")
    [remark] = remarks_of(compilation, "finetune_sparse")
    assert (remark.kind, remark.code, remark.reason) == (Kind.ANALYSIS, "finetune-skipped", reason)
    report = compilation.finetune["sparse"]
    assert (report["steps"], report["loss"], report["stopped_by"]) == (0, [], "skipped")
    assert report["reason"] == reason
    assert compilation.tap_weights is None
    # The weights are pruned in storage all the same, and the function is that of the masks.
    assert compilation.records[-1].change == 0.0
    for plan in plans_of(compilation).values():
        weight = compilation.ir.get_parameter(plan.weight)
        assert violations(weight, PATTERNS["2:4"]) == 0 or plan.applied.sparsity is None


def test_masks_are_what_they_were_before(compiled: Compilation) -> None:
    fresh = tuned(TAPS, PRUNE, QUANTIZE, **{"finetune": {"sparse": "none"}})

    def masks(compilation: Compilation) -> list[Tensor]:
        return [m.mask for m in compilation.ir.modules() if isinstance(m, Mask)]

    assert all(torch.equal(a, b) for a, b in zip(masks(compiled), masks(fresh), strict=True))
    assert outputs(fork(compiled))[0].isfinite().all()
