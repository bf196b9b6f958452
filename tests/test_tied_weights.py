"""A weight that several layers read has each of their names, and one mask, scale and storage."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gpusq_compile import compile_model
from gpusq_compile.packed_model import load_packed
from gpusq_compile.quantization.fake_quantize import FakeQuantize
from gpusq_compile.remarks import Kind
from gpusq_compile.sparsity import Mask
from tests.compilations import (
    INT8,
    SPARSE,
    begin,
    make_rules,
    outputs,
    plans_of,
    remarks_of,
    run_until,
)
from tests.models import noise, seeded


class Tied(nn.Module):
    """`first` and `second` have one weight, each with a bias of its own; `again` runs twice."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(32, 32), nn.Linear(32, 32)
        self.second.weight = self.first.weight
        self.again = nn.Linear(32, 32)

    def forward(self, x: Tensor) -> Tensor:
        x = F.gelu(self.second(F.gelu(self.first(x))))
        return self.again(F.gelu(self.again(x)))


def asking(*rules: dict[str, Any]) -> dict[str, Any]:
    found = [
        {"id": f"r{i}", "sparsity": SPARSE, "quantize": INT8, **r} for i, r in enumerate(rules)
    ]
    return make_rules(*found)


EVERYTHING = asking({"match": {"op": "linear"}})


def test_each_reader_has_the_name_of_its_own_module() -> None:
    marked = run_until(begin(seeded(Tied), noise(4, 32), EVERYTHING), "mark")
    assert list(plans_of(marked)) == ["first", "second", "again", "again#2"]
    assert {plan.weight for plan in plans_of(marked).values()} == {"first.weight", "again.weight"}
    texts = [
        remark.reason for remark in remarks_of(marked, "mark") if remark.code == "shared-weight"
    ]
    assert [text.partition(" read")[0] for text in texts] == ["first, second", "again, again#2"]


def test_one_mask_and_one_scale_serve_all_readers() -> None:
    done = run_until(begin(seeded(Tied), noise(4, 32), EVERYTHING), "quantize")
    modules = dict(done.ir.named_modules())
    assert sum(isinstance(module, Mask) for module in modules.values()) == 2
    weights = [
        name for name, m in modules.items() if isinstance(m, FakeQuantize) and "weight" in name
    ]
    assert len(weights) == 2
    plans = plans_of(done).values()
    assert all((p.applied.sparsity, p.applied.weight) == ("2:4", "int8") for p in plans)
    before = outputs(done)[0]
    torch.testing.assert_close(outputs(run_until(done, "fold"))[0], before, rtol=0, atol=1e-5)


@pytest.mark.parametrize("method", ["obs", "wanda"])
def test_masks_by_inputs_are_chosen_at_the_first_reader(method: str) -> None:
    sparsity = {"pattern": "2:4", "method": method}
    quantize = {"weight": "int8", "rounding": "gptq"}
    rules = asking({"match": {"op": "linear"}, "sparsity": sparsity, "quantize": quantize})
    done = run_until(begin(seeded(Tied), noise(64, 32), rules), "fold")
    weight = done.ir.get_buffer("first.weight")
    assert int((weight.reshape(32, 8, 4) != 0).sum(-1).max()) == 2


@pytest.mark.parametrize("named", [["first", "second"], ["first"], ["second"]])
def test_rules_may_name_either_but_must_agree(named: list[str]) -> None:
    marked = run_until(
        begin(seeded(Tied), noise(4, 32), asking({"match": {"name": named}})), "mark"
    )
    plans = plans_of(marked)
    if len(named) == 2:
        assert all(plans[name].sparsity for name in named)
        return
    assert plans[named[0]].sparsity is None
    [missed] = remarks_of(marked, "mark", Kind.MISSED)[:1]
    assert "the rules ask for different forms of it" in plans[named[0]].reasons[0]
    assert missed.layer == named[0]


def test_files_hold_the_weight_once_and_the_state_has_every_name(tmp_path: Path) -> None:
    model, inputs = seeded(Tied), noise(4, 32)
    result = compile_model(
        model,
        (inputs,),
        rules={**EVERYTHING, "verify": {"min_top1_agreement": 0}},
        output=tmp_path / "out",
        calibration_data=[inputs],
        finetune=False,
        engine="none",
    )
    assert result.onnx_model is not None
    stored = [t.name for t in result.onnx_model.graph.initializer if tuple(t.dims) == (32, 32)]
    assert sorted(stored) == ["again.weight", "first.weight"]
    names = {node.name for node in result.onnx_model.graph.node}
    assert {"first", "second", "again", "again#2"} <= names
    packed = load_packed(tmp_path / "out")
    assert [layer.name for layer in packed.graph.layers] == ["first", "again"]
    for state in (result.state_dict(), packed.state_dict()):
        assert set(state) == set(model.state_dict())
        model.load_state_dict(state)
        with torch.no_grad():
            again = seeded(Tied)(inputs)
            assert float((model(inputs) - again).abs().max()) < 1.0
        assert torch.equal(state["first.weight"], state["second.weight"])


class Embedded(nn.Module):
    """A weight that is a linear's, and a table of positions too."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(32, 32)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x + self.linear.weight[: x.shape[1]])


def test_a_weight_that_is_read_as_something_else_too_is_left() -> None:
    marked = run_until(begin(seeded(Embedded), noise(4, 8, 32), EVERYTHING), "mark")
    [plan] = plans_of(marked).values()
    assert plan.reasons == ("the operator slice reads the weight linear.weight too",)
