"""The order of the compressing passes: every legal one compiles, every other is an error that says
why and where."""

from __future__ import annotations

from itertools import permutations
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from gpusq_compile.api import compile_model
from gpusq_compile.driver import run_passes
from gpusq_compile.errors import InputError
from gpusq_compile.language.loader import load_rules
from gpusq_compile.language.schema import DEFAULT_ORDER
from gpusq_compile.passes import COMPRESSION, PIPELINE, ordered
from gpusq_compile.remarks import Kind
from tests.compilations import INT8, SPARSE, TAPS, begin, make_rules, plans_of, remarks_of
from tests.models import Shape, TinyViT, images, labelled, seeded

BEFORE = [
    ("permute", "sparsify"),
    ("tap", "sparsify"),
    ("sparsify", "finetune_sparse"),
    ("finetune_sparse", "quantize"),
    ("smooth", "quantize"),
    ("quantize", "reconstruct"),
    ("quantize", "finetune_quantized"),
]
"""What has to come before what; everything else is free, or follows from these."""

ORDERS = {
    "default": DEFAULT_ORDER,
    "smooth first": [
        "smooth",
        "permute",
        "tap",
        "sparsify",
        "finetune_sparse",
        "quantize",
        "reconstruct",
        "finetune_quantized",
    ],
    "permute after smooth and tap": [
        "tap",
        "smooth",
        "permute",
        "sparsify",
        "finetune_sparse",
        "quantize",
        "reconstruct",
        "finetune_quantized",
    ],
    "smooth between pruning and training": [
        "tap",
        "permute",
        "sparsify",
        "smooth",
        "finetune_sparse",
        "quantize",
        "finetune_quantized",
        "reconstruct",
    ],
}


def is_legal(order: tuple[str, ...]) -> bool:
    return all(order.index(first) < order.index(second) for first, second in BEFORE)


def everything(**rest: Any) -> dict[str, Any]:
    """Rules that give each of the passes something to do."""
    rule = {
        "id": "gemms",
        "match": {"op": "linear"},
        "sparsity": {**SPARSE, "permute": True},
        "quantize": {**INT8, "smooth": 0.5},
    }
    head = {"id": "head", "match": {"role": "classifier"}, "sparsity": "none", "quantize": "none"}
    return make_rules(rule, head, TAPS, **rest)


@settings(max_examples=300, deadline=None)
@given(st.permutations(DEFAULT_ORDER))
def test_an_order_is_legal_or_refused_with_its_reason(order: list[str]) -> None:
    if is_legal(tuple(order)):
        steps = [step.name for step in ordered(order)]
        assert [name for name in steps if name in COMPRESSION] == order
        assert sorted(steps) == sorted(step.name for step in PIPELINE)
    else:
        with pytest.raises(InputError) as caught:
            ordered(order)
        assert caught.value.code == "pass-order"


def test_every_legal_order_is_accepted() -> None:
    legal = [order for order in permutations(DEFAULT_ORDER) if is_legal(order)]
    assert len(legal) == 20
    for order in legal:
        assert tuple(step.name for step in ordered(order) if step.name in COMPRESSION) == order


def test_the_default_order_is_that_of_the_rules_language() -> None:
    assert tuple(COMPRESSION) == DEFAULT_ORDER
    assert ordered(DEFAULT_ORDER) == PIPELINE


# --- illegal orders, as a person meets them -----------------------------------------------------


def swapped(first: str, second: str) -> list[str]:
    """The default order with `second` moved right in front of `first`."""
    names: list[str] = [name for name in DEFAULT_ORDER if name != second]
    names.insert(names.index(first), second)
    return names


ILLEGAL = [
    (
        swapped("permute", "sparsify"),
        "'sparsify' comes too early: it needs what 'tap' makes ('tapped')",
    ),
    (
        ["tap", "sparsify", "permute", *DEFAULT_ORDER[3:]],
        "'permute' comes too late: the order is there for the mask, which has been chosen by then",
    ),
    (
        ["permute", "tap", "finetune_sparse", "sparsify", *DEFAULT_ORDER[4:]],
        "'finetune_sparse' comes too early: it needs what 'sparsify' makes ('sparse')",
    ),
    (
        swapped("tap", "quantize"),
        "'quantize' comes too early: it needs what 'sparsify' makes ('sparse')",
    ),
    (
        swapped("finetune_sparse", "quantize"),
        "'finetune_sparse' comes too late: the sparse model is the float teacher of the quantized",
    ),
    (
        swapped("smooth", "quantize"),
        "'smooth' comes too late: the scales that are there were calibrated",
    ),
    (
        swapped("quantize", "reconstruct"),
        "'reconstruct' comes too early: it needs what 'quantize' makes ('quantized')",
    ),
    (
        swapped("quantize", "finetune_quantized"),
        "'finetune_quantized' comes too early: it needs what 'quantize' makes ('quantized')",
    ),
]


@pytest.mark.parametrize(("order", "reason"), ILLEGAL, ids=[reason[:40] for _, reason in ILLEGAL])
def test_an_illegal_order_says_why_and_where_it_was_written(
    order: list[str], reason: str, tmp_path: Path
) -> None:
    file = tmp_path / "rules.yaml"
    file.write_text(f"version: 1\nextends: int8\npasses: [{', '.join(order)}]\n")
    with pytest.raises(InputError) as caught:
        compile_model(seeded(TinyViT), (images(2),), rules=file, engine="none", finetune=False)
    error = caught.value
    assert error.code == "pass-order"
    assert reason in error.message
    assert error.hint == f"the default order is {', '.join(DEFAULT_ORDER)}"
    assert str(error.location) == f"{file}:3:9"
    assert str(error).startswith(f"{file}:3:9: error[pass-order]: passes: ")


def test_a_missing_pass_is_named(tmp_path: Path) -> None:
    file = tmp_path / "rules.yaml"
    file.write_text("version: 1\nextends: int8\npasses: [permute, tap, sparsify]\n")
    with pytest.raises(InputError) as caught:
        compile_model(seeded(TinyViT), (images(2),), rules=file, engine="none", finetune=False)
    assert caught.value.code == "pass-missing"
    assert "'finetune_sparse' is not in the list" in caught.value.message
    assert str(caught.value.location) == f"{file}:3:9"


def test_a_pass_that_is_named_twice_is_refused(tmp_path: Path) -> None:
    names = [*DEFAULT_ORDER, "smooth"]
    file = tmp_path / "rules.yaml"
    file.write_text(f"version: 1\nextends: int8\npasses: [{', '.join(names)}]\n")
    with pytest.raises(InputError, match="smooth is listed twice") as caught:
        load_rules(file)
    assert str(caught.value.location).startswith(f"{file}:3:")
    # Python callers that skip the rules language meet the same refusal.
    with pytest.raises(InputError, match="'smooth' stands in the list twice") as direct:
        ordered(names)
    assert direct.value.code == "pass-twice"


# --- real runs ----------------------------------------------------------------------------------


def test_a_rules_file_decides_the_order_that_runs(tmp_path: Path) -> None:
    order = ORDERS["permute after smooth and tap"]
    result = compile_model(
        seeded(TinyViT, Shape(depth=1)),
        (images(2),),
        rules=everything(passes=order),
        train_data=labelled(2),
        steps=1,
        engine="none",
        output=tmp_path / "out",
    )
    ran = [step["name"] for step in result.report["passes"] if step["name"] in COMPRESSION]
    assert ran == order
    assert result.report["verify"]["ok"]


@pytest.mark.parametrize("name", ORDERS)
def test_every_pass_keeps_its_promise_in_every_order(name: str) -> None:
    model = seeded(TinyViT, Shape(depth=1))
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.LayerNorm):
                module.weight[::7] *= 10
    compilation = begin(model, images(2), everything(passes=list(ORDERS[name])))
    steps = ordered(compilation.rules.file.passes)
    until = next(i for i, step in enumerate(steps) if step.name == "fold")
    # The driver fails where permute, smooth or tap change the outputs.
    run_passes(compilation, steps[: until + 1])
    assert len(remarks_of(compilation, "permute", Kind.PASSED)) == 2
    assert len(remarks_of(compilation, "smooth", Kind.PASSED)) == 2
    plans = [plan for plan in plans_of(compilation).values() if plan.name != "logits"]
    assert all((p.applied.sparsity, p.applied.weight) == ("2:4", "int8") for p in plans)
    assert len(remarks_of(compilation, "tap", Kind.PASSED)) == 3
    changes = {record.name: record.change for record in compilation.records}
    assert all(0 <= (changes[step] or 0) < 1e-5 for step in ("permute", "tap", "smooth"))
