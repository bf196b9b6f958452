"""Each pass that rewrites the ONNX model is checked, compared with what was before, and dumped."""

from __future__ import annotations

from pathlib import Path

import onnx
import pytest

from gpusq_compile.compilation import Compilation
from gpusq_compile.driver import run_pass
from gpusq_compile.errors import InternalError
from gpusq_compile.lowering.text import onnx_text
from gpusq_compile.pass_base import Pass, PassResult
from tests.compilations import begin, fork, make_rules, run_until
from tests.models import Perceptron, noise, seeded

STEPS = ("surgery", "set_precision", "store_int4")
BLOCKS = {
    "id": "first",
    "match": {"name": "first"},
    "quantize": {"weight": "int4", "activation": "none", "block": 64},
}


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> Compilation:
    compilation = begin(
        seeded(Perceptron, (128, 64, 32)),
        noise(4, 5, 128),
        make_rules(BLOCKS, precision="fp16"),
        tmp_path_factory.mktemp("steps"),
        dump_after=("all",),
    )
    return run_until(compilation, "store_int4")


def dumps(compilation: Compilation) -> dict[str, str]:
    """The texts by pass, in order."""
    files = sorted((compilation.workdir / "dumps").iterdir())
    return {path.stem.split("-", 1)[1]: path.read_text() for path in files}


def test_each_step_has_its_change_measured_against_the_one_before(stored: Compilation) -> None:
    changes = {record.name: record.change for record in stored.records}
    wired, halved, packed = (changes[step] for step in STEPS)
    assert wired is not None
    assert wired < 1e-4
    assert halved is not None
    assert 0 < halved < 0.05
    # Other bytes, the same numbers.
    assert packed == 0


def test_each_step_leaves_its_own_text(stored: Compilation) -> None:
    texts = dumps(stored)
    assert "stored first.weight: int8 [64, 128]" in texts["export_onnx"]
    assert "stored first.weight: int8 [128, 64]" in texts["surgery"]
    assert "float16" not in texts["surgery"]
    assert "stored second.weight: float16 [64, 32]" in texts["set_precision"]
    assert "stored first.weight: int4 [128, 64]" in texts["store_int4"]
    assert "# first\n" in texts["store_int4"]
    assert texts["store_int4"].splitlines()[0] == "input x: float ['batch', 5, 128]"


def test_a_text_shows_no_values_and_every_operator(stored: Compilation) -> None:
    assert stored.onnx_model is not None
    text = onnx_text(stored.onnx_model)
    assert len(text) < 4000
    assert sum(" = " in line for line in text.splitlines()) == len(stored.onnx_model.graph.node)


def test_a_step_that_leaves_an_invalid_model_is_an_internal_error(
    stored: Compilation, tmp_path: Path
) -> None:
    compilation = fork(stored)
    compilation.workdir = tmp_path

    def break_it(broken: Compilation) -> PassResult:
        assert broken.onnx_model is not None
        broken.onnx_model = onnx.ModelProto.FromString(broken.onnx_model.SerializeToString())
        broken.onnx_model.graph.node[0].op_type = "NoSuchOperator"
        return PassResult(matched=1, changed=1)

    step = Pass("breaks", "breaks the model", break_it, rewrites_onnx=True)
    with pytest.raises(InternalError, match="pass 'breaks' left"):
        run_pass(compilation, step)
