"""Layers that read some rows each of one parameter have weights of their own, and it comes back."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import onnx
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gpusq_compile import CheckFailed, compile_model
from gpusq_compile.gates import Gates
from gpusq_compile.graph.stored_rows import StoredRows
from tests.compilations import begin, make_rules, outputs, plans_of, remarks_of, run_until, targets
from tests.models import noise, seeded
from tests.packed_cases import KINDS, LOOSE, state_of

DIM = 32


class ClassAttention(nn.Module):
    """A learned token attends to the others, by PyTorch's own attention."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.token = nn.Linear(16, DIM), nn.Parameter(torch.randn(1, 1, DIM))
        self.attention = nn.MultiheadAttention(DIM, 4, batch_first=True)
        self.norm, self.head = nn.LayerNorm(DIM), nn.Linear(DIM, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        token = self.token.expand(x.shape[0], -1, -1)
        token = token + self.attention(token, x, x, need_weights=False)[0]
        return self.head(self.norm(token[:, 0]))


INPUTS = noise(2, 8, 16)
PARTS = ("attention.in_proj_rows_0_32_weight", "attention.in_proj_rows_32_96_weight")


def test_projections_of_one_parameter_are_layers_of_their_own() -> None:
    compilation = run_until(begin(seeded(ClassAttention), INPUTS, make_rules()), "trace")
    before = outputs(compilation)[0]
    plans = plans_of(run_until(compilation, "mark"))
    torch.testing.assert_close(outputs(compilation)[0], before, rtol=0, atol=1e-6)
    assert {name: plan.shape for name, plan in plans.items()} == {
        "embed": (32, 16),
        "attention.in_proj_rows_0_32": (32, 32),
        "attention.in_proj_rows_32_96": (64, 32),
        "attention.out_proj": (32, 32),
        "head": (10, 32),
    }
    assert plans["attention.in_proj_rows_0_32"].roles == ("attention_qkv",)
    assert compilation.parameters.apart == {
        f"attention.in_proj_{kind}": [
            StoredRows(f"attention.in_proj_rows_0_32_{kind}", tuple(range(32))),
            StoredRows(f"attention.in_proj_rows_32_96_{kind}", tuple(range(32, 96))),
        ]
        for kind in ("weight", "bias")
    }
    said = [r for r in remarks_of(compilation, "canonicalize") if r.code == "rows-apart"]
    assert [remark.layer for remark in said] == [
        "attention.in_proj",
        "attention.in_proj_bias",
    ]


@pytest.mark.parametrize("kind", ["2:4 int8", "portable int4", "split int8"])
def test_the_state_dict_has_the_whole_parameter(kind: str, tmp_path: Path) -> None:
    state = state_of(seeded(ClassAttention), kind, tmp_path)
    model = seeded(ClassAttention)
    assert state.keys() == dict(model.named_parameters()).keys()
    dense = model.attention.in_proj_weight.detach().clone()
    bias = model.attention.in_proj_bias.detach().clone()
    model.load_state_dict(state)
    weight = state["attention.in_proj_weight"]
    kept = weight != 0
    assert 0.3 < float(kept.float().mean()) < 0.6
    for rows in (slice(0, 32), slice(32, 96)):
        step = float(dense[rows].abs().max()) / (127 if "int8" in kind else 7)
        assert float((weight - dense)[rows][kept[rows]].abs().max()) <= step
    torch.testing.assert_close(state["attention.in_proj_bias"], bias, rtol=0, atol=1e-3)
    # Parts of a constant are no work for an engine, and ONNX Runtime's own rewrites stumble at it.
    operators = {node.op_type for node in onnx.load(tmp_path / "model.onnx").graph.node}
    assert kind == "split int8" or "Split" not in operators


def test_the_split_of_a_part_is_one_of_the_whole_parameter(tmp_path: Path) -> None:
    rule = {"id": "all", "match": {"op": "linear"}, **KINDS["split int8"]}
    compilation = begin(
        seeded(ClassAttention), INPUTS, make_rules(rule, verify=LOOSE), tmp_path / "work"
    )
    split = run_until(compilation, "split_outputs")
    assert any(
        plan.name.startswith("attention.in_proj_rows_32_96.part")
        for plan in plans_of(split).values()
    )


Compute = Callable[["Rows", Tensor], Tensor]


class Rows(nn.Module):
    """`compute` with rows of one weight [48, 16] and bias [48] behind a linear."""

    def __init__(self, compute: Compute) -> None:
        super().__init__()
        self.first, self.compute = nn.Linear(16, 16), compute
        self.weight = nn.Parameter(torch.randn(48, 16) * 0.25)
        self.bias = nn.Parameter(torch.randn(48))

    def forward(self, x: Tensor) -> Tensor:
        return self.compute(self, self.first(x))


def chunked(m: Rows, x: Tensor) -> Tensor:
    q, k, v = m.weight.chunk(3)
    return F.linear(x, q) + F.linear(x.relu(), k) * F.linear(x.sin(), v)


def sliced(m: Rows, x: Tensor) -> Tensor:
    y = F.linear(x, m.weight[:16], m.bias[:16]).relu()
    return F.linear(y, m.weight[-16:], m.bias[-16:])


def again(m: Rows, x: Tensor) -> Tensor:
    return F.linear(F.linear(x, m.weight[:16]).relu(), m.weight[:16]) @ m.weight[16:].T


APART: dict[str, tuple[Compute, set[range]]] = {
    "chunks": (chunked, {range(16), range(16, 32), range(32, 48)}),
    "slices, with rows that nothing reads": (sliced, {range(16), range(32, 48)}),
    "narrow": (
        lambda m, x: F.linear(F.linear(x, m.weight.narrow(0, 0, 16)), m.weight.narrow(0, 16, 32)),
        {range(16), range(16, 48)},
    ),
    "a slice without an end": (
        lambda m, x: F.linear(F.linear(x, m.weight[:16]), torch.ops.aten.slice(m.weight, 0, 16)),
        {range(16), range(16, 48)},
    ),
    "one part by two layers": (again, {range(16), range(16, 48)}),
}
WHOLE: dict[str, Compute] = {
    "parts overlap": lambda m, x: F.linear(x, m.weight[:16]) + F.linear(x.cos(), m.weight[8:24]),
    "all is read too": lambda m, x: F.linear(F.linear(x, m.weight)[..., :16], m.weight[:16]),
    "every other row": lambda m, x: F.linear(x, m.weight[::3]) + F.linear(x.cos(), m.weight[1::3]),
    "columns": lambda m, x: (
        F.linear(x[..., :8], m.weight[:, :8]) + F.linear(x[..., 8:], m.weight[:, 8:])
    ),
    "put together": lambda m, x: F.linear(x, torch.cat([m.weight[:16], m.weight[32:] * 2])),
}


@pytest.mark.parametrize("case", APART)
def test_parts_that_do_not_overlap_are_stored_apart(case: str) -> None:
    compute, rows = APART[case]
    compilation = run_until(begin(seeded(Rows, compute), INPUTS, make_rules()), "trace")
    before = outputs(compilation)[0]
    run_until(compilation, "canonicalize")
    assert {
        range(p.rows[0], p.rows[-1] + 1) for p in compilation.parameters.apart["weight"]
    } == rows
    torch.testing.assert_close(outputs(compilation)[0], before, rtol=0, atol=1e-5)
    assert "weight" not in dict(compilation.ir.named_parameters())
    assert not {"aten.chunk.default", "aten.slice.Tensor"} & set(targets(compilation))


def test_rows_that_nothing_reads_are_zero_in_the_state_dict() -> None:
    result = compile_model(
        seeded(Rows, sliced),
        (INPUTS,),
        rules=make_rules(verify=LOOSE),
        calibration_data=[noise(4, 8, 16)],
        finetune=False,
        engine="none",
    )
    state = result.state_dict()
    assert state["weight"].shape == (48, 16)
    assert [bool(part.any()) for part in state["weight"].chunk(3)] == [True, False, True]
    assert [bool(part.any()) for part in state["bias"].chunk(3)] == [True, False, True]


def test_parts_of_a_frozen_parameter_are_frozen() -> None:
    model = seeded(Rows, chunked)
    model.weight.requires_grad_(False)
    compilation = run_until(begin(model, INPUTS, make_rules()), "canonicalize")
    assert {part.tensor for part in compilation.parameters.apart["weight"]} <= compilation.frozen


@pytest.mark.parametrize("case", WHOLE)
def test_any_other_parts_are_refused_with_the_reason(case: str) -> None:
    compilation = run_until(begin(seeded(Rows, WHOLE[case]), INPUTS, make_rules()), "mark")
    assert compilation.parameters.apart == {}
    refused = [plan for plan in plans_of(compilation).values() if plan.reasons]
    assert refused
    assert all(plan.sparsity is None and len(plan.shape) == 2 for plan in refused)
    assert {remark.kind for remark in remarks_of(compilation, "mark") if remark.code == "refused"}


@pytest.mark.parametrize(
    ("gates", "said"),
    [(Gates(strict=True), "computed in the graph"), (Gates(require_sparse=1), "%")],
)
def test_the_gates_count_weights_that_the_model_computes(
    gates: Gates, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    class Computed(ClassAttention):
        def __init__(self) -> None:
            super().__init__()
            self.spare = nn.Linear(DIM, DIM)

        def forward(self, x: Tensor) -> Tensor:
            y = F.linear(self.embed(x).mean(1), self.spare.weight * 2)
            return super().forward(x) + y[:, :10]

    with pytest.raises(CheckFailed, match=said):
        compile_model(
            seeded(Computed),
            (INPUTS,),
            rules=make_rules(verify=LOOSE),
            calibration_data=[noise(4, 8, 16)],
            finetune=False,
            engine="none",
            gates=gates,
        )
    assert "pictures" not in capsys.readouterr().err
