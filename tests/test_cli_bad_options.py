"""Bad rules and options on the command line: the exit code, one message with place and way out."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from tests.command_line import TINY, Refused, check_refused, compile_here

# Rules files: their text and parts of the message; test_rules_bad_*.py have all the others.
GOOD_RULE = (
    "version: 1\nrules:\n  - id: a\n    match: {op: linear}\n    sparsity: {pattern: '2:4'}\n"
)
RULES: dict[str, tuple[str, list[str]]] = {
    "empty": ("", ["rules.yaml: error[rules-file-empty]"]),
    "unknown key": (
        GOOD_RULE + "    sparsty: none\n",
        ["rules.yaml:6:5: error[unknown-key]", "'sparsty'", "did you mean 'sparsity'?"],
    ),
    "unknown dtype": (
        GOOD_RULE + "    quantize: {weight: int3}\n",
        ["rules.yaml:6:24: error[unknown-dtype]", "'int3'", "'int8'?"],
    ),
    "pattern 3:4": (
        GOOD_RULE.replace("2:4", "3:4"),
        ["rules.yaml:5:25: error[unknown-pattern]", "'3:4'", '"2:4"'],
    ),
    "indentation": (
        GOOD_RULE.replace("    sparsity", "   sparsity"),
        ["rules.yaml:5:4: error[yaml-syntax]", "indentation", "same number of spaces"],
    ),
    "unknown version": (
        GOOD_RULE.replace("version: 1", "version: 9"),
        ["rules.yaml:1:10: error[unknown-version]", "'9'"],
    ),
    "duplicate id": (
        GOOD_RULE + GOOD_RULE.partition("rules:\n")[2],
        ["rules.yaml:6:9: error[duplicate-id]", "first at rules.yaml:3:9"],
    ),
    "code in a tag": (
        GOOD_RULE + "    quantize: !!python/object/apply:os.mkdir ['ran']\n",
        ["rules.yaml:6:15: error[yaml-tag]", "ever run"],
    ),
    "unquoted pattern": (
        GOOD_RULE.replace("'2:4'", "2:4"),
        ["rules.yaml:5:25: error[unquoted-pattern]", 'quote it: "2:4"'],
    ),
    "unquoted glob": (
        GOOD_RULE.replace("op: linear", "name: *.qkv"),
        ["rules.yaml:4:19: error[unquoted-glob]", 'quote it: "*.qkv"'],
    ),
    "unknown target": (
        GOOD_RULE + "target: {compute: [sm99]}\n",
        ["rules.yaml:6:20: error[unknown-target]", "'sm99'", "sm90"],
    ),
    "rule that matches nothing": (
        GOOD_RULE.replace("op: linear", "name: 'fc3'"),
        ["rules.yaml:3:5: error[rule-unmatched]", "matches none", "fc", "optional: true"],
    ),
    "unknown scope": (
        GOOD_RULE + "scope: fc3\n",
        ["error[unknown-scope]", "'fc3'", "did you mean 'fc2'?"],
    ),
}


@pytest.mark.parametrize("name", RULES)
def test_bad_rules_are_named_with_their_line_and_column(
    name: str, folder: Path, refused: Refused
) -> None:
    text, parts = RULES[name]
    Path("rules.yaml").write_text(text)
    args = (TINY, "--rules", "rules.yaml", "--no-finetune", "--engine", "none")
    run = refused(*args)
    for part in parts:
        assert part in run.error
    assert not Path("ran").exists()


@pytest.mark.parametrize(
    ("rules", "parts"),
    [
        ("int9", ["error[unknown-rules-name]", "did you mean 'int8'?"]),
        ("missing.yaml", ["error[rules-file-missing]", "'missing.yaml'"]),
        (".", ["error[rules-is-folder]", "int8"]),
    ],
)
def test_rules_that_are_not_there_are_named(rules: str, parts: list[str], refused: Refused) -> None:
    error = refused(TINY, "--rules", rules).error
    for part in parts:
        assert part in error


def test_a_count_that_differs_fails_the_check_and_leaves_a_report(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("rules.yaml").write_text(GOOD_RULE + "    expect: 99\n")
    args = (TINY, "--rules", "rules.yaml", "--no-finetune", "--engine", "none", "-o", "out")
    run = compile_here(monkeypatch, capsys, *args)
    assert run.code == 1
    assert "rules.yaml:3:5: error[expect-mismatch]: rule 'a' expects 99 layers and" in run.error
    found = sorted(os.listdir("out"))
    assert found == ["evidence.json", "manifest.json", "report.html", "report.json"]


# Options: the arguments after the model and the rules, parts of the message.
OPTIONS: dict[str, tuple[list[object], list[str]]] = {
    "misspelt": (["--no-fintune"], ["error[unknown-option]", "did you mean '--no-finetune'?"]),
    "unknown letter": (["-x"], ["error[unknown-option]: no option -x", "--output"]),
    "two models": (["other.py"], ["error[usage]", "other.py"]),
    "unknown target": (
        ["--target", "sm99"],
        ["error[unknown-target]: no target 'sm99'", "valid: portable, sm100, sm120, sm80"],
    ),
    "target no engine is for": (
        ["--target", "sm90"],
        ["error[unsupported-target]", "'sm90'", "--engine none", "build_engine.sh"],
    ),
    "unknown engine": (["--engine", "rtx"], ["error[unknown-engine]: no engine 'rtx'", "auto"]),
    "engine that is not here": (
        ["--engine", "tensorrt"],
        ["error[engine-", "'tensorrt'"],
    ),
    "unknown device": (["--device", "tpu"], ["error[unknown-device]: no device 'tpu'", "'cpu'?"]),
    "unknown pass": (
        ["--dump-after", "quantise"],
        ["error[unknown-pass]: no pass 'quantise'", "did you mean 'quantize'?"],
    ),
    "unknown submodule": (
        ["--scope", "fc3"],
        ["error[unknown-scope]: the model has no submodule 'fc3'", "did you mean 'fc2'?"],
    ),
    "no steps": (["--steps", 0], ["error[steps]: 0 steps: expected 1 or more"]),
    "steps in words": (["--steps", "two"], ["error[usage]", "--steps", "'two'", "integer"]),
    "no epochs": (["--epochs", 0], ["error[epochs]: 0 epochs", "--no-finetune"]),
    "endless epochs": (["--epochs", "inf"], ["error[epochs]: inf epochs"]),
    "steps and epochs": (
        ["--steps", 1, "--epochs", 1],
        ["error[steps-and-epochs]", "choose one budget"],
    ),
    "steps without fine-tune": (
        ["--steps", 1, "--no-finetune"],
        ["error[budget-without-finetune]: steps were given"],
    ),
    "drop that is no number": (["--max-drop", "nan"], ["error[max-drop]", "nan"]),
    "negative drop": (["--max-drop", -1], ["error[max-drop]", "-1", "0 or more"]),
    "negative seed": (["--seed", -1], ["error[seed]: seed -1: expected 0 to 4294967295"]),
    "unknown format": (["--format", "xml"], ["error[usage]", "'xml'", "'json'"]),
    "quiet and verbose": (["-q", "-v"], ["error[options-conflict]", "--quiet"]),
    "empty scope": (["--scope", ""], ["error[empty-option]: --scope"]),
    "empty target": (["--target", ","], ["error[empty-option]: --target"]),
    "data of a model file": (
        ["--data", "imagefolder:x"],
        ["error[option-for-library-models]: --data", "timm:NAME"],
    ),
    "weights of a model file": (
        ["--weights", "pretrained"],
        ["error[option-for-library-models]: --weights"],
    ),
}


@pytest.mark.parametrize("name", OPTIONS)
def test_a_bad_option_is_refused_before_anything_runs(name: str, refused: Refused) -> None:
    args, parts = OPTIONS[name]
    if "tensorrt" in args and tensorrt_is_here():
        pytest.skip("TensorRT is installed here")
    run = refused(TINY, "--rules", "int8", *args)
    assert "top-1 dense" not in run.err
    for part in parts:
        assert part in run.error


def tensorrt_is_here() -> bool:
    from gpusq_compile.engine.backends import choose_backend
    from gpusq_compile.errors import InputError

    try:
        return choose_backend("tensorrt", ["portable"])[0] is not None
    except InputError:
        return False


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_a_gpu_that_is_not_there_is_an_error(refused: Refused) -> None:
    error = refused(TINY, "--rules", "int8", "--device", "cuda:1").error
    assert "error[no-cuda]: device 'cuda:1' was asked for" in error
    assert "leave --device out" in error


@pytest.mark.parametrize(
    ("args", "missing"),
    [([], "MODEL"), (["--rules", "int8"], "MODEL"), ([str(TINY)], "--rules")],
)
def test_what_is_missing_is_named_with_an_example(
    args: list[str], missing: str, refused: Refused
) -> None:
    error = refused(*args).error
    assert f"error[usage]: Missing {missing}. Example: gpusq-compile model.py --rules int8" in error


def test_an_option_without_its_value_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = compile_here(monkeypatch, capsys, TINY, "--rules")
    check_refused(run)
    assert "error[usage]: Option '--rules' requires an argument." in run.error
