"""MACs, bit operations and equivalent FLOPs are those that a hand or a paper counts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gpusq_compile.compilation import Compilation
from gpusq_compile.compute import ComputeEntry, compute_figures
from tests.attentions import ATTENTION_INT8, Around, Mixer, spelled_out
from tests.compilations import (
    INT8,
    SPARSE,
    begin,
    make_rules,
    plan_of,
    plans_of,
    run_until,
    targets,
)
from tests.models import CLASSES, TinyViT


def counted(model: nn.Module, *inputs: Tensor) -> dict[str, ComputeEntry]:
    compilation = run_until(begin(model, inputs, make_rules(), Path("unused")), "trace")
    return by_name(compilation)


def by_name(compilation: Compilation, precision: str = "fp16") -> dict[str, ComputeEntry]:
    figures = compute_figures(compilation.ir, precision)
    return {entry.name: entry for entry in figures.entries}


class Products(nn.Module):
    """Attention spelled out, in every form that a product can be written in."""

    def __init__(self, form: str) -> None:
        super().__init__()
        self.form = form
        self.qk = nn.Linear(8, 12)

    def forward(self, x: Tensor) -> Tensor:
        q, k = self.qk(x).split(6, dim=-1)
        if self.form == "bmm":
            scores = torch.bmm(q, k.transpose(1, 2))
        elif self.form == "baddbmm":
            scores = torch.baddbmm(torch.zeros(1, 1, 1), q, k.transpose(1, 2))
        elif self.form == "einsum":
            scores = torch.einsum("bnc,bmc->bnm", q, k)
        elif self.form == "einsum_ellipsis":
            scores = torch.einsum("...nc,...mc->...nm", q, k)
        else:
            scores = q @ k.transpose(1, 2)
        return scores.softmax(dim=-1)


@pytest.mark.parametrize("form", ["matmul", "bmm", "baddbmm", "einsum", "einsum_ellipsis"])
def test_products_of_two_activations_are_counted_in_every_form(form: str) -> None:
    found = list(counted(Products(form), torch.randn(4, 5, 8)).values())
    assert [(e.kind, e.macs) for e in found] == [
        ("gemm", 5 * 8 * 12),
        ("attention", 5 * 5 * 6),
    ]


class Convolutions(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.plain = nn.Conv2d(3, 8, 3, padding=1)
        self.same = nn.Conv2d(8, 8, 3, padding="same")
        self.depthwise = nn.Conv2d(8, 8, 3, stride=2, padding=1, groups=8)
        self.up = nn.ConvTranspose2d(8, 4, 2, stride=2)
        self.table = nn.Linear(6, 6)
        self.register_buffer("constant", torch.ones(1, 6))
        self.scores = nn.Parameter(torch.randn(16, 5))

    def forward(self, x: Tensor) -> Tensor:
        x = self.up(self.depthwise(self.same(self.plain(x))))
        x = x.flatten(2) + self.table(self.constant).sum()
        return x.mean(dim=1)[:, :16] @ self.scores


def test_convolutions_count_positions_and_what_depends_on_no_input_is_left_out() -> None:
    found = {
        name: (e.kind, e.macs)
        for name, e in counted(Convolutions(), torch.randn(2, 3, 10, 10)).items()
    }
    assert found.pop("plain") == ("gemm", 100 * 8 * 3 * 9)
    assert found.pop("same") == ("gemm", 100 * 8 * 8 * 9)
    assert found.pop("depthwise") == ("gemm", 25 * 8 * 9)
    assert found.pop("up") == ("gemm", 25 * 8 * 4 * 4)
    # A matmul with a parameter is a GEMM like any other; the linear of a constant runs once.
    assert list(found.values()) == [("gemm", 16 * 5)]


class Rare(nn.Module):
    """Convolutions in the words of the operator behind them all, and of three axes."""

    def __init__(self) -> None:
        super().__init__()
        self.plain = nn.Parameter(torch.randn(6, 3, 3, 3))
        self.transposed = nn.Parameter(torch.randn(6, 4, 2, 2))
        self.volume = nn.ConvTranspose3d(1, 2, 2, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        one, zero, two = (1, 1), (0, 0), (2, 2)
        x = torch.convolution(x, self.plain, None, one, one, one, False, zero, 1)
        x = torch.convolution(x, self.transposed, None, two, zero, one, True, zero, 1)
        return self.volume(x.unsqueeze(1))


def test_convolutions_are_counted_in_every_form() -> None:
    found = [(e.kind, e.macs) for e in counted(Rare(), torch.randn(2, 3, 8, 8)).values()]
    assert found == [
        ("gemm", 64 * 6 * 3 * 9),
        ("gemm", 64 * 6 * 4 * 4),
        ("gemm", 4 * 16 * 16 * 2 * 8),
    ]


def test_a_convolution_that_only_adds_patches_multiplies_nothing() -> None:
    class Folded(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.values = nn.Linear(16, 18)

        def forward(self, x: Tensor) -> Tensor:
            return F.fold(self.values(x).transpose(1, 2), (4, 4), 3, padding=1)

    model = begin(Folded(), torch.randn(2, 16, 16), make_rules(), Path("unused"))
    compilation = run_until(model, "canonicalize")
    assert "aten.convolution.default" in targets(compilation)
    assert [entry.macs for entry in by_name(compilation).values()] == [16 * 16 * 18]


def test_figures_are_per_sample_whatever_the_batch() -> None:
    torch.manual_seed(0)
    two, six = (
        {n: e.macs for n, e in counted(TinyViT(), torch.randn(b, 2, 8, 8)).items()} for b in (2, 6)
    )
    assert two == six
    dim, tokens = 32, 4
    assert sum(two.values()) == (
        tokens * 2 * 16 * dim  # patches of 4 x 4 pixels of two channels
        + 2 * tokens * (3 * dim + dim + 2 * dim + 2 * dim) * dim
        + 2 * 2 * tokens * tokens * dim
        + dim * CLASSES
    )


@pytest.mark.parametrize(
    ("weight", "activation", "pattern", "bits", "worth"),
    [
        ("fp32", "fp32", None, 1024, 1),
        ("fp16", "fp16", None, 256, 8),
        ("fp16", "fp16", "2:4", 128, 16),
        ("int8", "int8", None, 64, 16),
        ("int8", "int8", "2:4", 32, 32),
        ("int4", "int4", "portable", 8, 64),
        ("int4", "int4", "pair4:8", 8, 64),
        # The slower of two types decides, and dequantized weights are dense.
        ("int4", "int8", "2:4", 16, 32),
        # Of FP32 no core skips 2:4, of FP16 and INT8 none what may lie in one half of a group, and
        # of INT4 x INT4 those for INT8 skip what does not come in pairs.
        ("fp32", "fp32", "2:4", 512, 1),
        ("fp32", "fp32", "portable", 512, 1),
        ("fp16", "fp16", "portable", 128, 16),
        ("fp16", "fp16", "pair4:8", 128, 8),
        ("fp16", "int8", "2:4", 64, 16),
        ("int8", "int8", "portable", 32, 32),
        ("int8", "int8", "pair4:8", 32, 16),
        ("int4", "int8", "pair4:8", 16, 16),
        ("int4", "int4", None, 16, 32),
        ("int4", "int4", "2:4", 8, 32),
        ("int4", "fp16", "2:4", 32, 8),
        ("int8", "fp16", "2:4", 64, 8),
    ],
)
def test_a_gemm_is_worth_what_the_formula_says(
    weight: str, activation: str, pattern: str | None, bits: int, worth: int
) -> None:
    entry = ComputeEntry("fc", "gemm", 1000, weight, activation, pattern)
    assert entry.bit_operations == 1000 * bits
    assert entry.equivalent_flops == 2 * 1000 / worth


@pytest.mark.parametrize(("weight", "paper"), [("int8", 32), ("int4", 64)])
def test_the_compressed_gemms_alone_reach_the_papers_figures_and_the_model_does_not(
    weight: str, paper: int, tmp_path: Path
) -> None:
    rule: dict[str, Any] = {
        "id": "all",
        "match": {"op": "linear"},
        "sparsity": {"pattern": "portable"},
        "quantize": {"weight": weight, "activation": weight},
    }
    compilation = begin(TinyViT(), torch.randn(2, 2, 8, 8), make_rules(rule), tmp_path)
    run_until(compilation, "fold")
    figures = compute_figures(compilation.ir, "fp16").as_dict()
    assert figures["compressed_gemms"]["equivalent_flops"]["ratio"] == paper
    attention, model = figures["attention"], figures["model"]
    assert attention["equivalent_flops"]["ratio"] == 8
    assert model["macs"] == figures["gemms"]["macs"] + attention["macs"]
    expected = model["macs"] / (figures["gemms"]["macs"] / paper + attention["macs"] / 8)
    assert model["equivalent_flops"]["ratio"] == pytest.approx(expected)
    assert 8 < model["equivalent_flops"]["ratio"] < paper


@pytest.mark.parametrize(
    ("rules", "fused"), [("int8", "fp16"), ("int8-attention", "int8"), ("int4", "fp16")]
)
def test_attention_is_in_integers_only_where_its_own_plan_says_so(
    rules: str, fused: str, tmp_path: Path
) -> None:
    """The output of a quantized QKV is INT8 in all three; a fused attention reads it in float."""
    timm = pytest.importorskip("timm")
    model = timm.models.VisionTransformer(
        img_size=32, patch_size=8, embed_dim=64, depth=2, num_heads=2, num_classes=10
    )
    data = [((torch.randn(2, 3, 32, 32),), torch.tensor([0, 1]))]
    compilation = begin(model.eval(), torch.randn(2, 3, 32, 32), rules, tmp_path, data=data)
    run_until(compilation, "split_outputs")
    found = [e for e in by_name(compilation).values() if e.kind == "attention"]
    assert {(e.weight, e.activation) for e in found} == {(fused, fused)}
    assert sum(e.macs for e in found) == 2 * 2 * 17 * 17 * 64
    outputs = [plan.applied.output for plan in plans_of(compilation).values() if "qkv" in plan.name]
    assert outputs == ["int8", "int8"]


@pytest.mark.parametrize("quantized", [False, True])
def test_a_spelled_out_product_of_dequantized_factors_goes_by_its_plan(
    quantized: bool, tmp_path: Path
) -> None:
    outputs = {"weight": "int8", "activation": "int8", "output": "int8"}
    linears = {"id": "linears", "match": {"op": "linear"}, "quantize": outputs}
    rules = [linears, ATTENTION_INT8] if quantized else [linears]
    model = Around(Mixer(spelled_out()))
    compilation = begin(model, torch.randn(2, 6, 64), make_rules(*rules), tmp_path)
    run_until(compilation, "split_outputs")
    products = [e for e in by_name(compilation).values() if e.kind == "attention"]
    assert [e.activation for e in products] == ["int8" if quantized else "fp16"] * 2


def test_a_refused_layer_counts_as_what_it_stays(tmp_path: Path) -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(30, 32), nn.Linear(32, 8)

        def forward(self, x: Tensor) -> Tensor:
            return self.second(self.first(x).relu())

    rule = {"id": "all", "match": {"op": "linear"}, "sparsity": SPARSE, "quantize": INT8}
    compilation = begin(Odd(), torch.randn(4, 30), make_rules(rule), tmp_path)
    run_until(compilation, "fold")
    assert plan_of(compilation, "first").applied.sparsity is None
    found = by_name(compilation)
    assert (found["first"].density, found["second"].density) == (1.0, 0.5)


def test_deit_tiny_has_its_published_macs() -> None:
    timm = pytest.importorskip("timm")
    found = counted(timm.create_model("deit_tiny_patch16_224"), torch.randn(2, 3, 224, 224))
    assert sum(entry.macs for entry in found.values()) / 1e9 == pytest.approx(1.26, rel=0.01)


@pytest.mark.parametrize("mend", [{"split": True}, {"output": "int8"}])
def test_a_split_layer_costs_what_it_did_whole(mend: dict[str, Any], tmp_path: Path) -> None:
    rule = {
        "id": "all",
        "match": {"op": "linear"},
        "quantize": {"weight": "int8", "activation": "int8", **mend},
    }
    compilation = begin(TinyViT(), torch.randn(2, 2, 8, 8), make_rules(rule), tmp_path)
    before = by_name(run_until(compilation, "trace"))
    after = by_name(run_until(compilation, "store_int4"))
    parts = [name for name in after if ".part" in name]
    assert len(parts) == (2 * 3 if "split" in mend else 0)
    assert sum(e.macs for e in after.values()) == sum(e.macs for e in before.values())
    assert {after[name].weight for name in parts} <= {"int8"}


class Chosen(nn.Module):
    """A linear on those tokens alone whose first channel is positive."""

    def __init__(self) -> None:
        super().__init__()
        self.all, self.some = nn.Linear(8, 8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.all(x)
        return self.some(x[x[..., 0] > 0]).sum(0) + x[..., :4]


def test_a_layer_that_runs_on_as_many_tokens_as_the_values_say_counts_none() -> None:
    found = counted(Chosen(), torch.randn(4, 5, 8))
    assert {name: entry.macs for name, entry in found.items()} == {"all": 5 * 8 * 8, "some": 0}
