"""Every shipped rules file compiles whole models, and the engine's part is what its text says."""

from __future__ import annotations

import importlib.util
from collections import Counter
from pathlib import Path

import pytest

from gpusq_compile.compilation import Compilation
from gpusq_compile.execution import execution
from gpusq_compile.plan import Treatment
from gpusq_compile.remarks import Kind
from gpusq_compile.rules import shipped_rules
from tests.compilations import begin, plans_of, remarks_of, run_until
from tests.models import Shape, TinyViT, images, labelled, seeded

EXAMPLE = Path(__file__).resolve().parents[1] / "examples" / "digits_vit.py"
FILES = {
    "int8": ("2:4", "sparse int8"),
    "int8-attention": ("2:4", "sparse int8"),
    "int4": ("portable", "sparse int8"),
    "int4-a8": ("portable", "sparse int8"),
    "int4-pairwise": ("pair4:8", "dense int8"),
    "int4-weight-only": (None, "weight-only int4"),
    "sparse-fp16": ("2:4", "sparse fp16"),
}
"""The pattern of each file's GEMMs, and what the engine makes of them. The patch embedding of the
INT4 files is 8-bit, in 2:4."""

LONG_ENOUGH = {"int4-weight-only": (1, 4)}
"""Where not all GEMMs of the two networks below fit: those that have two blocks or more."""

TARGETS = ("portable",)

COMPILED = [name for name in shipped_rules() if "/" not in name]


@pytest.fixture(autouse=True)
def fewer_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    """How good the orders are is not the question here."""
    monkeypatch.setattr("gpusq_compile.permutation.MAX_ROUNDS", 8)


def check(compilation: Compilation, name: str, gemms: int) -> None:
    """The planned layers are in the file's pattern, in the stored model too, and verified."""
    run_until(compilation, "verify_onnx")
    assert compilation.verify["ok"] is True
    pattern, kind = FILES[name]
    plans = plans_of(compilation)
    done = {layer: plan for layer, plan in plans.items() if plan.applied != Treatment()}
    assert all(compilation.stored[layer].mask_ok is (pattern is not None or None) for layer in done)
    assert not any(compilation.stored[layer].faults for layer in done)
    embedded = {layer: plan for layer, plan in done.items() if "patch_embed" in plan.roles}
    if pattern is None:
        embedded = {}
    for plan in embedded.values():
        assert plan.applied.sparsity == "2:4"
        assert execution(plan, "fp16", TARGETS).kind == (
            "sparse fp16" if "fp16" in name else "sparse int8"
        )
    found = Counter(
        (plan.applied.sparsity, execution(plan, "fp16", TARGETS).kind)
        for layer, plan in done.items()
        if layer not in embedded
    )
    assert found == {(pattern, kind): gemms}
    remarked = {r.layer for r in remarks_of(compilation, "mark", Kind.ANALYSIS)}
    assert remarked == (set(done) - set(embedded) if kind.startswith("dense") else set())


def test_each_shipped_file_is_tried() -> None:
    assert set(COMPILED) == set(FILES)


@pytest.mark.parametrize("name", COMPILED)
def test_a_small_network_compiles_by_each_file(name: str, tmp_path: Path) -> None:
    model = seeded(TinyViT, Shape(depth=1, dim=64))
    # The logits of random weights lie close together: which is the largest says nothing.
    rules = {"version": 1, "extends": name, "verify": {"min_top1_agreement": 0.5}}
    check(
        begin(model, images(4), rules, tmp_path, data=labelled(2)),
        name,
        LONG_ENOUGH.get(name, (4, 16))[0],
    )


@pytest.mark.parametrize("name", [n for n in COMPILED if n != "int8-attention"])
def test_a_scope_of_one_layer_compiles_by_each_file(name: str, tmp_path: Path) -> None:
    model = seeded(TinyViT, Shape(depth=1, dim=128))
    scope = "layers.0.feed.up"
    compilation = begin(model, images(4), {"version": 1, "extends": name}, tmp_path, scope=scope)
    [plan] = plans_of(run_until(compilation, "mark")).values()
    assert plan.sparsity or plan.quantize
    assert not remarks_of(compilation, "mark", Kind.MISSED)


@pytest.mark.parametrize("name", COMPILED)
def test_the_example_compiles_by_each_file(name: str, tmp_path: Path) -> None:
    spec = importlib.util.spec_from_file_location("digits_vit", EXAMPLE)
    assert spec is not None
    assert spec.loader is not None
    digits = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(digits)
    data = list(digits.calibration_data())[:2]
    compilation = begin(digits.model(), digits.example_inputs(), name, tmp_path, data=data)
    check(compilation, name, LONG_ENOUGH.get(name, (4, 16))[1])
