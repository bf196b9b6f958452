"""Products and attention have one form after canonicalize, and the model computes the same."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.compilations import begin, make_rules, outputs, plans_of, run_until, targets
from tests.models import noise, seeded

ANYTHING = make_rules({"id": "all", "match": {"name": "**"}, "quantize": "none"})


class Products(nn.Module):
    """Two linears, so that there is a layer to speak about, and `compute` between them."""

    def __init__(self, compute: Callable[[Products, Tensor], Tensor]) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(16, 16), nn.Linear(16, 16)
        self.compute = compute
        self.stored = nn.Parameter(torch.eye(16) + 0.1)
        self.bias = nn.Parameter(torch.ones(16))

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.compute(self, self.first(x)))


def heads(x: Tensor) -> Tensor:
    return x.unflatten(-1, (4, 4)).transpose(1, 2)


def attend(x: Tensor, *axes: int, mask: Tensor | None = None) -> Tensor:
    y = x.unflatten(1, axes) if axes else x
    return F.scaled_dot_product_attention(y, y.cos(), y.sin(), attn_mask=mask).reshape(x.shape)


Compute = Callable[[Products, Tensor], Tensor]
REWRITTEN: dict[str, tuple[Compute, str, str]] = {
    "baddbmm": (
        lambda m, x: torch.baddbmm(m.stored[:8, :8], x, x.transpose(1, 2)) @ x,
        "aten.baddbmm.default",
        "aten.matmul.default",
    ),
    "baddbmm with factors": (
        lambda m, x: torch.baddbmm(m.stored[:8, :8], x, x.mT, beta=0.5, alpha=2) @ x,
        "aten.baddbmm.default",
        "aten.matmul.default",
    ),
    "baddbmm without its first": (
        lambda m, x: torch.baddbmm(m.stored[:8, :8] / 0, x, x.mT, beta=0) @ x,
        "aten.baddbmm.default",
        "aten.matmul.default",
    ),
    "einsum of scores": (
        lambda m, x: torch.einsum("bhid,bhjd->bhij", heads(x), heads(x)).sum(1) @ x,
        "aten.einsum.default",
        "aten.matmul.default",
    ),
    "einsum that turns": (
        lambda m, x: torch.einsum("bid,bjd->jbi", x, x).permute(1, 2, 0) @ x,
        "aten.einsum.default",
        "aten.matmul.default",
    ),
    "einsum with an ellipsis": (
        lambda m, x: torch.einsum("...id,...jd->...ij", heads(x), heads(x)).sum(1) @ x,
        "aten.einsum.default",
        "aten.matmul.default",
    ),
    "einsum with a weight": (
        lambda m, x: torch.einsum("bnd,dc->bnc", x, m.stored),
        "aten.einsum.default",
        "aten.linear.default",
    ),
    "einsum with a transposed weight": (
        lambda m, x: torch.einsum("bhnd,cd->bhnc", heads(x).repeat(1, 1, 1, 4), m.stored).sum(1),
        "aten.einsum.default",
        "aten.linear.default",
    ),
    "einsum with the weight in front": (
        lambda m, x: torch.einsum("cd,bnd->bnc", m.stored, x),
        "aten.einsum.default",
        "aten.linear.default",
    ),
    "einsum without an arrow": (
        lambda m, x: torch.einsum("bnd,dz", x, m.stored),
        "aten.einsum.default",
        "aten.linear.default",
    ),
    "tensordot of two axes": (
        lambda m, x: torch.tensordot(x, x, dims=([0, 2], [0, 2])) @ x,
        "aten.tensordot.default",
        "aten.einsum.default",
    ),
    "tensordot with a weight": (
        lambda m, x: torch.tensordot(x, m.stored, dims=1),
        "aten.tensordot.default",
        "aten.linear.default",
    ),
    "product with a transposed weight": (
        lambda m, x: x @ m.stored.T,
        "aten.matmul.default",
        "aten.linear.default",
    ),
    "product with a weight": (
        lambda m, x: x @ m.stored,
        "aten.matmul.default",
        "aten.linear.default",
    ),
    "addmm": (
        lambda m, x: torch.addmm(m.bias, x.flatten(0, 1), m.stored.t()).reshape(x.shape),
        "aten.addmm.default",
        "aten.linear.default",
    ),
    "addmm with factors": (
        lambda m, x: torch.addmm(m.bias, x[0], m.stored, beta=0.5, alpha=2)[None],
        "aten.addmm.default",
        "aten.linear.default",
    ),
    "addmm with a number for each place": (
        lambda m, x: torch.addmm(x[1], x[0], m.stored)[None],
        "aten.addmm.default",
        "aten.linear.default",
    ),
    "product with a weight in front": (
        lambda m, x: m.stored @ x.repeat(1, 2, 1),
        "aten.matmul.default",
        "aten.linear.default",
    ),
    "product with a transposed weight in front": (
        lambda m, x: (m.stored.T @ x.mT).mT,
        "aten.matmul.default",
        "aten.linear.default",
    ),
}
KEPT: dict[str, tuple[Compute, str]] = {
    "einsum of three": (
        lambda m, x: torch.einsum("bid,bjd,bjk->bik", x, x, x),
        "aten.einsum.default",
    ),
    "einsum of a diagonal": (
        lambda m, x: torch.einsum("bii,bid->bid", x[:, :, :8], x),
        "aten.einsum.default",
    ),
    "einsum over two": (
        lambda m, x: torch.einsum("bid,bid->b", x, x)[:, None, None] * x,
        "aten.einsum.default",
    ),
    "product with a buffer": (lambda m, x: x @ torch.eye(16), "aten.matmul.default"),
}


def canonical(compute: Compute) -> tuple[list[str], list[str], float]:
    """What is called before and after canonicalize, and the largest change of the outputs."""
    model = seeded(Products, compute)
    compilation = run_until(begin(model, noise(2, 8, 16), ANYTHING), "trace")
    before, old = targets(compilation), outputs(compilation)[0]
    after = targets(run_until(compilation, "canonicalize"))
    return before, after, float((outputs(compilation)[0] - old).abs().max())


@pytest.mark.parametrize("case", REWRITTEN)
def test_a_product_is_written_in_its_one_form(case: str) -> None:
    compute, gone, new = REWRITTEN[case]
    before, after, change = canonical(compute)
    assert gone in before
    assert before.count(gone) > after.count(gone)
    assert after.count(new) > before.count(new)
    assert change < 1e-4


@pytest.mark.parametrize(
    ("weight", "equation", "operator"),
    [
        ((16, 16), "bnd,dc->bnc", "linear"),
        ((16, 2, 16), "bnd,dhc->bnhc", "einsum"),
        ((1, 16), "bnd,ed->bn", "einsum"),
    ],
)
def test_an_einsum_over_two_axes_of_any_size_is_a_linear_where_it_needs_no_reshape(
    weight: tuple[int, ...], equation: str, operator: str
) -> None:
    def compute(m: Products, x: Tensor) -> Tensor:
        y = torch.einsum(equation, x, m.other)
        return y[:, :, 0] if y.ndim == 4 else y if y.ndim == 3 else y[..., None] * x

    def build() -> Products:
        model = Products(compute)
        model.other = nn.Parameter(torch.randn(weight))
        return model

    sizes = ({0: torch.export.Dim("batch"), 1: torch.export.Dim("tokens")},)
    compilation = begin(seeded(build), noise(2, 8, 16), ANYTHING)
    compilation.source = replace(compilation.source, dynamic_shapes=sizes)
    before, old = targets(run_until(compilation, "trace")), outputs(compilation)[0]
    after = targets(run_until(compilation, "canonicalize"))
    assert f"aten.{operator}.default" in after
    assert ("aten.einsum.default" in after) == (operator == "einsum")
    assert "aten.einsum.default" in before
    torch.testing.assert_close(outputs(compilation)[0], old)


@pytest.mark.parametrize("case", KEPT)
def test_what_is_no_batch_of_matrix_products_stays(case: str) -> None:
    compute, kept = KEPT[case]
    before, after, change = canonical(compute)
    assert before.count(kept) == after.count(kept) > 0
    assert change < 1e-4


def test_a_product_with_a_stored_weight_is_a_layer_with_its_name() -> None:
    model = seeded(Products, REWRITTEN["addmm"][0])
    marked = run_until(begin(model, noise(2, 8, 16), make_rules()), "mark")
    plan = plans_of(marked)["stored"]
    assert (plan.op, plan.weight, plan.reasons) == ("linear", "stored", ())
    assert plan.quantize is not None


MASK = torch.zeros(2, 2).masked_fill(torch.tensor([[False, True], [False, False]]), -9.0)
RANKS: dict[str, tuple[Compute, int | None]] = {
    "three axes": (lambda m, x: attend(x), 4),
    "three axes, masked": (lambda m, x: attend(x, mask=torch.zeros(x.shape[0], 8, 8)), 4),
    "five axes": (lambda m, x: attend(x, 2, 2, 2), 4),
    "five axes, masked": (lambda m, x: attend(x, 2, 2, 2, mask=MASK), 4),
    "five axes, masked apart": (
        lambda m, x: attend(x, 2, 2, 2, mask=MASK * torch.arange(2.0).view(2, 1, 1, 1)),
        None,
    ),
}


@pytest.mark.parametrize("case", RANKS)
def test_fused_attention_has_four_axes_or_is_spelled_out(case: str, tmp_path: Path) -> None:
    compute, axes = RANKS[case]
    model = seeded(Products, compute)
    compilation = run_until(begin(model, noise(2, 8, 16), ANYTHING, tmp_path), "trace")
    old = outputs(compilation)[0]
    run_until(compilation, "canonicalize")
    graph = compilation.ir.graph
    fused = [n.meta["val"].ndim for n in graph.nodes if "scaled_dot_product" in str(n.target)]
    assert fused == ([axes] if axes else [])
    torch.testing.assert_close(outputs(compilation)[0], old, rtol=0, atol=1e-5)
    exported = run_until(compilation, "verify_onnx")
    assert exported.verify["ok"]
