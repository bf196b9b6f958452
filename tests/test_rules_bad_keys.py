"""Keys, names and matches that are none end with one error: its code, its place and a way out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from gpusq_compile.language.problems import InputErrors
from tests.bad_rules import LINEAR, Case, check_case, failure, rule

CASES: dict[str, Case] = {
    "duplicate id": (
        rule(LINEAR + "sparsity: none\n") + "  - {id: a, match: {op: add}, distill: none}\n",
        "duplicate-id",
        6,
        10,
        "'a'",
        "own",
    ),
    "missing id": (
        "version: 1\nrules:\n  - match: {op: linear}\n    sparsity: none\n",
        "missing-key",
        3,
        5,
        "'id'",
        "add `id:",
    ),
    "missing match": (rule("id: a\nsparsity: none\n"), "missing-key", 3, 5, "'match'", "linear"),
    "missing pattern": (rule(LINEAR + "sparsity: {}\n"), "missing-key", 5, 15, "'pattern'", ""),
    "id is a number": (
        rule("id: 1\nmatch: {op: add}\ndistill: none\n"),
        "wrong-type",
        3,
        9,
        "",
        '"1"',
    ),
    "id with spaces": (
        rule("id: a b\nmatch: {op: add}\ndistill: none\n"),
        "invalid-value",
        3,
        9,
        "letters",
        "",
    ),
    "key is a number": ("version: 1\n1: 2\nrules: []\n", "unknown-key", 2, 1, "'1'", ""),
    "key is a list": ("version: 1\n? [a]\n: 1\nrules: []\n", "wrong-type", 2, 3, "key", "quote"),
    "template": ("version: 1\nscope: {{x}}\nrules: []\n", "wrong-type", 2, 8, "key", "brace"),
    "unknown key": (
        rule(LINEAR + "quantise: none\n"),
        "unknown-key",
        5,
        5,
        "'quantise' in rules[0]",
        "did you mean 'quantize'?",
    ),
    "unknown key in a block": (
        rule(LINEAR + "quantize: {weigth: int8, weight: int8}\n"),
        "unknown-key",
        5,
        16,
        "rules[0].quantize",
        "did you mean 'weight'?",
    ),
    "unknown top key": (
        "version: 1\nrule: []\nrules: []\n",
        "unknown-key",
        2,
        1,
        "top",
        "'rules'?",
    ),
    "key of a rule at the top": (
        "version: 1\nrules: []\nmatch: {op: linear}\n",
        "unknown-key",
        3,
        1,
        "'match' at the top level",
        "a key of a rule: check the indentation",
    ),
    "key of match in a rule": (
        rule(LINEAR + "sparsity: none\nin_features: 3\n"),
        "unknown-key",
        6,
        5,
        "'in_features'",
        "a key of `match`",
    ),
    "scale_lr of the sparse phase": (
        "version: 1\nrules: []\nfinetune:\n  sparse: {scale_lr: 1}\n",
        "unknown-key",
        4,
        12,
        "finetune.sparse",
        "a key of `finetune.reconstruct` and of `finetune.quantize`",
    ),
    "unknown dtype": (
        rule(LINEAR + "quantize: {weight: int9}\n"),
        "unknown-dtype",
        5,
        24,
        "'int9'",
        "did you mean 'int8'?",
    ),
    "dtype is a number": (
        rule(LINEAR + "quantize: {weight: 8}\n"),
        "wrong-type",
        5,
        24,
        "int8, int4 or none, found 8",
        "",
    ),
    "unknown op": (
        rule("id: a\nmatch: {op: conv}\ndistill: none\n"),
        "unknown-op",
        4,
        17,
        "'conv'",
        "'conv2d'?",
    ),
    "unknown role": (
        rule("id: a\nmatch: {role: [mlp, classifer]}\ndistill: none\n"),
        "unknown-role",
        4,
        25,
        "'classifer'",
        "did you mean 'classifier'?",
    ),
    "unknown compute": (
        "version: 1\nrules: []\ntarget: {compute: [sm80, sm81]}\n",
        "unknown-target",
        3,
        26,
        "'sm81'",
        "did you mean 'sm",
    ),
    "unknown runtime": (
        "version: 1\nrules: []\ntarget: {runtime: tensort}\n",
        "unknown-target",
        3,
        19,
        "'tensort'",
        "did you mean 'tensorrt'?",
    ),
    "unknown precision": (
        "version: 1\nrules: []\ntarget: {precision: fp8}\n",
        "unknown-target",
        3,
        21,
        "'fp8'",
        "fp16",
    ),
    "unknown loss": (
        rule(LINEAR + "distill: {loss: mae}\n"),
        "unknown-value",
        5,
        21,
        "'mae'",
        "mse",
    ),
    "unknown weight range": (
        "version: 1\nrules: []\ncalibration: {weight: min}\n",
        "unknown-value",
        3,
        23,
        "'min'",
        "max",
    ),
    "empty compute": (
        "version: 1\nrules: []\ntarget: {compute: []}\n",
        "empty-value",
        3,
        19,
        "at least one",
        "",
    ),
    "compute twice": (
        "version: 1\nrules: []\ntarget: {compute: [sm80, sm80]}\n",
        "duplicate-value",
        3,
        19,
        "sm80",
        "",
    ),
    "action is a pattern": (
        rule(LINEAR + 'sparsity: "2:4"\n'),
        "unknown-value",
        5,
        15,
        "none or a mapping",
        '{pattern: "2:4"}',
    ),
    "action is a list": (rule(LINEAR + "distill: [mse]\n"), "wrong-type", 5, 14, "a list", "{loss"),
    "action is false": (
        rule(LINEAR + "quantize: false\n"),
        "wrong-type",
        5,
        15,
        "false",
        "{weight",
    ),
    "action without a value": (
        rule(LINEAR + "sparsity:\nquantize: none\n"),
        "missing-value",
        5,
        5,
        "no value",
        "`sparsity: none`",
    ),
    "name without a value": (
        rule("id: a\nmatch: {op: linear, name: }\nsparsity: none\n"),
        "missing-value",
        4,
        25,
        "name",
        "remove the key",
    ),
    "rule without an action": (rule(LINEAR), "rule-without-action", 3, 5, "'a'", "sparsity"),
    "rule is text": ("version: 1\nrules: [gemms]\n", "wrong-type", 2, 9, "id and match", ""),
    "rules is a mapping": (
        "version: 1\nrules: {id: a}\n",
        "wrong-type",
        2,
        8,
        "a list, found a mapping",
        "[{id",
    ),
    "rules is null": ("version: 1\nrules:\n", "wrong-type", 2, 1, "found nothing", "[{id"),
    "quantize nothing": (
        rule(LINEAR + "quantize: {weight: none, activation: none}\n"),
        "empty-block",
        5,
        15,
        "nothing",
        "`quantize: none`",
    ),
    "empty match": (
        rule("id: a\nmatch: {}\nsparsity: none\n"),
        "empty-match",
        4,
        12,
        "every",
        '"**"',
    ),
    "match is text": (
        rule("id: a\nmatch: linear\nsparsity: none\n"),
        "wrong-type",
        4,
        12,
        "a mapping, found 'linear'",
        "{op: linear}",
    ),
    "empty name": (
        rule("id: a\nmatch: {name: ''}\nsparsity: none\n"),
        "empty-value",
        4,
        19,
        "",
        "",
    ),
    "bad regex": (
        rule("id: a\nmatch: {name: 're:blocks.(0|1'}\nsparsity: none\n"),
        "invalid-regex",
        4,
        19 + len("'re:blocks."),
        "unterminated",
        "",
    ),
    "bad regex without quotes": (
        rule("id: a\nmatch:\n  name: re:*x\nsparsity: none\n"),
        "invalid-regex",
        5,
        13 + len("re:"),
        "nothing to repeat",
        "",
    ),
    "empty regex": (
        rule("id: a\nmatch: {name: 're:'}\nsparsity: none\n"),
        "invalid-regex",
        4,
        20,
        "",
        "",
    ),
    "bad glob": (
        rule('id: a\nmatch: {name: "blocks.[0.x"}\nsparsity: none\n'),
        "invalid-glob",
        4,
        20 + len("blocks."),
        "']'",
        "",
    ),
    "empty predicate": (
        rule("id: a\nmatch: {in_features: {}}\nsparsity: none\n"),
        "empty-block",
        4,
        26,
        "no condition",
        "multiple_of",
    ),
    "impossible predicate": (
        rule("id: a\nmatch: {in_features: {min: 9, max: 8}}\nsparsity: none\n"),
        "contradiction",
        4,
        26,
        "at least 9",
        "",
    ),
    "size is text": (
        rule("id: a\nmatch: {in_features: big}\nsparsity: none\n"),
        "wrong-type",
        4,
        26,
        "'big'",
        "multiple_of",
    ),
    "size is 0": (
        rule("id: a\nmatch: {in_features: 0}\nsparsity: none\n"),
        "out-of-range",
        4,
        26,
        "at least 1, found 0",
        "",
    ),
    "expect below 0": (
        rule(LINEAR + "sparsity: none\nexpect: -1\n"),
        "out-of-range",
        6,
        13,
        "-1",
        "",
    ),
    "optional is text": (
        rule(LINEAR + "sparsity: none\noptional: yes\n"),
        "wrong-type",
        6,
        15,
        "true or false, found 'yes'",
        "",
    ),
    "scope is a number": ("version: 1\nrules: []\nscope: 3\n", "wrong-type", 3, 8, "text", '"3"'),
}


@pytest.mark.parametrize("name", CASES)
def test_bad_file_ends_with_its_code_place_and_hint(name: str, tmp_path: Path) -> None:
    check_case(CASES[name], tmp_path)


def test_all_errors_of_a_file_are_shown_in_the_order_of_its_lines(tmp_path: Path) -> None:
    path = tmp_path / "rules.yaml"
    path.write_text(
        "version: 1\n"
        "rules:\n"
        "  - id: a\n"
        "    match: {role: classifer}\n"
        "    sparsity: {pattern: 2:4}\n"
        "    quantize: {weight: int9}\n"
        "finetune: {epochs: 3}\n",
        encoding="utf-8",
    )
    error = failure(path)
    assert isinstance(error, InputErrors)
    codes = [single.code for single in error.errors]
    assert codes == ["unknown-role", "unquoted-pattern", "unknown-dtype", "unknown-key"]
    assert (error.code, error.location) == (codes[0], error.errors[0].location)
    assert str(error).count("error[") == 4


def test_a_flood_of_errors_is_cut_and_counted(tmp_path: Path) -> None:
    path = tmp_path / "rules.yaml"
    path.write_text("version: 1\nrules: []\n" + "".join(f"k{i}: 1\n" for i in range(30)))
    assert "... and 20 more errors" in str(failure(path))


def test_two_missing_keys_of_one_rule_are_both_named() -> None:
    error = failure({"version": 1, "rules": [{"sparsity": "none"}]})
    assert isinstance(error, InputErrors)
    assert {"'id'" in e.message or "'match'" in e.message for e in error.errors} == {True}
    assert len(error.errors) == 2


def test_a_bad_element_is_not_reported_as_an_empty_list_too() -> None:
    error = failure({"version": 1, "rules": [], "target": {"compute": ["sm81"]}})
    assert not isinstance(error, InputErrors)


def test_error_in_a_python_mapping_has_its_path_as_place() -> None:
    spec = {
        "version": 1,
        "rules": [{"id": "a", "match": {"op": "linear"}, "sparsity": {"pattern": "3:4"}}],
    }
    error = failure(spec)
    assert error.code == "unknown-pattern"
    assert str(error.location) == "<rules>.rules[0].sparsity.pattern"


@pytest.mark.parametrize("value", [object(), {1: 2}, b"2:4", {"a"}, 1j])
def test_python_value_of_a_foreign_type_is_refused(value: object) -> None:
    error = failure({"version": 1, "rules": [], "scope": value})
    assert error.code == "wrong-type"


def test_python_mapping_that_contains_itself_is_refused() -> None:
    spec: dict[str, Any] = {"version": 1}
    spec["rules"] = [spec]
    assert failure(spec).code == "rules-file-too-large"
