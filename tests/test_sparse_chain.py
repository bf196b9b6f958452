"""report.json follows each layer's sparsity as far as this run can see, and no further."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from gpusq_compile import compile_model
from gpusq_compile.engine import BuiltEngine, EngineReport, GemmInEngine
from gpusq_compile.report.document import layer_entry
from tests.compilations import begin, make_rules, plan_of, run_until


class Linears(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.odd = nn.Linear(30, 64)
        self.fit = nn.Linear(64, 64)
        self.dense = nn.Linear(64, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.dense(self.fit(self.odd(x).relu()).relu())


def engine(*gemms: GemmInEngine) -> BuiltEngine:
    return BuiltEngine("engine/model.plan", 1, 1.0, gemms)


RULES = make_rules(
    {"id": "all", "match": {"op": "linear"}, "sparsity": {"pattern": "2:4"}},
    {"id": "not-the-last", "match": {"name": "dense"}, "sparsity": "none"},
)


def test_without_an_engine_that_tells_the_chain_ends_at_the_mask() -> None:
    report = compile_model(
        Linears(), (torch.randn(4, 30),), rules=RULES, finetune=False, engine="none"
    ).report
    chains = {layer["name"]: layer["sparse_kernel"] for layer in report["layers"]}
    unknown = {"requested": "2:4", "eligible": "unknown", "picked": "unknown"}
    assert chains["fit"] == unknown | {"mask_ok": True, "causes": [], "reason": None}
    refused = "2:4 needs a reduction axis that is a multiple of 4, found 30"
    assert chains["odd"] == unknown | {"mask_ok": None, "causes": ["refused"], "reason": refused}
    assert chains["dense"] is None
    assert report["target"] == {"compute": ["portable"], "precision": "fp32"}
    assert report["compute"]["model"]["macs"] == 30 * 64 + 64 * 64 + 64 * 8


@pytest.mark.parametrize(
    ("eligible", "picked", "causes"),
    [("yes", "yes", []), ("yes", "no", ["small"]), ("no", "no", ["small"])],
)
def test_an_engine_that_was_built_here_is_judged_like_one_from_elsewhere(
    eligible: Any, picked: Any, causes: list[str], tmp_path: Path
) -> None:
    compilation = run_until(begin(Linears(), torch.randn(4, 30), RULES, tmp_path), "verify_onnx")
    found = GemmInEngine("fit", "fp32", "fp32", "passed", eligible=eligible, picked=picked)
    compilation.engine = EngineReport("tensorrt", "10.13.0", {"sm86": engine(found)})
    chain = layer_entry(compilation, plan_of(compilation, "fit"))["sparse_kernel"]
    assert (chain["eligible"], chain["picked"], chain["causes"]) == (eligible, picked, causes)


@pytest.mark.parametrize("order", [("sm86", "sm90"), ("sm90", "sm86")])
@pytest.mark.parametrize(
    ("least", "most"),
    [(("no", "no"), ("yes", "yes")), (("yes", "no"), ("unknown", "unknown"))],
)
def test_of_several_engines_the_one_where_it_got_least_far_counts(
    least: tuple[Any, Any], most: tuple[Any, Any], order: tuple[str, str], tmp_path: Path
) -> None:
    compilation = run_until(begin(Linears(), torch.randn(4, 30), RULES, tmp_path), "mark")
    answers = {"sm86": least, "sm90": most}
    compilation.engine = EngineReport(
        "tensorrt",
        "10.13.0",
        {
            target: engine(
                GemmInEngine(
                    "fit",
                    "fp32",
                    "fp32",
                    "passed",
                    eligible=answers[target][0],
                    picked=answers[target][1],
                )
            )
            for target in order
        },
    )
    plan = plan_of(compilation, "fit").apply(sparsity="2:4")
    chain = layer_entry(compilation, plan)["sparse_kernel"]
    assert (chain["eligible"], chain["picked"]) == least
    assert chain["reason"].startswith("sm86: ")
    assert chain["causes"] == ["small"]
