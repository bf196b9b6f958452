"""Bad input on the command line: the exit code, one message with place and way out, no traces."""

from __future__ import annotations

import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from tests.command_line import ONE_SHOT, TINY, Run, compile_here, finish, line_of, start, variant

WAIT_S = 90.0


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty current folder; messages name files as a person would type them here."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def refused(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Refused:
    return Refused(monkeypatch, capsys)


class Refused:
    """Runs `gpusq-compile ARGS -o out`, which must fail and leave no `out` behind."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
        self.monkeypatch = monkeypatch
        self.capsys = capsys

    def __call__(self, *args: object, output: str = "out") -> Run:
        run = compile_here(self.monkeypatch, self.capsys, *args, "-o", output)
        check_refused(run)
        assert not Path("out").exists()
        return run


def check_refused(run: Run) -> None:
    assert run.code == 2, run
    assert run.out == ""
    assert "Traceback" not in run.err
    assert len(re.findall(r"error\[", run.err)) == 1, run.err


# What is wrong with a model file: the lines added to the tiny one, the error's code, a text whose
# line the error must name (None: the file), parts of the message.
MODEL_FILES: dict[str, tuple[str, str, str | None, list[str]]] = {
    "syntax error": (
        "def broken(:\n    pass\n",
        "model-file-syntax",
        "def broken",
        ["invalid syntax: def broken(:"],
    ),
    "import fails": (
        "import no_such_module_here\n",
        "model-file-failed",
        "import no_such",
        ["importing the model file raised ModuleNotFoundError", "no_such_module_here"],
    ),
    "exits": (
        "import sys\nsys.exit('set DATA first')\n",
        "model-file-failed",
        "sys.exit",
        ["SystemExit: set DATA first"],
    ),
    "no model()": ("del model\n", "no-model-function", None, ["model() -> nn.Module"]),
    "no example_inputs()": (
        "del example_inputs\n",
        "no-example-inputs-function",
        None,
        ["example_inputs() -> tuple"],
    ),
    "similar name": (
        "modle = model\ndel model\n",
        "no-model-function",
        None,
        ["is modle() meant?"],
    ),
    "module in place of model()": (
        "model = TinyNet()\n",
        "not-a-function",
        None,
        ["model is a TinyNet, expected a function"],
    ),
    "model() without return": (
        "def model():  # bad\n    TinyNet()\n",
        "model-not-a-module",
        "# bad",
        ["returned None", "return"],
    ),
    "model() returns a class": (
        "def model():  # bad\n    return TinyNet\n",
        "model-not-a-module",
        "# bad",
        ["the class TinyNet, expected a torch.nn.Module", "TinyNet(...)"],
    ),
    "model() returns weights": (
        "def model():  # bad\n    return TinyNet().state_dict()\n",
        "model-not-a-module",
        "# bad",
        ["OrderedDict", "load_state_dict()"],
    ),
    "model() wants arguments": (
        "def model(pretrained):  # bad\n    return TinyNet()\n",
        "model-file-failed",
        "# bad",
        ["missing 1 required positional argument"],
    ),
    "model() raises": (
        "def model():\n    open('weights.bin')\n",
        "model-file-failed",
        "weights.bin",
        ["model() raised FileNotFoundError", "weights.bin"],
    ),
    "model() asserts": (
        "def model():\n    assert CLASSES == 1000\n",
        "model-file-failed",
        "assert CLASSES",
        ["AssertionError: assert CLASSES == 1000"],
    ),
    "example_inputs() raises": (
        "def example_inputs():\n    return 1 / 0\n",
        "model-file-failed",
        "1 / 0",
        ["example_inputs() raised ZeroDivisionError"],
    ),
    "example_inputs() of numbers": (
        "def example_inputs():  # bad\n    return [1, 2]\n",
        "example-inputs",
        "# bad",
        ["a list without a batched tensor", "batch first"],
    ),
    "NaN weight": (
        "def model():  # bad\n    net = TinyNet()\n    net.fc1.weight.data[0, 0] = float('nan')\n"
        "    return net\n",
        "weights-not-finite",
        "# bad",
        ["fc1.weight [64, 32] is NaN in 1 of 2048 places", "checkpoint"],
    ),
    "infinite weight": (
        "def model():  # bad\n    net = TinyNet()\n    net.head.bias.data[:] = float('inf')\n"
        "    return net\n",
        "weights-not-finite",
        "# bad",
        ["head.bias [4] is infinite in 4 of 4 places"],
    ),
    "half-precision weights": (
        "def model():  # bad\n    return TinyNet().half()\n",
        "weights-not-float32",
        "# bad",
        ["patch_embed.weight [32, 1, 4, 4] is float16, expected float32", "model.float()"],
    ),
    "weights on the meta device": (
        "def model():  # bad\n    return TinyNet().to('meta')\n",
        "weights-not-loaded",
        "# bad",
        ["meta device"],
    ),
    "forward raises": (
        "class Bad(TinyNet):\n    def forward(self, x):\n        raise ValueError('need 3 colours')"
        "\n\ndef model():\n    return Bad()\n",
        "forward-failed",
        "need 3 colours",
        ["forward() raised ValueError: need 3 colours"],
    ),
    "forward raises inside torch": (
        "class Bad(TinyNet):\n    def forward(self, x):\n        return self.head(x)\n\n"
        "def model():\n    return Bad()\n",
        "forward-failed",
        "return self.head(x)",
        ["mat1 and mat2 shapes"],
    ),
    "branch on values": (
        "class Bad(TinyNet):\n    def forward(self, x):\n        y = super().forward(x)\n"
        "        if y.sum() > 0:\n            y = y + 1\n        return y\n\n"
        "def model():\n    return Bad()\n",
        "export-failed",
        "if y.sum() > 0",
        ["cannot trace", "values of a tensor", "torch.where", "--scope PATH"],
    ),
    "number from values": (
        "class Bad(TinyNet):\n    def forward(self, x):\n"
        "        times = int(x.abs().max().item())\n        return super().forward(x) * times\n\n"
        "def model():\n    return Bad()\n",
        "export-failed",
        ".item()",
        ["cannot trace", "--scope PATH"],
    ),
    "fixed batch": (
        "class Bad(TinyNet):\n    def forward(self, x):\n"
        "        return super().forward(x).reshape(2, 4)\n\n"
        "def model():  # bad\n    return Bad()\n",
        "export-failed",
        "# bad",
        ["one batch size", "x.shape[0] or -1"],
    ),
    "wrong dynamic_shapes()": (
        "def dynamic_shapes():  # bad\n    return {'y': {0: torch.export.Dim('b')}}\n",
        "export-failed",
        "# bad",
        ["['x']", "dynamic_shapes()"],
    ),
    "logits is no function": ("logits = 'x'\n", "not-a-function", None, ["logits is a str"]),
    "logits() raises": (
        "def logits(outputs):\n    return outputs.no_such_field\n",
        "model-file-failed",
        "no_such_field",
        ["logits() raised AttributeError"],
    ),
    "logits() of another shape": (
        "def logits(outputs):  # bad\n    return outputs.mean()\n",
        "no-logits",
        "# bad",
        ["float32 []", "[batch, classes]"],
    ),
    "several outputs": (
        "class Two(TinyNet):\n    def forward(self, x):\n        y = super().forward(x)\n"
        "        return {'logits': y, 'aux': y + 1}\n\ndef model():\n    return Two()\n",
        "no-logits",
        "no place",
        ["no single [batch, classes] tensor", "logits(outputs)"],
    ),
}


@pytest.mark.parametrize("name", MODEL_FILES)
def test_a_bad_model_file_is_named_with_its_line(name: str, folder: Path, refused: Refused) -> None:
    extra, code, at, parts = MODEL_FILES[name]
    path = variant(folder, extra)
    error = refused(path.name, *ONE_SHOT).error
    place = {None: "variant.py: ", "no place": ""}.get(at)
    if place is None:
        assert at is not None
        line = line_of(path, at)
        assert re.match(rf"variant\.py:{line}(:\d+)?: error\[{code}\]: ", error), error
    else:
        assert error.startswith(f"{place}error[{code}]: "), error
    for part in parts:
        assert part in error


@pytest.mark.parametrize(
    ("args", "parts"),
    [
        (["tinny.py"], ["error[model-file-missing]: no model file at tinny.py", "mean tiny.py?"]),
        (["nothing/like/it.py"], ["no model file at nothing/like/it.py", "timm:NAME"]),
        (["vit_large"], ["error[model-file-missing]", "did you mean timm:vit_large?"]),
        (["."], ["error[model-file-is-folder]: . is a folder", "a Python file"]),
        (["notes.txt"], ["error[model-file-not-python]: notes.txt", "timm:NAME"]),
        (["tim:deit_tiny"], ["error[unknown-model-library]: no model library 'tim'", "'timm'?"]),
    ],
)
def test_a_model_that_is_not_there_is_named_with_the_nearest_one(
    args: list[str], parts: list[str], folder: Path, refused: Refused
) -> None:
    shutil.copy(TINY, "tiny.py")
    Path("notes.txt").write_text("not a model")
    error = refused(*args, *ONE_SHOT).error
    for part in parts:
        assert part in error


def test_an_error_in_an_imported_file_names_both_files(folder: Path, refused: Refused) -> None:
    Path("cli_helper.py").write_text("def scale(x):\n    return x @ x.new_ones(3, 3)\n")
    path = variant(
        folder,
        "import cli_helper\n\nclass Bad(TinyNet):\n    def forward(self, x):\n"
        "        return cli_helper.scale(x)\n\ndef model():\n    return Bad()\n",
    )
    error = refused(path.name, *ONE_SHOT).error
    assert error.startswith(f"variant.py:{line_of(path, 'cli_helper.scale')}: ")
    assert "(at cli_helper.py:2)" in error


def test_a_long_message_of_the_model_is_cut(folder: Path, refused: Refused) -> None:
    path = variant(folder, "def model():\n    raise KeyError if 0 else ValueError('x\\n' * 500)\n")
    error = refused(path.name, *ONE_SHOT).error
    assert len(error.splitlines()) < 20
    assert "and 488 more lines" in error


# Data that cannot be used: what the function returns, the error's code, parts of the message.
BATCHES: dict[str, tuple[str, str, list[str]]] = {
    "nothing": ("return None", "data-not-iterable", ["returned None, expected an iterable"]),
    "empty": ("return []", "data-empty", ["yielded no batch"]),
    "raises": ("return open('digits.bin')", "model-file-failed", ["digits.bin"]),
    "raises while iterating": (
        "raise OSError('cable out') if True else 0; yield",
        "data-failed",
        ["batch 0 raised OSError: cable out"],
    ),
    "dict": ("return [{'image': i} for i, _ in labelled(1)]", "batch-form", ["is a dict"]),
    "three items": (
        "return [(i, l, l) for i, l in labelled(1)]",
        "batch-form",
        ["has 3 items", "((a, b), labels)"],
    ),
    "numpy": (
        "return [(i.numpy(), l.numpy()) for i, l in labelled(1)]",
        "batch-form",
        ["ndarray", "torch.from_numpy"],
    ),
    "no batch dimension": (
        "return [i[0] for i, _ in labelled(1)]",
        "batch-form",
        ["float32 [1, 8, 8]", "float32 [1, 1, 8, 8]"],
    ),
    "colour images": (
        "return [torch.zeros(16, 3, 8, 8)]",
        "batch-form",
        ["batch 0 has input 0 of float32 [16, 3, 8, 8]", "gives float32 [1, 1, 8, 8]"],
    ),
    "raw bytes": (
        "return [torch.zeros(16, 1, 8, 8, dtype=torch.uint8)]",
        "batch-form",
        ["uint8 [16, 1, 8, 8]"],
    ),
    "two inputs": (
        "return [((i, i), l) for i, l in labelled(1)]",
        "batch-form",
        ["has 2 inputs, example_inputs() has 1"],
    ),
    "empty batch": ("return [torch.zeros(0, 1, 8, 8)]", "batch-form", ["is empty", "[0, 1, 8, 8]"]),
    "NaN images": ("return [i / 0 for i, _ in labelled(1)]", "data-not-finite", ["input 0"]),
    "float labels": (
        "return [(i, l.float()) for i, l in labelled(1)]",
        "labels-kind",
        ["float32 [16]; expected integer class indices", "labels.long()"],
    ),
    "one-hot labels": (
        "return [(i, torch.eye(4)[l]) for i, l in labelled(1)]",
        "labels-kind",
        ["float32 [16, 4]", "labels.argmax(dim=1)"],
    ),
    "column of labels": (
        "return [(i, l[:, None]) for i, l in labelled(1)]",
        "labels-kind",
        ["int64 [16, 1]", "labels.squeeze(1)"],
    ),
    "too few labels": (
        "return [(i, l[:5]) for i, l in labelled(1)]",
        "labels-kind",
        ["5 labels for 16 inputs"],
    ),
    "names as labels": (
        "return [(i, ['a'] * 16) for i, _ in labelled(1)]",
        "labels-kind",
        ["list"],
    ),
    "yes or no": ("return [(i, l > 1) for i, l in labelled(1)]", "labels-kind", ["bool [16]"]),
}


@pytest.mark.parametrize("name", BATCHES)
def test_bad_data_is_named_before_the_model_is_traced(
    name: str, folder: Path, refused: Refused
) -> None:
    body, code, parts = BATCHES[name]
    path = variant(folder, f"def train_data():  # bad\n    {body}\n")
    run = refused(path.name, "--rules", "int8", "--engine", "none")
    assert f"error[{code}]: train_data() " in run.error
    line = line_of(path, "# bad") + (1 if "raises" in name else 0)
    assert run.error.startswith(f"variant.py:{line}: ")
    assert "top-1 dense" not in run.err
    for part in parts:
        assert part in run.error


@pytest.mark.parametrize("function", ["calibration_data", "eval_data"])
def test_every_data_function_is_checked(function: str, folder: Path, refused: Refused) -> None:
    path = variant(
        folder, f"def {function}():\n    return [(i, l.float()) for i, l in labelled(1)]\n"
    )
    assert f"error[labels-kind]: {function}() batch 0 " in refused(path.name, *ONE_SHOT).error


def test_a_bad_batch_after_good_ones_is_named_by_its_number(folder: Path, refused: Refused) -> None:
    path = variant(
        folder,
        "def calibration_data():\n    yield from labelled(1)\n    yield torch.zeros(16, 1, 9, 8)\n",
    )
    error = refused(path.name, *ONE_SHOT).error
    assert (
        "error[batch-form]: calibration_data() batch 3 has input 0 of float32 [16, 1, 9, 8]"
        in error
    )


def test_data_that_can_be_read_only_once_is_refused(folder: Path, refused: Refused) -> None:
    path = variant(
        folder, "_data = labelled(1)\n\ndef calibration_data():  # bad\n    return _data\n"
    )
    error = refused(path.name, *ONE_SHOT).error
    assert error.startswith(f"variant.py:{line_of(path, '# bad')}: error[data-iterates-once]: ")
    assert "new iterator in each call" in error


@pytest.mark.parametrize(
    ("function", "labels", "found"),
    [
        ("eval_data", "l + 1", "labels from 1 to 4"),
        ("train_data", "l - 1", "labels from -1 to 2"),
    ],
)
def test_labels_outside_the_models_classes_are_refused(
    function: str, labels: str, found: str, folder: Path, refused: Refused
) -> None:
    path = variant(
        folder, f"def {function}():\n    return [(i, {labels}) for i, l in labelled(1)]\n"
    )
    error = refused(path.name, "--rules", "int8", "--engine", "none", "--steps", 1).error
    assert f"error[labels-range]: {function}() batch " in error
    assert f"{found}, but the model has 4 classes" in error
    assert "from 0 to 3" in error


@pytest.mark.parametrize(
    ("extra", "args", "parts"),
    [
        (
            "del train_data\n",
            [],
            ["error[no-training-data]", "finetune.sparse", "train_data()", "--no-finetune"],
        ),
        (
            "del train_data, calibration_data\n",
            ["--no-finetune"],
            ["error[no-calibration-data]", "quantize activations", "calibration_data()"],
        ),
        (
            "del eval_data\n",
            ["--max-drop", 1],
            ["variant.py: error[no-labelled-eval-data]", "no eval_data()"],
        ),
        (
            "def eval_data():\n    return [i for i, _ in labelled(3)]\n",
            ["--max-drop", 1],
            ["error[no-labelled-eval-data]", "inputs without labels"],
        ),
    ],
)
def test_missing_data_is_an_error_before_anything_slow_runs(
    extra: str, args: list[object], parts: list[str], folder: Path, refused: Refused
) -> None:
    path = variant(folder, extra)
    run = refused(path.name, "--rules", "int8", "--engine", "none", *args)
    assert "top-1 dense" not in run.err
    for part in parts:
        assert part in run.error


def test_data_is_not_asked_for_what_a_later_rule_takes_back(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = variant(folder, "del train_data, calibration_data, eval_data\n")
    Path("rules.yaml").write_text(
        "version: 1\nextends: sparse-fp16\nfinetune: {sparse: none}\nrules:\n"
        "  - {id: all, match: {op: linear, in_features: 64}, quantize: {weight: int8}}\n"
        "  - {id: none, match: {op: [linear, conv2d]}, quantize: none}\n"
    )
    args = (path.name, "--rules", "rules.yaml", "--engine", "none", "-o", "out")
    assert compile_here(monkeypatch, capsys, *args).code == 0


# Rules files: their text and parts of the message; test_rules_bad_input has all the others.
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


class TestLibraryModels:
    """`timm:NAME` and `torchvision:NAME`, with their options."""

    @pytest.mark.parametrize(
        ("model", "parts"),
        [
            ("timm:deit_tny_patch16_224", ["no model 'deit_tny", "timm:deit_tiny_patch16_224?"]),
            ("timm:zzz", ["timm has no model 'zzz'", "timm.list_models()"]),
            ("torchvision:vit_b16", ["no model 'vit_b16'", "torchvision:vit_b_16?"]),
        ],
    )
    def test_an_unknown_model_is_named_with_the_nearest(
        self, model: str, parts: list[str], refused: Refused
    ) -> None:
        pytest.importorskip(model.partition(":")[0])
        error = refused(model, *ONE_SHOT).error
        assert error.startswith("error[unknown-model]: ")
        for part in parts:
            assert part in error

    @pytest.mark.parametrize(
        ("args", "parts"),
        [
            (["--weights", "no.safetensors"], ["error[weights-missing]: no weights at no.safe"]),
            (["--weights", "pretraind"], ["error[weights-missing]", "'pretrained'?"]),
            (["--weights", "broken.bin"], ["error[weights-unreadable]: broken.bin"]),
            (
                ["--weights", "other.safetensors"],
                [
                    "error[weights-mismatch]: other.safetensors",
                    "missing (first: ",
                    "1 not in the model (first: mine)",
                    "1 of another shape (first: head.bias is [7], the model has [1000])",
                ],
            ),
            (["--data", "coco:."], ["error[data-for-another-task]", "imagefolder:DIR"]),
            (["--data", "cocoo:."], ["error[unknown-data]: --data cocoo:.", "'coco'?"]),
            (["--data", "."], ["error[unknown-data]", "did you mean imagefolder:.?"]),
            (["--data", "imagefolder:nowhere"], ["error[data-missing]: no folder at nowhere"]),
            (["--data", "imagefolder:flat"], ["error[data-not-an-imagefolder]: flat", "per class"]),
            (["--data", "imagefolder:torn"], ["error[image-unreadable]: torn/a/1.png: "]),
        ],
    )
    def test_bad_weights_and_data_are_named(
        self, args: list[str], parts: list[str], refused: Refused
    ) -> None:
        pytest.importorskip("timm")
        Path("broken.bin").write_text("not tensors")
        save_file({"head.bias": torch.zeros(7), "mine": torch.zeros(1)}, "other.safetensors")
        Path("flat").mkdir()
        Path("torn/a").mkdir(parents=True)
        Path("torn/a/1.png").write_text("not an image")
        run = refused("timm:test_vit", *ONE_SHOT, *args)
        assert "top-1 dense" not in run.err
        for part in parts:
            assert part in run.error

    def test_a_fine_tune_without_data_is_refused_at_once(self, refused: Refused) -> None:
        pytest.importorskip("timm")
        error = refused("timm:test_vit", "--rules", "int8", "--engine", "none").error
        assert "error[no-training-data]" in error
        assert "--data imagefolder:DIR" in error
        assert "--no-finetune" in error


class TestOutput:
    """An output folder that cannot be made or written."""

    @pytest.mark.parametrize(
        ("output", "parts"),
        [
            ("notes.txt", ["error[output-is-a-file]: notes.txt is a file", "takes a folder"]),
            ("notes.txt/a/b", ["error[output-not-writable]: cannot write to notes.txt/a/b", "-o"]),
            ("", ["error[empty-option]: --output"]),
        ],
    )
    def test_a_path_that_is_no_folder_is_refused(
        self, output: str, parts: list[str], refused: Refused
    ) -> None:
        Path("notes.txt").write_text("keep me")
        run = refused(TINY, *ONE_SHOT, output=output)
        for part in parts:
            assert part in run.error
        assert os.listdir() == ["notes.txt"]
        assert Path("notes.txt").read_text() == "keep me"

    @pytest.mark.skipif(not sys.platform.startswith("linux"), reason="/proc is Linux's")
    def test_a_folder_that_cannot_be_written_is_refused(self, refused: Refused) -> None:
        run = refused(TINY, *ONE_SHOT, output="/proc/gpusq/out")
        assert "error[output-not-writable]: cannot write to /proc/gpusq/out: " in run.error
        assert "top-1 dense" not in run.err

    def test_a_failed_run_leaves_an_earlier_result_alone(
        self, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        Path("out").mkdir()
        Path("out/model.onnx").write_text("an earlier result")
        path = variant(folder, "def model():\n    return None\n")
        check_refused(compile_here(monkeypatch, capsys, path, *ONE_SHOT, "-o", "out"))
        assert os.listdir("out") == ["model.onnx"]
        assert Path("out/model.onnx").read_text() == "an earlier result"


class TestFullDisk:
    """Nothing half-written stays, whichever file the disk had no room for."""

    @pytest.fixture
    def disk(self, folder: Path) -> Iterator[Path]:
        """A mount point; the test mounts it with the size it wants."""
        place = folder / "disk"
        place.mkdir()
        yield place
        subprocess.run(["umount", str(place)], check=False, capture_output=True)

    # Enough for nothing, for the graph, for all but the report, for all but the manifest.
    @pytest.mark.parametrize("kilobytes", [4, 16, 24])
    def test_a_full_disk_leaves_nothing_and_says_what_to_do(
        self,
        kilobytes: int,
        disk: Path,
        monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        mount = ["mount", "-t", "tmpfs", "-o", f"size={kilobytes}k", "tmpfs", str(disk)]
        if shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode:
            pytest.skip("mounting a small file system needs privileges")
        run = compile_here(monkeypatch, capsys, TINY, *ONE_SHOT, "-o", disk / "out")
        check_refused(run)
        assert f"error[disk-full]: cannot write to {disk / 'out'}: No space left" in run.error
        assert "nothing was published; free some space" in run.error
        assert os.listdir(disk) == []

    def test_a_limit_on_file_sizes_leaves_nothing(
        self, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        old = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, old[1]))
        try:
            run = compile_here(monkeypatch, capsys, TINY, *ONE_SHOT, "-o", "out")
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, old)
        check_refused(run)
        assert "error[disk-full]: cannot write to out: File too large" in run.error
        assert os.listdir() == []


# Each says `here` by making a file, then takes long enough for a signal to come.
SLOW = """
import time
from pathlib import Path

def say_here():
    Path("here").touch()
    time.sleep(60)
"""
SLOW_DATA = (
    SLOW
    + """
def train_data():
    return Endless()

class Endless:
    def __len__(self):
        return 1000

    def __iter__(self):
        yield from labelled(1)
        yield from labelled(2)
        say_here()
"""
)
SLOW_EXPORT = (
    SLOW
    + """
class Slow(TinyNet):
    def forward(self, x):
        if torch.compiler.is_exporting():
            say_here()
        return super().forward(x)

def model():
    return Slow()
"""
)


class TestSignals:
    """Ctrl-C and the end of the session: no half-written artifact, and what to do next."""

    @pytest.mark.parametrize(
        ("extra", "number"),
        [
            (SLOW_DATA, signal.SIGINT),
            (SLOW_EXPORT, signal.SIGINT),
            (SLOW_DATA, signal.SIGTERM),
        ],
        ids=["Ctrl-C in the fine-tune", "Ctrl-C in the export", "SIGTERM in the fine-tune"],
    )
    def test_an_interrupted_run_leaves_nothing(
        self, extra: str, number: signal.Signals, folder: Path
    ) -> None:
        path = variant(folder, extra)
        process = start(path, "--rules", "int8", "--engine", "none", "-o", "out", cwd=folder)
        deadline = time.monotonic() + WAIT_S
        while not Path("here").exists() and time.monotonic() < deadline:
            assert process.poll() is None, finish(process)
            time.sleep(0.05)
        assert list(folder.glob("out/.gpusq-staging-*")) != []
        os.killpg(process.pid, number)
        run = finish(process)
        assert run.code == 128 + number
        assert run.out == ""
        assert "interrupted: nothing half-written is left; run the same command again" in run.err
        assert "Traceback" not in run.err
        assert not Path("out").exists()


def test_a_real_process_says_the_same(folder: Path) -> None:
    path = variant(folder, "def model():\n    return None\n")
    run = finish(start(path.name, *ONE_SHOT, "-o", "out", cwd=folder))
    check_refused(run)
    assert run.err.startswith("variant.py:64: error[model-not-a-module]: model() returned None")
    assert not Path("out").exists()
