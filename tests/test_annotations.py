"""--format github: errors and remarks as annotations at the place that they are about."""

from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import Any

import pytest

from gpusq_compile import CheckFailed, InputError
from gpusq_compile.errors import Location
from gpusq_compile.language.loader import load_rules
from gpusq_compile.report.annotations import annotation, error_annotations, report_annotations
from tests.reports import frozen, make_report


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("annotations")
        patch.chdir(folder)
        return make_report(Path("."))


def test_an_error_stands_at_its_place_with_its_hint() -> None:
    error = InputError("bad", "no good", location=Location("a.yaml", 3, 7), hint="do this")
    assert error_annotations(error) == [
        "::error file=a.yaml,line=3,col=7,title=bad::no good%0Ahint: do this"
    ]


def test_several_errors_of_one_file_are_one_annotation_each(tmp_path: Path) -> None:
    path = tmp_path / "rules.yaml"
    path.write_text("version: 1\nrulez: []\nrules:\n  - {id: a, match: {opp: linear}}\n")
    with pytest.raises(InputError) as caught:
        load_rules(path)
    lines = error_annotations(caught.value)
    assert len(lines) >= 2
    assert all(line.startswith("::error ") and "title=" in line for line in lines)


def test_a_failed_gate_has_no_place() -> None:
    assert error_annotations(CheckFailed("max-drop", "top-1 fell by 2 points")) == [
        "::error title=max-drop::top-1 fell by 2 points"
    ]


def test_what_was_missed_is_a_warning_at_the_rule_that_asked_for_it(
    report: dict[str, Any],
) -> None:
    lines = report_annotations(report)
    (refused,) = [line for line in lines if "blocks of 64" in line]
    assert refused.startswith("::warning file=mine.yaml,line=11,title=mark%3A refused::stem: ")


def test_a_warning_about_the_rules_stands_at_its_rule(report: dict[str, Any]) -> None:
    lines = report_annotations(report)
    (idle,) = [line for line in lines if "pattern-unmatched" in line]
    place = r"::warning file=mine\.yaml,line=14,col=\d+,title=mark%3A pattern-unmatched::"
    assert re.match(place + r"rule 'narrow': name \"\*\*\.donw\" matches no layer$", idle)


def test_one_reason_on_many_layers_is_one_annotation(report: dict[str, Any]) -> None:
    many = copy.deepcopy(report)
    many["passes"][2]["remarks"] = [
        {"kind": "missed", "code": "refused", "layer": f"layers.{i}.feed.up", "reason": "why"}
        for i in (0, 1)
    ]
    lines = report_annotations(many)
    assert sum("::layers.0.feed.up" in line for line in lines) == 1


def test_the_last_line_is_a_notice_of_the_whole(report: dict[str, Any]) -> None:
    assert re.match(
        r"::notice title=gpusq-compile::TinyViT: ok, 10 of 10 layers compressed, "
        r"top-1 \d+\.\d\d%25 -> \d+\.\d\d%25, model\.onnx 0\.\d\d MB$",
        report_annotations(report)[-1],
    )
    assert report_annotations(frozen())[-1].startswith("::notice ")


def test_what_would_end_a_line_or_a_property_is_escaped() -> None:
    place = Location("a,b:c.yaml", 1)
    line = annotation("warning", "50%\nof: a, b\r", "t: x, y", place)
    assert line == ("::warning file=a%2Cb%3Ac.yaml,line=1,title=t%3A x%2C y::50%25%0Aof: a, b%0D")


@pytest.mark.parametrize("file", ["/usr/lib/rules/int8.yaml", "<rules>"])
def test_a_place_outside_of_the_repository_is_left_out(file: str) -> None:
    assert annotation("error", "text", "code", Location(file, 3)) == "::error title=code::text"
