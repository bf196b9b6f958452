"""Weights that a model turns before use are layers like others, and come back in its own form."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from gpusq_compile.graph.stored_weights import Turned
from tests.compilations import begin, make_rules, outputs, plans_of, remarks_of, run_until, targets
from tests.models import noise, seeded
from tests.packed_cases import state_of

DIM, HEADS = 32, 4


class HeadedBlock(nn.Module):
    """An encoder block in the style of ported models: its projections have an axis for the heads,
    or are multiplied from the right."""

    def __init__(self) -> None:
        super().__init__()
        width = DIM // HEADS
        self.queries = nn.Parameter(torch.randn(HEADS, DIM, width) * DIM**-0.5)
        self.pairs = nn.Parameter(torch.randn(DIM, 2, HEADS, width) * DIM**-0.5)
        self.back = nn.Parameter(torch.randn(HEADS, width, DIM) * DIM**-0.5)
        self.up = nn.Parameter(torch.randn(DIM, 2 * DIM) * DIM**-0.5)
        self.down = nn.Linear(2 * DIM, DIM)
        self.first, self.second = nn.LayerNorm(DIM), nn.LayerNorm(DIM)

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        q = torch.einsum("bnd,hdk->bhnk", y, self.queries)
        k, v = torch.einsum("bnd,dthk->tbhnk", y, self.pairs).unbind()
        x = x + torch.einsum("bhnk,hkd->bnd", F.scaled_dot_product_attention(q, k, v), self.back)
        return x + self.down(F.gelu(self.second(x) @ self.up))


class Headed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.block = nn.Linear(16, DIM), HeadedBlock()
        self.norm, self.head = nn.LayerNorm(DIM), nn.Linear(DIM, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.block(self.embed(x))).mean(1))


INPUTS = noise(2, 8, 16)


def test_weights_of_any_axes_are_layers_with_their_roles() -> None:
    marked = run_until(begin(seeded(Headed), INPUTS, make_rules()), "mark")
    found = {name: (plan.roles, plan.shape) for name, plan in plans_of(marked).items()}
    assert found == {
        "embed": (("patch_embed",), (32, 16)),
        "block.queries": (("attention_qkv",), (32, 32)),
        "block.pairs": (("attention_qkv",), (64, 32)),
        "block.back": (("attention_proj",), (32, 32)),
        "block.up": (("mlp",), (64, 32)),
        "block.down": (("mlp",), (32, 64)),
        "head": (("classifier",), (10, 32)),
    }
    codes = {(remark.code, remark.layer) for remark in remarks_of(marked, "canonicalize")}
    turned = ("queries", "pairs", "back", "up")
    assert codes == {("weight-turned", f"block.{name}") for name in turned}


@pytest.mark.parametrize("kind", ["2:4 int8", "portable int4", "split int8"])
def test_the_state_dict_has_them_in_the_models_own_form(kind: str, tmp_path: Path) -> None:
    state = state_of(seeded(Headed), kind, tmp_path)
    model = seeded(Headed)
    dense = {name: value.clone() for name, value in model.state_dict().items()}
    model.load_state_dict(state)
    for name in ("queries", "pairs", "back", "up"):
        value, was = state[f"block.{name}"], dense[f"block.{name}"]
        kept = value != 0
        assert 0.3 < float(kept.float().mean()) < 0.6
        # In the right place: what was kept is a rounding away from what it was.
        step = float(was.abs().max()) / (127 if "int8" in kind else 7)
        assert float((value - was)[kept].abs().max()) <= step
    # Along the reduction axis, heads and channels of `back` in a row.
    groups = state["block.back"].permute(2, 0, 1).reshape(DIM, -1, 4)
    assert bool(((groups != 0).sum(-1) <= 2).all()) or kind == "portable int4"


Compute = Callable[["Product", Tensor], Tensor]


class Product(nn.Module):
    """`compute` with a weight [16, 4, 4] or [16, 16] behind a linear."""

    def __init__(self, compute: Compute) -> None:
        super().__init__()
        self.first, self.compute = nn.Linear(16, 16), compute
        self.cube = nn.Parameter(torch.randn(16, 4, 4) * 0.25)
        self.square = nn.Parameter(torch.randn(16, 16) * 0.25)
        self.register_buffer("fixed", torch.randn(16, 16))
        self.fixed: Tensor

    def forward(self, x: Tensor) -> Tensor:
        return self.compute(self, self.first(x))


TURNED: dict[str, tuple[Compute, Turned]] = {
    "from the right": (lambda m, x: x @ m.square, Turned((1, 0), 1)),
    "a linear of its transposition": (lambda m, x: F.linear(x, m.square.mT), Turned((1, 0), 1)),
    "flattened": (lambda m, x: F.linear(x, m.cube.flatten(1)), Turned((0, 1, 2), 1)),
    "flattened, from the right": (
        lambda m, x: x @ m.cube.reshape(16, 16),
        Turned((1, 2, 0), 2),
    ),
    "turned, then flattened": (
        lambda m, x: F.linear(x, m.cube.permute(2, 1, 0).reshape(16, 16)),
        Turned((2, 1, 0), 2),
    ),
    "two axes summed": (
        lambda m, x: torch.einsum("bnhk,dkh->bnd", x.unflatten(-1, (4, 4)), m.cube),
        Turned((0, 1, 2), 1),
    ),
    "tensordot": (
        lambda m, x: torch.tensordot(x, m.cube, dims=([-1], [0])).flatten(2)[..., :16],
        Turned((1, 2, 0), 2),
    ),
    "two axes made": (
        lambda m, x: torch.einsum("dkh,bnd->bhnk", m.cube, x).flatten(1),
        Turned((1, 2, 0), 2),
    ),
}


@pytest.mark.parametrize("case", TURNED)
def test_a_weight_is_stored_as_a_gemm_reads_it(case: str) -> None:
    compute, turned = TURNED[case]
    compilation = run_until(begin(seeded(Product, compute), INPUTS, make_rules()), "trace")
    old = outputs(compilation)[0]
    run_until(compilation, "canonicalize")
    assert list(compilation.parameters.turned.values()) == [turned]
    assert targets(compilation).count("aten.linear.default") == 2
    for node in compilation.ir.graph.find_nodes(
        op="call_function", target=torch.ops.aten.linear.default
    ):
        assert node.args[1].op == "get_attr"
    torch.testing.assert_close(outputs(compilation)[0], old, rtol=1e-5, atol=1e-5)


LEFT: dict[str, Compute] = {
    "read twice": lambda m, x: x @ m.square + m.square[0],
    "turned twice": lambda m, x: (x @ m.square) @ m.square,
    "computed": lambda m, x: F.linear(x, m.square.mT * 2),
    "a part": lambda m, x: F.linear(x, m.square[:8].mT @ m.square[:8]),
    "split into axes": lambda m, x: F.linear(x, m.square.reshape(4, 4, 16).mT.reshape(16, 16)),
    "a buffer": lambda m, x: F.linear(x, m.fixed.mT),
    "made in the graph": lambda m, x: F.linear(x, torch.eye(16)),
    "made and cut": lambda m, x: F.linear(x, torch.tril(torch.ones(16, 16))),
}


@pytest.mark.parametrize("case", LEFT)
def test_a_weight_that_cannot_be_stored_otherwise_stays(case: str) -> None:
    compilation = run_until(begin(seeded(Product, LEFT[case]), INPUTS, make_rules()), "trace")
    old = outputs(compilation)[0]
    run_until(compilation, "mark")
    assert compilation.parameters.turned == {}
    assert torch.equal(outputs(compilation)[0], old)
    refused = {name: plan.reasons for name, plan in plans_of(compilation).items() if plan.reasons}
    assert any("computed in the graph" in str(reasons) for reasons in refused.values())


class PerHead(nn.Module):
    """Each head's channels are mixed by a weight of its own before attention."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Linear(16, DIM), nn.Linear(DIM, 10)
        self.mix = nn.Parameter(torch.randn(HEADS, DIM // HEADS, DIM // HEADS))

    def forward(self, x: Tensor) -> Tensor:
        y = self.embed(x).unflatten(-1, (HEADS, -1))
        y = torch.einsum("bnhk,hkj->bhnj", y, self.mix)
        y = F.scaled_dot_product_attention(y, y, y).transpose(1, 2).flatten(2)
        return self.head(y)


def test_a_weight_that_is_turned_for_two_layers_stays_one_that_both_read() -> None:
    model = seeded(Product, lambda m, x: (x @ m.square.T).relu() @ m.square.T)
    marked = run_until(begin(model, INPUTS, make_rules()), "mark")
    assert marked.parameters.turned == {}
    assert {name: plan.weight for name, plan in plans_of(marked).items()} == {
        "first": "first.weight",
        "square": "square",
        "square#2": "square",
    }


def test_a_product_with_a_weight_per_head_is_no_linear_and_is_said_to_be_none() -> None:
    marked = run_until(begin(seeded(PerHead), INPUTS, make_rules()), "mark")
    assert plans_of(marked)["embed"].roles == ("patch_embed",)
    [remark] = [r for r in remarks_of(marked, "canonicalize") if r.code == "no-linear"]
    assert remark.layer == "mix"


def test_a_weight_per_head_is_named_though_it_was_expanded() -> None:
    class Expanded(PerHead):
        def forward(self, x: Tensor) -> Tensor:
            y = self.embed(x).unflatten(-1, (HEADS, -1)).transpose(1, 2)
            y = y @ self.mix.unsqueeze(0).expand(x.shape[0], -1, -1, -1)
            return self.head(y.transpose(1, 2).flatten(2))

    marked = run_until(begin(seeded(Expanded), INPUTS, make_rules()), "mark")
    [remark] = [r for r in remarks_of(marked, "canonicalize") if r.code == "no-linear"]
    assert remark.layer == "mix"


@pytest.mark.parametrize("choose", [lambda w: w[1], lambda w: w.unbind()[1]])
def test_one_of_several_weights_in_a_parameter_is_named(
    choose: Callable[[Tensor], Tensor],
) -> None:
    class Stacked(PerHead):
        def forward(self, x: Tensor) -> Tensor:
            y = self.embed(x).unflatten(-1, (HEADS, -1)) @ choose(self.mix)
            return self.head(y.flatten(2))

    marked = run_until(begin(seeded(Stacked), INPUTS, make_rules()), "mark")
    [remark] = [r for r in remarks_of(marked, "canonicalize") if r.code == "no-linear"]
    assert remark.layer == "mix"


@st.composite
def turnings(draw: st.DrawFn) -> tuple[Turned, list[int]]:
    axes = draw(st.integers(2, 5).flatmap(lambda n: st.permutations(range(n))))
    rows = draw(st.integers(1, len(axes) - 1))
    sizes = st.lists(st.integers(1, 4), min_size=len(axes), max_size=len(axes))
    return Turned(tuple(axes), rows), draw(sizes)


@given(turnings())
def test_turning_there_and_back_changes_nothing(case: tuple[Turned, list[int]]) -> None:
    turned, shape = case
    value = torch.arange(float(torch.Size(shape).numel())).reshape(shape)
    held = turned.to_graph(value)
    assert held.shape == turned.graph_shape(shape)
    assert torch.equal(turned.to_user(held, shape), value)
