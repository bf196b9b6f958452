"""A layer that is called again on the same input is one layer, and any other stays two."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from tests.compilations import begin, make_rules, outputs, plans_of, remarks_of, run_until
from tests.models import noise, seeded

Compute = Callable[["Twice", Tensor], Tensor]


class Twice(nn.Module):
    def __init__(self, compute: Compute) -> None:
        super().__init__()
        self.embed, self.mlp, self.head = nn.Linear(16, 32), nn.Linear(32, 32), nn.Linear(32, 10)
        self.attention = nn.MultiheadAttention(32, 4, batch_first=True)
        self.compute = compute

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.compute(self, x).mean(1))


def attended(m: Twice, x: Tensor) -> Tensor:
    y = m.embed(x)
    return m.attention(y, y, y)[0] + m.attention(y, y, y)[0].relu()


EQUAL: dict[str, tuple[Compute, list[str]]] = {
    "a layer": (lambda m, x: m.embed(x).relu() + m.embed(x).sin(), ["embed"]),
    "what is behind a layer": (
        lambda m, x: m.mlp(m.embed(x).relu()) + m.mlp(m.embed(x).relu()).sin(),
        ["embed", "mlp"],
    ),
    "an attention": (attended, ["attention.in_proj_weight", "attention.out_proj"]),
}
DIFFERENT: dict[str, Compute] = {
    "another input": lambda m, x: m.embed(x) + m.embed(x.relu()),
    "another number": lambda m, x: m.embed(x * 2) + m.embed(x * 2.5),
    "equal operators that are no layers": lambda m, x: m.embed(x.relu()) + x.relu().mean(),
}


@pytest.mark.parametrize("case", EQUAL)
def test_a_layer_that_is_called_again_on_the_same_input_is_computed_once(
    case: str, tmp_path: Path
) -> None:
    compute, names = EQUAL[case]
    compilation = begin(seeded(Twice, compute), noise(2, 8, 16), make_rules(), tmp_path)
    before = outputs(run_until(compilation, "trace"))[0]
    run_until(compilation, "mark")
    assert not [name for name in plans_of(compilation) if "#" in name]
    said = [r.layer for r in remarks_of(compilation, "canonicalize") if r.code == "computed-once"]
    assert said == names
    torch.testing.assert_close(outputs(compilation)[0], before, rtol=0, atol=1e-6)
    # The exporter computes equal operators once as well: every plan still has its GEMM.
    assert run_until(compilation, "verify_onnx").verify["ok"]


@pytest.mark.parametrize("case", DIFFERENT)
def test_layers_that_differ_in_anything_stay(case: str) -> None:
    compilation = begin(seeded(Twice, DIFFERENT[case]), noise(2, 8, 16), make_rules())
    before = len(run_until(compilation, "trace").ir.graph.nodes)
    canonical = run_until(compilation, "canonicalize")
    assert not [r for r in remarks_of(canonical, "canonicalize") if r.code == "computed-once"]
    linears = [n for n in canonical.ir.graph.nodes if "linear" in str(n.target)]
    assert len(linears) == (2 if "no layers" in case else 3)
    assert len(canonical.ir.graph.nodes) <= before
