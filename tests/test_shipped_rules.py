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

COMPILED = [name for name in shipped_rules() if "/" not in name]


@pytest.fixture(autouse=True)
def fewer_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    """How good the orders are is not the question here."""
    monkeypatch.setattr("gpusq_compile.permutation.MAX_ROUNDS", 8)


def check(compilation: Compilation, name: str, gemms: int) -> None:
    """The planned layers are in the file's pattern, in the stored model too, and verified."""
    run_until(compilation, "verify_onnx")
    assert compilation.verify["ok"] is True
    plans = plans_of(compilation)
    done = {layer: plan for layer, plan in plans.items() if plan.applied != Treatment()}
    found: Counter[tuple[str | None, str]] = Counter()
    for layer, plan in done.items():
        stored, kind = compilation.stored[layer], execution(plan, "fp16").kind
        assert not stored.faults
        assert stored.mask_ok is (None if plan.applied.sparsity is None else True)
        if "patch_embed" in plan.roles:
            assert plan.applied.sparsity == "2:4"
            assert kind.startswith("sparse")
        else:
            found[plan.applied.sparsity, kind] += 1
    assert found == {FILES[name]: gemms}
    outputs = {plan.applied.output for plan in done.values()}
    assert (None in outputs) == (FILES[name][1] != "sparse int8")
    remarks = remarks_of(compilation, "mark", Kind.ANALYSIS)
    unused = [remark for remark in remarks if remark.code == "no-sparse-kernel"]
    assert len(unused) == (gemms if name == "int4-pairwise" else 0)
    assert "no-sparse-int4" not in {remark.code for remark in remarks}


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
        gemms=1 if "weight-only" in name else 4,
    )


@pytest.mark.parametrize("name", COMPILED)
def test_the_example_compiles_by_each_file(name: str, tmp_path: Path) -> None:
    spec = importlib.util.spec_from_file_location("digits_vit", EXAMPLE)
    assert spec is not None
    assert spec.loader is not None
    digits = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(digits)
    data = list(digits.calibration_data())[:2]
    compilation = begin(digits.model(), digits.example_inputs(), name, tmp_path, data=data)
    check(compilation, name, gemms=4 if "weight-only" in name else 16)
