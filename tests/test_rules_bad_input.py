"""Every bad rules file ends with one InputError: its code, its place and a way out."""

from __future__ import annotations

import textwrap
from pathlib import Path
from typing import Any

import pytest

from gpusq_compile.errors import EXIT_BAD_INPUT, InputError
from gpusq_compile.language.loader import load_rules
from gpusq_compile.language.problems import CODES, InputErrors

DATA = Path(__file__).parent / "data" / "rules"


def failure(spec: Any) -> InputError:
    with pytest.raises(InputError) as caught:
        load_rules(spec)
    error = caught.value
    assert error.exit_code == EXIT_BAD_INPUT
    assert error.code in CODES
    return error


def rule(text: str, **rest: str) -> str:
    """A file with one rule, whose lines start in line 3 column 5."""
    return "version: 1\nrules:\n  - " + textwrap.indent(textwrap.dedent(text), " " * 4).lstrip()


def phase(text: str, name: str = "sparse") -> str:
    """A file without rules, with one block of the fine-tune in line 4."""
    return f"version: 1\nrules: []\nfinetune:\n  {name}: {text}\n"


LINEAR = "id: a\nmatch: {op: linear}\n"

# name: (text, code, line, column, part of the message, part of the hint)
CASES: dict[str, tuple[str, str, int | None, int | None, str, str]] = {
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
    "negative lr": (
        "version: 1\nrules: []\nfinetune:\n  sparse: {lr: -1e-4}\n",
        "out-of-range",
        4,
        16,
        "greater than 0, found -0.0001",
        "",
    ),
    "no epochs": (
        "version: 1\nrules: []\nfinetune:\n  quantize: {epochs: 0}\n",
        "out-of-range",
        4,
        22,
        "epochs",
        "",
    ),
    "nan": (
        "version: 1\nrules: []\nfinetune:\n  loss: {alpha: .nan}\n",
        "not-finite",
        4,
        17,
        "alpha",
        "",
    ),
    "infinity": (
        "version: 1\nrules: []\nverify: {max_difference: .inf}\n",
        "not-finite",
        3,
        26,
        "max_difference",
        "",
    ),
    "too large for a float": (
        "version: 1\nrules: []\nverify: {max_difference: 1e999}\n",
        "not-finite",
        3,
        26,
        "max_difference",
        "",
    ),
    "quoted number": (
        "version: 1\nrules: []\nfinetune:\n  sparse: {lr: '1e-4'}\n",
        "wrong-type",
        4,
        16,
        "a number, found '1e-4'",
        "remove the quotes",
    ),
    "fraction of a batch": (
        "version: 1\nrules: []\ncalibration: {batches: 1.5}\n",
        "wrong-type",
        3,
        24,
        "a whole number, found 1.5",
        "",
    ),
    "true is no number": (
        "version: 1\nrules: []\ncalibration: {batches: true}\n",
        "wrong-type",
        3,
        24,
        "found true",
        "",
    ),
    "percentile above 100": (
        "version: 1\nrules: []\ncalibration: {percentile: 101}\n",
        "out-of-range",
        3,
        27,
        "at most 100",
        "",
    ),
    "percentile that is not used": (
        "version: 1\nrules: []\ncalibration: {activation: max, percentile: 99}\n",
        "unused-key",
        3,
        32,
        "no effect with `activation: max`",
        "remove it",
    ),
    "momentum of 1": (
        phase("{momentum: 1}"),
        "out-of-range",
        4,
        22,
        "less than 1, found 1",
        "",
    ),
    "milestones without multistep": (
        phase("{milestones: [27, 33]}"),
        "unused-key",
        4,
        12,
        "no effect with `schedule: cosine`",
        "`schedule: multistep`",
    ),
    "multistep without milestones": (
        phase("{schedule: multistep}"),
        "missing-key",
        4,
        22,
        "needs the key 'milestones'",
        "`milestones: [27, 33]`",
    ),
    "multistep with milestones switched off": (
        phase("{schedule: multistep, milestones: none}"),
        "missing-key",
        4,
        22,
        "'milestones'",
        "",
    ),
    "milestones out of order": (
        phase("{schedule: multistep, milestones: [33, 27]}"),
        "invalid-value",
        4,
        45,
        "27 comes after 33",
        "",
    ),
    "milestone twice": (
        phase("{schedule: multistep, milestones: [27, 27.0]}"),
        "duplicate-value",
        4,
        45,
        "27 is listed twice",
        "",
    ),
    "no milestones": (
        phase("{schedule: multistep, milestones: []}"),
        "empty-value",
        4,
        45,
        "at least one value",
        "",
    ),
    "milestone at the start": (
        phase("{schedule: multistep, milestones: [0, 3]}"),
        "out-of-range",
        4,
        46,
        "greater than 0, found 0",
        "",
    ),
    "milestones is a number": (
        phase("{schedule: multistep, milestones: 27}"),
        "wrong-type",
        4,
        45,
        "a list, found 27",
        "",
    ),
    "step without its size": (
        phase("{schedule: step}", "quantize"),
        "missing-key",
        4,
        24,
        "needs the key 'step_size'",
        "`step_size: 40`",
    ),
    "step size without step": (
        phase("{schedule: constant, step_size: 40}"),
        "unused-key",
        4,
        32,
        "no effect with `schedule: constant`",
        "`schedule: step`",
    ),
    "step size 0": (
        phase("{schedule: step, step_size: 0}"),
        "out-of-range",
        4,
        39,
        "greater than 0, found 0",
        "",
    ),
    "decay without steps": (
        phase("{decay: 0.5}", "quantize"),
        "unused-key",
        4,
        14,
        "decay has no effect with `schedule: cosine`",
        "`schedule: multistep` or `schedule: step`",
    ),
    "decay that grows": (
        phase("{schedule: step, step_size: 1, decay: 1.5}"),
        "out-of-range",
        4,
        49,
        "less than 1, found 1.5",
        "",
    ),
    "power without polynomial": (
        phase("{schedule: cosine, power: 2}"),
        "unused-key",
        4,
        30,
        "no effect with `schedule: cosine`",
        "`schedule: polynomial`",
    ),
    "negative power": (
        phase("{schedule: polynomial, power: -1}"),
        "out-of-range",
        4,
        41,
        "greater than 0, found -1",
        "",
    ),
    "unknown schedule, and nothing about the keys of it": (
        phase("{schedule: multi_step, milestones: [3], decay: 0.5}"),
        "unknown-value",
        4,
        22,
        "'multi_step'",
        "did you mean 'multistep'?",
    ),
    "batch size 0": (phase("{batch_size: 0}"), "out-of-range", 4, 24, "at least 1, found 0", ""),
    "evaluation every 0 steps": (
        phase("{eval_every: 0}"),
        "out-of-range",
        4,
        24,
        "at least 1, found 0",
        "",
    ),
    "misspelt keep": (
        phase("{keep: bets}"),
        "unknown-value",
        4,
        18,
        "last or best",
        "did you mean 'best'?",
    ),
    "misspelt autocast": (
        phase("{autocast: bf16}"),
        "unknown-value",
        4,
        22,
        "bfloat16 or float16",
        "did you mean 'bfloat16'?",
    ),
    "autocast is true": (phase("{autocast: true}"), "wrong-type", 4, 22, "found true", ""),
    "misspelt labels": (
        "version: 1\nrules: []\nfinetune: {labels: require}\n",
        "unknown-value",
        3,
        20,
        "hard, soft or required",
        "did you mean 'required'?",
    ),
    "reconstruct is true": (
        phase("true", "reconstruct"),
        "wrong-type",
        4,
        16,
        "a mapping or none, found true",
        "{steps: 200}",
    ),
    "reconstruct in no steps": (
        phase("{steps: 0}", "reconstruct"),
        "out-of-range",
        4,
        24,
        "at least 1, found 0",
        "",
    ),
    "epochs of the reconstruction": (
        phase("{epochs: 1}", "reconstruct"),
        "unknown-key",
        4,
        17,
        "'epochs' in finetune.reconstruct",
        "a key of `finetune.sparse`",
    ),
    "no damping": (
        "version: 1\nrules: []\ncalibration: {damping: 0}\n",
        "out-of-range",
        3,
        24,
        "greater than 0",
        "",
    ),
    "misspelt pass": (
        "version: 1\nrules: []\npasses: [tap, sparsfy]\n",
        "unknown-value",
        3,
        15,
        "'sparsfy'",
        "did you mean 'sparsify'?",
    ),
    "pass twice": (
        "version: 1\nrules: []\npasses: [tap, sparsify, tap]\n",
        "duplicate-value",
        3,
        9,
        "tap is listed twice",
        "",
    ),
    "no passes": (
        "version: 1\nrules: []\npasses: []\n",
        "empty-value",
        3,
        9,
        "at least one",
        "",
    ),
    "gptq of a float weight": (
        rule(LINEAR + "quantize: {weight: none, rounding: gptq}\n"),
        "contradiction",
        5,
        40,
        "gptq rounds the weight",
        "`weight`",
    ),
    "smoothing of a float input": (
        rule(LINEAR + "quantize: {weight: int8, activation: none, smooth: 0.5}\n"),
        "contradiction",
        5,
        56,
        "the input stays in float",
        "`activation`",
    ),
    "smoothing above 1": (
        rule(LINEAR + "quantize: {weight: int8, smooth: 1.5}\n"),
        "out-of-range",
        5,
        38,
        "at most 1, found 1.5",
        "",
    ),
    "smoothing below 0": (
        rule(LINEAR + "quantize: {weight: int8, smooth: -0.5}\n"),
        "out-of-range",
        5,
        38,
        "at least 0, found -0.5",
        "",
    ),
    "misspelt rounding": (
        rule(LINEAR + "quantize: {weight: int8, rounding: gtpq}\n"),
        "unknown-value",
        5,
        40,
        "nearest or gptq",
        "did you mean 'gptq'?",
    ),
    "misspelt method": (
        rule(LINEAR + "sparsity: {pattern: '2:4', method: wonda}\n"),
        "unknown-value",
        5,
        40,
        "magnitude, wanda or obs",
        "did you mean 'wanda'?",
    ),
    "permute is text": (
        rule(LINEAR + "sparsity: {pattern: '2:4', permute: yes}\n"),
        "wrong-type",
        5,
        41,
        "true or false, found 'yes'",
        "",
    ),
    "no loss": (
        "version: 1\nrules: []\nfinetune:\n  loss: {alpha: 0, beta: 0, gamma: 0}\n",
        "empty-block",
        4,
        9,
        "nothing to learn from",
        "sparse: none",
    ),
    "scope is a number": ("version: 1\nrules: []\nscope: 3\n", "wrong-type", 3, 8, "text", '"3"'),
    "extends is a mapping": ("version: 1\nextends: {a: 1}\n", "wrong-type", 2, 10, "path", ""),
    "extends a number among names": (
        "version: 1\nextends: [int8, 8]\n",
        "wrong-type",
        2,
        17,
        "a list of them",
        "",
    ),
    "extends nothing": ("version: 1\nextends: []\n", "wrong-type", 2, 10, "path", "int8"),
    "extends one file twice": (
        "version: 1\nextends: [int8, int8]\n",
        "duplicate-value",
        2,
        17,
        "'int8' is listed twice",
        "",
    ),
    "extends of an unknown name": (
        "version: 1\nextends: int9\n",
        "unknown-rules-name",
        2,
        10,
        "'int9'",
        "did you mean 'int8'?",
    ),
    "extends of a missing file": (
        "version: 1\nextends: other.yaml\n",
        "rules-file-missing",
        2,
        10,
        "'other.yaml'",
        "",
    ),
    "extends of a paper's model without its folder": (
        "version: 1\nextends: deit_tiny\n",
        "unknown-rules-name",
        2,
        10,
        "'deit_tiny'",
        "did you mean 'paper/deit_tiny'?",
    ),
    "extends of itself": ("version: 1\nextends: rules.yaml\n", "extends-cycle", 2, 10, "->", ""),
}


@pytest.mark.parametrize("name", CASES)
def test_bad_file_ends_with_its_code_place_and_hint(name: str, tmp_path: Path) -> None:
    text, code, line, column, message, hint = CASES[name]
    path = tmp_path / "rules.yaml"
    path.write_text(text, encoding="utf-8")
    error = failure(path)
    assert not isinstance(error, InputErrors), str(error)
    assert error.location is not None
    place = (error.location.line, error.location.column)
    assert (error.code, *place) == (code, line, column), str(error)
    assert error.location.file.endswith("rules.yaml")
    assert message in error.message, str(error)
    assert hint in (error.hint or ""), str(error)
    assert f"error[{code}]" in str(error)
    for jargon in ("<block>", "union", "pydantic", "Input should", "tag:yaml", "NoneType"):
        assert jargon not in str(error)


def test_every_code_of_a_file_has_a_case() -> None:
    elsewhere = {
        "expect-mismatch",
        "pattern-unmatched",
        "role-unmatched",
        "rule-shadowed",
        "rule-unmatched",
        "rules-file-not-utf8",
        "rules-file-unreadable",
        "rules-is-folder",
    }
    assert {case[1] for case in CASES.values()} == set(CODES) - elsewhere


def test_code_in_a_tag_never_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("code in a tag", "code in the version", "code in a name"):
        (tmp_path / "rules.yaml").write_text(CASES[name][0], encoding="utf-8")
        assert failure(tmp_path / "rules.yaml").code == "yaml-tag"
    assert [path.name for path in tmp_path.iterdir()] == ["rules.yaml"]


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


def test_missing_file_names_a_close_one(tmp_path: Path) -> None:
    (tmp_path / "my-rules.yaml").write_text("version: 1\nrules: []\n")
    error = failure(tmp_path / "my-rule.yaml")
    assert error.code == "rules-file-missing"
    assert "my-rules.yaml" in (error.hint or "")


def test_missing_file_with_a_shipped_name_points_to_the_shipped_rules() -> None:
    for spec in ("int8.yaml", Path("int8")):
        error = failure(spec)
        assert error.code == "rules-file-missing"
        assert "'int8'" in (error.hint or "")


def test_missing_folder_is_said() -> None:
    assert "folder" in (failure("/no/such/place/rules.yaml").hint or "")


@pytest.mark.parametrize("spec", ["int9", "paper/int8", "", "int8\0"])
def test_unknown_shipped_name_lists_the_shipped_ones(spec: str) -> None:
    error = failure(spec)
    assert error.code in ("unknown-rules-name", "rules-is-folder")
    assert "int8" in (error.hint or "")
    assert "sparse-fp16" in (error.hint or "")


def test_folder_in_place_of_a_file(tmp_path: Path) -> None:
    assert failure(tmp_path).code == "rules-is-folder"
    assert failure(str(tmp_path)).code == "rules-is-folder"


def test_file_name_beyond_the_limit_of_the_system() -> None:
    error = failure("x" * 5000 + ".yaml")
    assert error.code == "rules-file-unreadable"
    assert len(str(error)) < 1000


@pytest.mark.skipif(not Path("/proc/self/mem").exists(), reason="needs Linux's /proc")
def test_unreadable_file() -> None:
    error = failure(Path("/proc/self/mem"))
    assert error.code == "rules-file-unreadable"
    assert str(error.location) == "/proc/self/mem"


def test_file_that_is_not_utf8_has_the_place_of_the_byte() -> None:
    error = failure(DATA / "latin1.yaml")
    assert error.code == "rules-file-not-utf8"
    assert error.location is not None
    assert (error.location.line, error.location.column) == (2, 6)
    assert "0xe9" in error.message


def test_binary_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.yaml"
    path.write_bytes(bytes(range(256)) * 8)
    assert failure(path).code in ("yaml-syntax", "rules-file-not-utf8")


def test_huge_file_is_refused_without_reading_all_of_it() -> None:
    assert failure(Path("/dev/zero")).code == "rules-file-too-large"


def test_error_in_the_extended_file_has_that_file_as_its_place(tmp_path: Path) -> None:
    (tmp_path / "base.yaml").write_text("version: 1\nrules: []\nfinetune: {labels: none}\n")
    (tmp_path / "child.yaml").write_text("version: 1\nextends: base.yaml\n")
    error = failure(tmp_path / "child.yaml")
    assert error.code == "unknown-value"
    assert error.location is not None
    assert error.location.file.endswith("base.yaml")
    assert (error.location.line, error.location.column) == (3, 20)


def test_version_of_the_extended_file_is_checked(tmp_path: Path) -> None:
    (tmp_path / "base.yaml").write_text("version: 2\n")
    (tmp_path / "child.yaml").write_text("version: 1\nextends: base.yaml\n")
    error = failure(tmp_path / "child.yaml")
    assert error.code == "unknown-version"
    assert error.location is not None
    assert error.location.file.endswith("base.yaml")


def test_cycle_over_two_files_names_the_way_round() -> None:
    error = failure(DATA / "loop_a.yaml")
    assert error.code == "extends-cycle"
    assert error.message.count("loop_a.yaml") == 2
    assert error.location is not None
    assert error.location.file.endswith("loop_b.yaml")


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
