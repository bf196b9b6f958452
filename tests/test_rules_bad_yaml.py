"""Text that is no YAML of one version ends with one error: its code, its place and a way out."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.bad_rules import LINEAR, Case, check_case, failure, rule

CASES: dict[str, Case] = {
    "empty": ("", "rules-file-empty", None, None, "version: 1", ""),
    "comment only": ("# nothing\n", "rules-file-empty", None, None, "version: 1", ""),
    "null document": ("---\n", "rules-file-empty", None, None, "nothing", ""),
    "list": ("- a\n", "rules-not-a-mapping", 1, 1, "mapping", ""),
    "text": ("just text\n", "rules-not-a-mapping", 1, 1, "mapping", ""),
    "only a version": ("version: 1\n", "no-rules", 1, 1, "nothing to do", "extends: int8"),
    "no version": ("rules: []\n", "missing-key", 1, 1, "'version'", "`version: 1`"),
    "version 2": ("version: 2\nfuture: 1\n", "unknown-version", 1, 10, "'2'", "newer compiler"),
    "version 0": ("version: 0\n", "unknown-version", 1, 10, "'0'", "`version: 1`"),
    "version 1.0": ("version: 1.0\n", "unknown-version", 1, 10, "'1.0'", "`version: 1`"),
    "version true": ("version: true\n", "unknown-version", 1, 10, "'True'", "`version: 1`"),
    "version text": ('version: "1"\n', "unknown-version", 1, 10, "text '1'", "remove the quotes"),
    "version list": ("version: [1]\n", "unknown-version", 1, 10, "a block", "`version: 1`"),
    "version null": ("version:\nrules: []\n", "unknown-version", 1, 1, "nothing", "`version: 1`"),
    "tab": ("version: 1\nrules:\n\t- id: a\n", "yaml-syntax", 3, 1, "tab", "spaces"),
    "indented key": ("version: 1\n rules: []\n", "yaml-syntax", 2, 7, "indentation", "same number"),
    "dedented entry": (
        "version: 1\nrules:\n  - id: a\n - id: b\n",
        "yaml-syntax",
        4,
        2,
        "indentation",
        "same number",
    ),
    "open bracket": ("version: 1\nrules: [{id: a}\n", "yaml-syntax", 3, 1, "line 2", "close"),
    "open brace": ("version: 1\ntarget: {precision: fp16\n", "yaml-syntax", 3, 1, "'}'", "close"),
    "open quote": ("version: 1\nscope: 'back\n", "yaml-syntax", 2, 8, "never closed", "close it"),
    "missing colon": ("version: 1\nrules\n", "yaml-syntax", 2, 1, "without a value", "key: value"),
    "colon in text": ("version: 1\nscope: a: b\n", "yaml-syntax", 2, 9, "not allowed", "quotes"),
    "at sign": ("version: 1\nscope: @x\n", "yaml-syntax", 2, 8, "'@'", "quotes"),
    "two documents": ("version: 1\n---\nversion: 1\n", "yaml-syntax", 2, 1, "second", "one"),
    "control character": ("version: 1\nscope: a\x07b\n", "yaml-syntax", 2, 9, "'\\x07'", ""),
    "bad yaml version": ("%YAML 3.0\n---\nversion: 1\n", "yaml-syntax", 1, 1, "YAML", ""),
    "unknown yaml version": ("%YAML 1.9\n---\nversion: 1\n", "yaml-syntax", None, None, "YAML", ""),
    "impossible character": ('version: "\\Uffffffff"\n', "yaml-syntax", None, None, "escape", ""),
    "backslash in double quotes": (
        rule('id: a\nmatch: {name: "re:\\d+"}\nsparsity: none\n'),
        "yaml-syntax",
        4,
        24,
        "escape",
        "single quotes",
    ),
    "unquoted pattern": (
        rule(LINEAR + "sparsity: {pattern: 2:4}\n"),
        "unquoted-pattern",
        5,
        25,
        "base 60",
        'quote it: "2:4"',
    ),
    "unquoted pattern in old yaml": (
        "%YAML 1.1\n---\n" + rule(LINEAR + "sparsity:\n  pattern: 2:4\n"),
        "unquoted-pattern",
        8,
        16,
        "base 60",
        'quote it: "2:4"',
    ),
    "unquoted wrong pattern": (
        rule(LINEAR + "sparsity: {pattern: 3:4}\n"),
        "unknown-pattern",
        5,
        25,
        "'3:4'",
        '"2:4"',
    ),
    "wrong pattern": (
        rule(LINEAR + 'sparsity: {pattern: "3:4"}\n'),
        "unknown-pattern",
        5,
        25,
        "'3:4'",
        '"2:4"',
    ),
    "unquoted glob": (
        rule("id: a\nmatch: {name: *.qkv}\nsparsity: none\n"),
        "unquoted-glob",
        4,
        19,
        "*.qkv",
        'quote it: "*.qkv"',
    ),
    "unquoted double star": (
        rule("id: a\nmatch:\n  name: **.qkv\nsparsity: none\n"),
        "unquoted-glob",
        5,
        13,
        "alias",
        'quote it: "**.qkv"',
    ),
    "unquoted star": (
        rule("id: a\nmatch:\n  name: *\nsparsity: none\n"),
        "unquoted-glob",
        5,
        13,
        "alias",
        'quote it: "*"',
    ),
    "unquoted globs in a list": (
        rule("id: a\nmatch: {name: [a, *.b, c]}\nsparsity: none\n"),
        "unquoted-glob",
        4,
        23,
        "*.b ",
        'quote it: "*.b"',
    ),
    "unknown alias": (
        rule("id: a\nmatch: &linears {op: linear}\nsparsity: none\n")
        + "  - {id: b, match: *linear, quantize: none}\n",
        "unknown-alias",
        6,
        20,
        "*linear",
        "did you mean 'linears'?",
    ),
    "alias of itself": ("version: 1\nrules: &r [*r]\n", "rules-file-too-large", None, None, "", ""),
    "deep nesting": ("a: " + "[" * 50 + "]" * 50, "rules-file-too-large", None, None, "nested", ""),
    "very deep nesting": ("[" * 2000, "rules-file-too-large", None, None, "nested", ""),
    "many aliases": (
        "a: &a [1,1,1,1,1,1,1,1,1]\n"
        + "".join(
            f"{key}: &{key} [{','.join(['*' + before] * 9)}]\n"
            for before, key in zip("abcdef", "bcdefg", strict=True)
        ),
        "rules-file-too-large",
        None,
        None,
        "values",
        "",
    ),
    "merge of a number": ("version: 1\n<<: 3\nrules: []\n", "wrong-type", 2, 5, "`<<`", ""),
    "code in a tag": (
        "version: 1\nrules: !!python/object/apply:os.system ['touch ran']\n",
        "yaml-tag",
        2,
        8,
        "!!python/object/apply:os.system",
        "remove the tag",
    ),
    "code in the version": (
        "version: !!python/object/apply:os.system ['touch ran']\n",
        "yaml-tag",
        1,
        10,
        "ever run",
        "remove the tag",
    ),
    "code in a name": ("version: 1\n? !!python/name:os.system\n: 1\n", "yaml-tag", 2, 3, "", ""),
    "own tag": ("version: 1\nrules: !mine []\n", "yaml-tag", 2, 8, "!mine", "remove the tag"),
    "binary": ("version: 1\nscope: !!binary aGk=\nrules: []\n", "yaml-tag", 2, 8, "!!binary", ""),
    "duplicate key": (
        "version: 1\nscope: a\nrules: []\nscope: b\n",
        "duplicate-key",
        4,
        1,
        "line 2",
        "remove",
    ),
    "duplicate key in a block": (
        rule(LINEAR + "sparsity: {pattern: '2:4', method: magnitude, pattern: '2:4'}\n"),
        "duplicate-key",
        5,
        51,
        "'pattern'",
        "remove",
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_bad_file_ends_with_its_code_place_and_hint(name: str, tmp_path: Path) -> None:
    check_case(CASES[name], tmp_path)


def test_code_in_a_tag_never_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("code in a tag", "code in the version", "code in a name"):
        (tmp_path / "rules.yaml").write_text(CASES[name][0], encoding="utf-8")
        assert failure(tmp_path / "rules.yaml").code == "yaml-tag"
    assert [path.name for path in tmp_path.iterdir()] == ["rules.yaml"]
