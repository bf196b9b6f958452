"""Models that cannot be compiled are refused at the command line, with the way out."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from gpusq_compile import compile_model
from gpusq_compile.errors import InputError
from tests.command_line import ONE_SHOT, compile_here, line_of, variant
from tests.models import noise, seeded

MODEL = "def model():  # made here\n    return "


def forward(*lines: str) -> str:
    """A model file's end, with a network that does something else with its logits `y`."""
    body = "".join(f"        {line}\n" for line in lines)
    return (
        "class Odd(TinyNet):\n    calls = 0\n\n    def forward(self, x):\n"
        f"        y = super().forward(x)\n        self.calls += 1\n{body}\n{MODEL}Odd().eval()\n"
    )


# The lines added to the tiny model file, the error's code, a text whose line it names (None: no
# place), parts of the message.
CASES: dict[str, tuple[str, str, str | None, list[str]]] = {
    "a TorchScript model": (
        f"{MODEL}torch.jit.trace(TinyNet().eval(), torch.zeros(2, 1, 8, 8))\n",
        "model-is-a-program",
        "# made here",
        ["the model is a TorchScript program", "expected a torch.nn.Module", "torch.jit.trace()"],
    ),
    "a part in TorchScript": (
        f"{MODEL}nn.Sequential(TinyNet(), torch.jit.script(nn.Linear(4, 4))).eval()\n",
        "model-is-a-program",
        "# made here",
        ["the submodule '1' is a TorchScript program"],
    ),
    "an exported model": (
        f"{MODEL}torch.export.export(TinyNet(), (torch.zeros(2, 1, 8, 8),)).module()\n",
        "model-is-a-program",
        "# made here",
        ["an exported program (GraphModule)", "torch.export.export()"],
    ),
    "weights without a shape": (
        f"{MODEL}nn.Sequential(TinyNet(), nn.LazyLinear(8)).eval()\n",
        "weights-not-loaded",
        "# made here",
        ["1.weight has neither shape nor values", "call the model once"],
    ),
    "another count of outputs": (
        forward("return (y,) * self.calls"),
        "not-deterministic",
        "# made here",
        ["give 1 and 2 tensors", "keep anything else from one to the next"],
    ),
    "another size of the output": (
        forward("return torch.cat([y] * self.calls, dim=1)"),
        "not-deterministic",
        "# made here",
        ["float32 [2, 4] and float32 [2, 8] for output 0"],
    ),
    "another type of the output": (
        forward("return y if self.calls % 2 else y.double()"),
        "not-deterministic",
        "# made here",
        ["float32 [2, 4] and float64 [2, 4] for output 0"],
    ),
    "a number alone": (
        forward("return y.mean()"),
        "outputs-kind",
        "# made here",
        ["a number, float32 []", "the batch first", "[batch, classes]"],
    ),
    "no output": (
        forward("return None"),
        "outputs-kind",
        "# made here",
        ["forward() returns None", "--scope"],
    ),
    "a size": (
        forward("return y, x.shape[0]"),
        "outputs-kind",
        None,
        ["returns a size of a tensor as output 1, expected tensors"],
    ),
    "weights made under inference mode": (
        f"{MODEL}inside()\n\n@torch.inference_mode()\ndef inside():\n    return TinyNet().eval()\n",
        "weights-inference",
        "# made here",
        ["was made under torch.inference_mode()", "torch.no_grad()"],
    ),
    "a parameter": (
        forward("return y, self.norm.weight"),
        "outputs-constant",
        None,
        ["'norm.weight' of the model as it is, as output 1", "depends on no input"],
    ),
    "a constant": (
        forward("return y, torch.ones(3)  # constant"),
        "outputs-constant",
        "# constant",
        ["a constant, as output 1"],
    ),
    "one tensor twice": (
        forward("return y, y + 1, y"),
        "outputs-alias",
        "return self.head",
        ["one tensor twice, as output 0 and as output 2"],
    ),
    "an input": (
        forward("return x, y"),
        "outputs-alias",
        None,
        ["returns its input 'x' as it is, as output 0"],
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_it_is_named_with_its_place_and_the_way_out(
    name: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    extra, code, at, parts = CASES[name]
    monkeypatch.chdir(tmp_path)
    path = variant(tmp_path, extra + "\ndef logits(outputs):\n    return outputs[0]\n")
    run = compile_here(monkeypatch, capsys, path.name, *ONE_SHOT, "-o", "out")
    assert run.code == 2, run
    place = "" if at is None else f"variant.py:{line_of(path, at)}: "
    assert run.error.startswith(f"{place}error[{code}]: "), run.error
    assert "hint: " in run.error
    text = " ".join(run.error.split())
    for part in parts:
        assert part in text, run.error
    assert not Path("out").exists()


class Pixels(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.patches, self.head = torch.nn.Conv2d(3, 32, 4, stride=4), torch.nn.Linear(32, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.head(self.patches(x).mean(dim=(-2, -1)))
        return found


def test_an_image_without_a_batch_is_named_as_one() -> None:
    with pytest.raises(InputError) as caught:
        compile_model(
            seeded(Pixels), (noise(3, 16, 16),), rules="int8", finetune=False, engine="none"
        )
    error = caught.value
    assert error.code == "example-inputs"
    assert "float32 [3, 16, 16], whose first dimension is taken for the batch" in error.message
    assert "forward() takes float32 [1, 3, 16, 16]" in error.message
    assert "unsqueeze(0)" in (error.hint or "")


def test_what_the_model_says_itself_is_heard_where_nobody_knows_the_batch() -> None:
    class Failing(Pixels):
        def forward(self, x: torch.Tensor, other: torch.Tensor | None = None) -> torch.Tensor:
            raise RuntimeError("no such mode")

    with pytest.raises(InputError, match="no such mode"):
        compile_model(
            seeded(Failing),
            (noise(1, 3, 16, 16), noise(1, 3)),
            rules="int8",
            dynamic_shapes=({0: torch.export.Dim("batch")}, {0: torch.export.Dim("batch")}),
            finetune=False,
            engine="none",
        )


def test_data_that_the_model_cannot_take_is_not_blamed_on_the_example() -> None:
    class Words(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.head = torch.nn.Embedding(16, 32), torch.nn.Linear(32, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            found: torch.Tensor = self.head(self.table(x).mean(dim=-2))
            return found

    example, beyond = torch.zeros(2, 8).long(), torch.full((2, 8), 99)
    with pytest.raises(InputError) as caught:
        compile_model(
            seeded(Words),
            (example,),
            rules="int8",
            finetune=False,
            engine="none",
            calibration_data=[(beyond, None)],
        )
    assert caught.value.code == "forward-failed"
    assert "IndexError" in caught.value.message


def test_inputs_that_no_batch_makes_right_keep_the_models_own_message() -> None:
    with pytest.raises(InputError) as caught:
        compile_model(
            seeded(Pixels), (noise(2, 5, 16, 16),), rules="int8", finetune=False, engine="none"
        )
    assert caught.value.code == "forward-failed"
    assert "to have 3 channels" in caught.value.message
