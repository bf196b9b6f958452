"""Two runs compared: what changed is named, and nothing else."""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest

from gpusq_compile.report.compare import compare, comparison_lines, is_same
from tests.reports import frozen, layer_of, make_report

INT4 = "version: 1\nextends: int4\n"


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return make_report(tmp_path_factory.mktemp("first"), "version: 1\nextends: int8\n")


@pytest.fixture(scope="module")
def second(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return make_report(tmp_path_factory.mktemp("second"), INT4)


def test_a_run_and_itself_are_the_same(first: dict[str, Any]) -> None:
    again = copy.deepcopy(first)
    for step in again["passes"]:
        step["seconds"] += 1
    again["seconds"] += 20
    assert is_same(compare(first, again))
    assert comparison_lines(compare(first, again)) == ["nothing changed but times"]


def test_layers_whose_treatment_changed_are_named_with_what_changed(
    first: dict[str, Any], second: dict[str, Any]
) -> None:
    found = compare(first, second)
    changed = found["layers"]["changed"]
    assert changed["layers.0.feed.up"]["applied weight"] == ["int8", "int4"]
    assert changed["layers.0.feed.up"]["applied sparsity"] == ["2:4", "portable"]
    assert "logits" not in changed
    assert found["layers"]["only_first"] == found["layers"]["only_second"] == []
    lines = comparison_lines(found)
    assert f"layers treated otherwise: {len(changed)}" in lines
    assert sum("applied weight: int8 -> int4" in line for line in lines) == 1, "alike, so once"
    assert any("layers.*.mix.wide (2)" in line or "layers.0.mix.wide" in line for line in lines)


def test_accuracy_size_and_verification_are_compared(
    first: dict[str, Any], second: dict[str, Any]
) -> None:
    one, two = copy.deepcopy(first), copy.deepcopy(second)
    one["accuracy"].update(dense=0.9, onnx=0.89)
    two["accuracy"].update(dense=0.9, onnx=0.875)
    lines = comparison_lines(compare(one, two))
    assert "top-1 onnx: 89.00% -> 87.50% (-1.50 points)" in lines
    assert not any("top-1 dense" in line for line in lines)
    assert any(line.startswith("packed bytes: ") and line.endswith("x)") for line in lines)
    assert any(line.startswith("verify, min_cosine: ") for line in lines)
    assert any(line.startswith("compute, compressed gemms") for line in lines)


def test_engine_types_are_compared() -> None:
    old, new = frozen(), frozen()
    gemm = new["engine"]["targets"]["portable"]["gemms"][0]
    gemm.update(status="missed", actual="fp16")
    layer_of(new, gemm["name"])["engine"]["type"] = "fp16"
    found = compare(old, new)
    assert found["layers"]["changed"] == {gemm["name"]: {"engine type": ["int8", "fp16"]}}
    count = len(new["engine"]["targets"]["portable"]["gemms"])
    assert found["engine"] == {
        "portable GEMMs in the planned type": [f"{count} of {count}", f"{count - 1} of {count}"]
    }


def test_layers_of_one_run_alone_are_named(first: dict[str, Any]) -> None:
    other = copy.deepcopy(first)
    other["layers"] = [layer for layer in other["layers"] if layer["name"] != "logits"]
    assert comparison_lines(compare(first, other)) == ["layers only in the first: 1: logits"]
    assert comparison_lines(compare(other, first)) == ["layers only in the second: 1: logits"]


def test_what_is_missed_in_one_run_alone_is_said(first: dict[str, Any]) -> None:
    other = copy.deepcopy(first)
    remark = {"kind": "missed", "code": "refused", "layer": "logits", "reason": "too small"}
    other["passes"][2]["remarks"].append(remark)
    text = "mark: logits: too small"
    assert comparison_lines(compare(first, other)) == [f"newly missed: {text}"]
    assert comparison_lines(compare(other, first)) == [f"no longer missed: {text}"]


def test_a_failed_run_can_be_compared(first: dict[str, Any]) -> None:
    failed = copy.deepcopy(first)
    failed.update(status="failed", error={"code": "strict", "message": "no"}, storage=None)
    failed["verify"] = {}
    lines = comparison_lines(compare(first, failed))
    assert "run, status: ok -> failed" in lines
    assert "run, error: - -> code strict, message no" in lines
    assert any(line.startswith("model bytes: ") and line.endswith("-> -") for line in lines)


def test_a_report_of_an_earlier_version_can_be_compared(first: dict[str, Any]) -> None:
    found = compare(frozen(), first)
    assert not is_same(found)
    assert comparison_lines(found)


def test_the_comparison_is_plain_values(first: dict[str, Any], second: dict[str, Any]) -> None:
    found = compare(first, second)
    assert json.loads(json.dumps(found)) == found


def test_a_thousand_layers_are_compared_in_few_lines(first: dict[str, Any]) -> None:
    def many(weight: str) -> dict[str, Any]:
        layer = layer_of(first, "layers.0.feed.up")
        names = [f"blocks.{i}.fc" for i in range(1000)]
        layers = [
            {**layer, "name": n, "applied": {**layer["applied"], "weight": weight}} for n in names
        ]
        return {**first, "layers": layers}

    lines = comparison_lines(compare(many("int8"), many("int4")))
    assert lines == [
        "layers treated otherwise: 1000",
        "  1000: blocks.*.fc (1000): applied weight: int8 -> int4",
    ]
