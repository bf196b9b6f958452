"""--why, --remarks and --timing: what a finished run answers, in words and as data."""

from __future__ import annotations

import copy
import re
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from gpusq_compile import InputError
from gpusq_compile.passes import PIPELINE
from gpusq_compile.questions import Questions, answers, print_lines, show_answers
from gpusq_compile.report.names import listed, starred
from gpusq_compile.report.remarks_view import chosen, parse_choice, remark_lines
from gpusq_compile.report.timing_view import rate_lines, timing_entries
from gpusq_compile.report.why import answer_lines, explain
from tests.engine_logs import DATA
from tests.reports import frozen, layer_of, make_report

PASSES = [step.name for step in PIPELINE]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("why")


@pytest.fixture(scope="module")
def report(folder: Path) -> dict[str, Any]:
    return make_report(folder)


def told(report: dict[str, Any], name: str) -> list[str]:
    return [line.strip() for line in answer_lines(explain(report, name))]


class TestWhy:
    def test_the_chain_of_rules_with_places_and_what_was_overridden(
        self, report: dict[str, Any], folder: Path
    ) -> None:
        lines = told(report, "layers.0.feed.up")
        assert lines[:2] == ["layers.0.feed.up", "linear, weight 64 x 32, role mlp, a Linear"]
        (gemms,) = [
            index for index, line in enumerate(lines) if re.search(r"int8\.yaml:\d+ gemms  ", line)
        ]
        assert lines[gemms + 1] == (
            'sparsity: {pattern: "2:4", method: obs, permute: true}  (overridden by dense-first)'
        )
        assert lines[gemms + 2].startswith("quantize: {weight: int8, activation: int8")
        assert lines[gemms + 3].endswith("mine.yaml:4 dense-first  (name: layers.0.feed.up)")
        assert lines[gemms + 4] == "sparsity: none"
        assert "requested: weight int8, activation int8" in lines
        assert "applied: weight int8, activation int8" in lines

    def test_the_rules_that_do_not_match_and_on_what(self, report: dict[str, Any]) -> None:
        lines = told(report, "logits")
        start = lines.index("rules that do not match it, and on what:")
        assert any("gemms: not out_features: {multiple_of: 32}" in line for line in lines[start:])
        assert any('narrow: not name: ["**.down", "**.donw"]' in line for line in lines[start:])

    def test_the_reason_of_a_refusal(self, report: dict[str, Any]) -> None:
        lines = told(report, "stem")
        (reason,) = [line for line in lines if line.startswith("refused: ")]
        assert reason.startswith("refused: blocks of 64 do not divide its 32 input channels")
        assert f"mark: missed [refused]: {reason.removeprefix('refused: ')}" in lines

    def test_what_each_pass_did(self, report: dict[str, Any]) -> None:
        lines = told(report, "layers.1.feed.down")
        steps = [line.split(":")[0] for line in lines[lines.index("what the passes did:") + 1 :]]
        assert steps[:3] == ["permute", "sparsify", "surgery"]

    def test_what_the_engine_did(self) -> None:
        old = frozen()
        lines = told(old, "fc1")
        assert "portable: int8, as planned (in the engine's layer fc1_myl0_4)" in lines
        gemm = next(
            gemm for gemm in old["engine"]["targets"]["portable"]["gemms"] if gemm["name"] == "fc1"
        )
        gemm.update({"actual": "fp16", "status": "missed", "reason": "split in float"})
        assert any("fp16 in place of int8: split in float" in line for line in told(old, "fc1"))

    def test_what_a_build_elsewhere_did(self) -> None:
        from gpusq_compile.report.engine_logs import read_logs, with_logs
        from tests.engine_logs import QKV, make_report

        bare = {
            **frozen(),
            **make_report(),
            "attentions": [],
            "taps": [],
        }
        for layer in bare["layers"]:
            layer.update(rules=[], packed_bytes=None, weight_bytes=None)
        builds, _ = read_logs(bare, [], [DATA / "trtexec_10_block.log"])
        lines = told(with_logs(bare, builds), QKV)
        assert any("sparse kernel: requested 2:4 -> mask ok" in line for line in lines)

    def test_an_attention_and_a_tap_can_be_asked_about(self, report: dict[str, Any]) -> None:
        assert told(report, "layers.0.mix")[1].startswith("attention, 2 heads of 16")
        lines = told(report, report["taps"][-1]["name"])
        assert "distill: {loss: mse, theta: 1.0}" in lines
        assert any(line.startswith("tap: passed [tapped]") for line in lines)

    def test_a_glob_shows_what_is_alike_once(self, report: dict[str, Any]) -> None:
        lines = told(report, "**.down")
        assert lines[-1] == ("1 other layer is alike but for their numbers: layers.1.feed.down")
        assert sum(line.startswith("requested:") for line in lines) == 1
        # One has a rule of its own, so these two are not alike.
        lines = told(report, "**.up")
        assert sum(line.startswith("requested:") for line in lines) == 2

    def test_layers_of_other_types_are_not_alike(self, report: dict[str, Any]) -> None:
        changed = copy.deepcopy(report)
        layer_of(changed, "layers.1.feed.down")["applied"]["weight"] = "int4"
        assert not any("alike" in line for line in told(changed, "**.down"))

    @pytest.mark.parametrize(
        ("wanted", "hint"),
        [
            ("down", "did you mean layers.0.feed.down, layers.1.feed.down? The pattern '**.down'"),
            ("feed", "The pattern '**.feed.**' takes them all"),
            ("layers.0.fed.up", "did you mean 'layers.0.feed.up'?"),
            ("**.qqq", "layers are called as 'stem' is"),
        ],
    )
    def test_an_unknown_name_gets_the_nearest(
        self, wanted: str, hint: str, report: dict[str, Any]
    ) -> None:
        with pytest.raises(InputError) as caught:
            explain(report, wanted)
        assert caught.value.code == "unknown-layer"
        assert hint in str(caught.value.hint)

    def test_a_pattern_that_cannot_be_read_is_refused(self, report: dict[str, Any]) -> None:
        with pytest.raises(InputError) as caught:
            explain(report, "re:(")
        assert caught.value.code == "invalid-regex"

    def test_a_report_without_graph_has_no_layer(self, report: dict[str, Any]) -> None:
        with pytest.raises(InputError, match="no layer is called 'x'"):
            explain({**report, "layers": [], "attentions": [], "taps": []}, "x")

    def test_a_report_of_an_earlier_version_has_its_chain_in_words(self) -> None:
        (answer,) = explain(frozen(), "head")
        assert answer["rules"] == answer["not_matched"] == []
        assert any("odd: sparsity" in line for line in answer_lines([answer]))

    def test_every_layer_of_a_report_can_be_asked_about(self, report: dict[str, Any]) -> None:
        for made in (report, frozen()):
            found = explain(made, "**")
            assert [a["name"] for a in found if a["kind"] == "layer"] == [
                layer["name"] for layer in made["layers"]
            ]
            assert len(answer_lines(found)) > 10


class TestRemarks:
    @pytest.mark.parametrize("kind", ["passed", "missed", "analysis"])
    def test_those_of_a_kind(self, kind: str, report: dict[str, Any]) -> None:
        found = chosen(report, parse_choice(kind, PASSES))
        assert found
        assert {remark["kind"] for remark in found} == {kind}

    def test_those_of_a_pass(self, report: dict[str, Any]) -> None:
        found = chosen(report, parse_choice("all=mark", PASSES))
        assert {remark["pass"] for remark in found} == {"mark"}
        everything = chosen(report, parse_choice("all", PASSES))
        assert len(everything) == sum(len(step["remarks"]) for step in report["passes"])

    def test_one_reason_on_several_layers_is_said_once(self, report: dict[str, Any]) -> None:
        lines = remark_lines(report, parse_choice("passed=surgery", PASSES))
        assert lines == [
            "surgery: passed [untransposed]: 9 layers, stem, layers.*.mix.wide (2), "
            "layers.*.mix.back (2) and 2 more: weight stored as [K, N]"
        ]

    def test_none_is_said(self, report: dict[str, Any]) -> None:
        lines = remark_lines(report, parse_choice("missed=trace", PASSES))
        assert lines == ["no remark 'missed' of pass 'trace'"]

    @pytest.mark.parametrize(
        ("text", "code", "hint"),
        [
            ("mised", "unknown-remarks", "did you mean 'missed'?"),
            ("missed=quantise", "unknown-pass", "did you mean 'quantize'?"),
            ("missed=", "unknown-pass", "valid: "),
            ("=quantize", "unknown-remarks", "valid: "),
        ],
    )
    def test_what_cannot_be_chosen_is_refused(self, text: str, code: str, hint: str) -> None:
        with pytest.raises(InputError) as caught:
            parse_choice(text, PASSES)
        assert caught.value.code == code
        assert hint in str(caught.value.hint)


class TestTiming:
    def test_passes_come_longest_first_and_the_rest_is_not_lost(
        self, report: dict[str, Any]
    ) -> None:
        *passes, rest = timing_entries(report)
        assert [name for name, _ in passes] == [
            step["name"]
            for step in sorted(report["passes"], key=lambda s: s["seconds"], reverse=True)
        ]
        assert rest[0] == "between the passes"
        assert sum(s for _, s in passes) + rest[1] == pytest.approx(report["seconds"], abs=0.01)

    def test_a_report_without_the_whole_time_has_the_passes(self) -> None:
        assert len(timing_entries(frozen())) == len(frozen()["passes"])

    def test_a_phase_has_its_rate(self) -> None:
        old = frozen()
        phase = {"steps": 10, "seconds": 2.0, "images": 640, "loss": [], "stopped_by": "budget"}
        old["finetune"] = {"sparse": phase, "quantize": {**phase, "steps": 0}}
        assert rate_lines(old) == ["fine-tune sparse: 200 ms a step, 320 images a second"]


def test_answers_are_shown_in_the_order_of_the_questions(report: dict[str, Any]) -> None:
    stream = StringIO()
    questions = Questions(("stem", "logits"), parse_choice("missed", PASSES), timing=True)
    show_answers(report, questions, Console(file=stream, width=80))
    text = stream.getvalue()
    assert (
        text.index("stem\n")
        < text.index("logits\n")
        < text.index("\nmark: missed")
        < text.index("between the passes")
    )


def test_answers_as_data_have_the_names_of_the_questions(report: dict[str, Any]) -> None:
    questions = Questions(("stem",), parse_choice("missed", PASSES), timing=True)
    found = answers(report, questions)
    assert list(found) == ["why", "remarks", "timing"]
    assert found["why"][0]["refused"] == layer_of(report, "stem")["reasons"]
    assert answers(report, Questions()) == {}


def test_lines_wrap_under_their_indentation_on_a_terminal_and_nowhere_else() -> None:
    line = "  a layer " + "word " * 30
    for terminal, count in ((True, 5), (False, 1)):
        stream = StringIO()
        print_lines(Console(file=stream, width=40, force_terminal=terminal), [line])
        lines = stream.getvalue().rstrip("\n").split("\n")
        assert len(lines) == count
        assert all(text.startswith("      word") for text in lines[1:])


@pytest.mark.parametrize(
    ("names", "text"),
    [
        (["head"], "head"),
        (["a", "b", "c"], "a, b, c"),
        ([f"blocks.{i}.fc" for i in range(12)], "blocks.*.fc (12)"),
        ([*(f"blocks.{i}.fc" for i in range(4)), "head"], "blocks.*.fc (4), head"),
        (list("abcdef"), "a, b, c and 3 more"),
    ],
)
def test_names_are_listed_where_few_and_gathered_where_many(names: list[str], text: str) -> None:
    assert listed(names) == text


def test_only_whole_parts_are_numbers() -> None:
    assert starred("layers.0.1.fc2.q8") == "layers.*.*.fc2.q8"
