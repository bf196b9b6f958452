"""A model that is none, on the command line: the exit code, one message with place and way out."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from tests.command_line import ONE_SHOT, TINY, Refused, line_of, variant

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


class TestLibraryModels:
    """`timm:NAME` and `torchvision:NAME`, with their options."""

    @pytest.mark.parametrize(
        ("model", "parts"),
        [
            ("timm:deit_tny_patch16_224", ["no model 'deit_tny", "timm:deit_tiny_patch16_224?"]),
            ("timm:zzz", ["timm has no model 'zzz'", "timm.list_models()"]),
            ("torchvision:vit_b16", ["no model 'vit_b16'", "torchvision:vit_b_16?"]),
            ("torchvision:ViT_B_16", ["no model 'ViT_B_16'", "torchvision:vit_b_16?"]),
            ("timm:deit_tiny", ["timm:deit_tiny_patch16_224?", "names begin so"]),
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
