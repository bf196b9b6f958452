"""report.json keeps to its published schema, and reports of earlier versions do too."""

from __future__ import annotations

import copy
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from gpusq_compile import report_cli
from gpusq_compile.codes import pages
from gpusq_compile.report.schema import SCHEMA_PATH, build_schema, schema_text
from tests.reports import frozen, make_report

PUBLISHED = json.loads(SCHEMA_PATH.read_text())


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return make_report(tmp_path_factory.mktemp("schema"))


def faults(schema: dict[str, Any], report: Any) -> list[str]:
    found = jsonschema.Draft202012Validator(schema).iter_errors(report)
    return [f"{fault.json_path}: {fault.message:.200}" for fault in found]


def test_the_shipped_schema_is_current_and_valid() -> None:
    assert SCHEMA_PATH.read_text() == schema_text(), "python -m gpusq_compile.report"
    jsonschema.Draft202012Validator.check_schema(PUBLISHED)


def test_a_real_report_keeps_to_it(report: dict[str, Any]) -> None:
    assert faults(PUBLISHED, report) == []


def test_every_key_of_a_real_report_is_described(report: dict[str, Any]) -> None:
    assert faults(build_schema(closed=True), report) == [], "add it to report/schema.py"


def test_a_report_with_fine_tune_and_engine_of_an_earlier_version_keeps_to_it() -> None:
    old = frozen()
    assert old["finetune"]["quantize"]["steps"] == 2
    assert old["engine"]["targets"]
    assert faults(build_schema(closed=True), old) == []


@pytest.mark.parametrize("options", [{"dry_run": True}, {"rules": "extends: int8-attention"}])
def test_reports_of_other_runs_keep_to_it(options: dict[str, Any], tmp_path: Path) -> None:
    rules = options.pop("rules", None)
    given = [f"version: 1\n{rules}\n"] if rules else []
    assert faults(build_schema(closed=True), make_report(tmp_path, *given, **options)) == []


def test_what_an_earlier_report_has_stays_required_or_optional() -> None:
    """A reader of the earliest reports must be able to read the latest."""

    def required(schema: dict[str, Any]) -> Iterator[tuple[str, str]]:
        for name, part in {"Report": schema, **schema["$defs"]}.items():
            yield from ((name, key) for key in part.get("required", ()))

    old = frozen()
    assert {key for name, key in required(PUBLISHED) if name == "Report"} <= set(old)
    assert {key for name, key in required(PUBLISHED) if name == "Layer"} <= set(old["layers"][0])


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("schema_version",), 2),
        (("status",), "perhaps"),
        (("layers", 0, "requested", "weight"), 8),
        (("layers", 0, "shape"), "64x32"),
        (("passes", 0, "seconds"), -1),
        (("passes", 0, "remarks", 0, "kind"), "noted"),
        (("accuracy", "dense"), 94.4),
    ],
)
def test_a_report_that_says_something_else_breaks_it(
    path: tuple[str | int, ...], value: Any, report: dict[str, Any]
) -> None:
    broken = copy.deepcopy(report)
    inner: Any = broken
    for part in path[:-1]:
        inner = inner[part]
    inner[path[-1]] = value
    assert len(faults(PUBLISHED, broken)) == 1


def test_a_key_that_a_later_version_adds_breaks_nothing(report: dict[str, Any]) -> None:
    later = {**report, "weather": "fine"}
    later["layers"] = [{**layer, "colour": "blue"} for layer in report["layers"]]
    assert faults(PUBLISHED, later) == []


def test_every_remark_of_real_runs_has_a_page(report: dict[str, Any]) -> None:
    for made in (report, frozen()):
        codes = {remark["code"] for step in made["passes"] for remark in step["remarks"]}
        assert codes <= set(pages())


def test_the_command_prints_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["gpusq-report", "--schema"])
    report_cli.main()
    assert json.loads(capsys.readouterr().out) == PUBLISHED
