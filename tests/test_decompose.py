"""Operators without a translation to ONNX: decomposed alone and exactly, or refused by name."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from onnxscript import FLOAT, opset21
from torch import Tensor, nn
from torch.onnx._internal.exporter._registration import ONNXRegistry

from gpusq_compile.errors import CheckFailed, InputError
from gpusq_compile.lowering.decompose import decompose, is_translated, untranslatable
from gpusq_compile.lowering.exporter_table import OPSET, made_once, translations
from gpusq_compile.lowering.precision import to_half
from gpusq_compile.lowering.runtime import open_session, run_session
from gpusq_compile.lowering.to_onnx import to_onnx
from gpusq_compile.passes.trace import unlift
from gpusq_compile.quantization.operators import QUANTIZE
from tests.compilations import begin, make_rules, run_until
from tests.models import Perceptron, noise

SIZE = (2, 4, 8, 8)


class Calls(nn.Module):
    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


def program_of(model: nn.Module) -> torch.export.ExportedProgram:
    shapes = ({0: torch.export.Dim("batch")},)
    return torch.export.export(model.eval(), (noise(*SIZE),), dynamic_shapes=shapes)


def mesh(x: Tensor) -> Tensor:
    rows, columns = torch.meshgrid(torch.arange(8.0), torch.arange(8.0), indexing="ij")
    return x * rows - columns


FUNCTIONS = {
    "meshgrid": mesh,
    "and": lambda x: ((x > 0) & (x < 1)).float(),
    "rsub": lambda x: 1 - x.sigmoid(),
    "even pooling": lambda x: F.adaptive_avg_pool2d(x, 2),
    "uneven pooling": lambda x: F.adaptive_avg_pool2d(x, 3),
    "pooling of channels last": lambda x: F.adaptive_avg_pool2d(
        x.to(memory_format=torch.channels_last), 1
    ),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_what_the_exporter_lacks_is_said_with_what_it_has(name: str) -> None:
    module = unlift(program_of(Calls(FUNCTIONS[name])))
    graph = module.graph
    known = all(is_translated(n.target) for n in graph.nodes if n.op == "call_function")
    expected = [module(noise(size, *SIZE[1:], seed=size)) for size in (2, 3)]
    assert untranslatable(graph) is None
    assert (decompose(graph) == 0) is known
    graph.lint()
    module.recompile()
    assert all(is_translated(n.target) for n in graph.nodes if n.op == "call_function")
    for size, value in zip((2, 3), expected, strict=True):
        found = module(noise(size, *SIZE[1:], seed=size))
        torch.testing.assert_close(found, value, rtol=1e-5, atol=1e-6)


def test_most_examples_need_it() -> None:
    """Else the test above would show nothing."""
    needed = [
        name
        for name, function in FUNCTIONS.items()
        if decompose(unlift(program_of(Calls(function))).graph)
    ]
    assert len(needed) >= 4


def test_a_frozen_batch_norm_is_exported_exactly() -> None:
    norm = nn.BatchNorm2d(4)
    norm.running_mean, norm.running_var = noise(4), noise(4, seed=2).square() + 0.1
    program = program_of(nn.Sequential(norm, nn.ReLU()))
    images = noise(3, *SIZE[1:], seed=5)
    session = open_session(to_onnx(decomposed(program)).SerializeToString())
    with torch.no_grad():
        expected = nn.Sequential(norm, nn.ReLU()).eval()(images)
    torch.testing.assert_close(run_session(session, [images])[0], expected, rtol=1e-5, atol=1e-5)


def decomposed(program: torch.export.ExportedProgram) -> torch.export.ExportedProgram:
    assert decompose(program.graph) == 1
    return program


class Unknown(nn.Module):
    """torch can trace it; ONNX has no such operator."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(32, 32)

    def forward(self, x: Tensor) -> Tensor:
        return torch.kthvalue(self.layer(x), 2, dim=1, keepdim=True)[0]


def test_an_operator_that_onnx_lacks_is_refused_before_any_work_with_its_place() -> None:
    with pytest.raises(InputError) as caught:
        run_until(begin(Unknown().eval(), noise(2, 32), make_rules()), "canonicalize")
    assert caught.value.code == "operator-unsupported"
    assert "kthvalue" in caught.value.message
    assert "--scope" in (caught.value.hint or "")
    place = caught.value.location
    assert place is not None
    assert place.file.endswith("test_decompose.py")
    lines = Path(__file__).read_text().splitlines()
    assert "torch.kthvalue" in lines[(place.line or 0) - 1]


class Sampler(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(32, 32)

    def forward(self, x: Tensor) -> Tensor:
        grid = torch.zeros_like(x[:, :, :2, None]).transpose(2, 3)
        return F.grid_sample(self.layer(x)[:, None], grid, align_corners=False)


def test_a_use_that_the_exporter_cannot_translate_is_named_with_its_place() -> None:
    model = Sampler().eval()
    compilation = run_until(begin(model, noise(2, 4, 32), make_rules()), "split_outputs")
    for node in compilation.ir.graph.nodes:
        if node.target is torch.ops.aten.grid_sampler.default:
            node.args = (*node.args[:2], 7, *node.args[3:])  # No such interpolation mode.
    with pytest.raises(CheckFailed) as caught:
        run_until(compilation, "export_onnx")
    assert caught.value.code == "onnx-export"
    assert "grid_sampler" in caught.value.message
    assert caught.value.location is not None
    assert caught.value.location.file.endswith("test_decompose.py")


class Pyramid(nn.Module):
    """Two resizes read one tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = Perceptron((8, 32, 8))

    def forward(self, x: Tensor) -> Tensor:
        y = self.inner(x)
        larger = F.interpolate(y, size=(16, 16), mode="bilinear")
        return larger + F.interpolate(F.interpolate(y, size=(4, 4)), size=(16, 16))


def test_resizes_are_half_precision_too() -> None:
    model = Pyramid().eval()
    onnx_model = to_onnx(program_of(model))
    half = open_session(to_half(onnx_model).SerializeToString())
    images = noise(*SIZE)
    with torch.no_grad():
        expected = model(images)
    torch.testing.assert_close(run_session(half, [images])[0], expected, rtol=1e-2, atol=1e-2)


def test_the_exporters_table_is_made_once(monkeypatch: pytest.MonkeyPatch) -> None:
    translations()
    made = []
    own = ONNXRegistry.from_torchlib

    def counted(*args: Any, **asked: Any) -> ONNXRegistry:
        made.append(asked)
        return own(*args, **asked)

    monkeypatch.setattr(ONNXRegistry, "from_torchlib", counted)
    to_onnx(program_of(Calls(torch.relu)))
    assert made == []


def test_a_library_with_operators_of_its_own_may_come_later(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    importlib.import_module("torchvision")
    with_library = translations()
    assert with_library.is_registered(torch.ops.torchvision.nms.default)
    monkeypatch.delitem(sys.modules, "torchvision")
    assert translations() is not with_library
    monkeypatch.undo()
    assert translations() is with_library


def test_nothing_is_added_to_the_exporters_table() -> None:
    own = vars(ONNXRegistry)["from_torchlib"]
    before = {target: list(found) for target, found in translations().functions.items()}
    with made_once():
        table = ONNXRegistry.from_torchlib(opset_version=OPSET)
        table.register_op(QUANTIZE, quantize)
        table.register_op(torch.ops.aten.relu.default, quantize)
        assert table.is_registered(QUANTIZE)
        other = ONNXRegistry.from_torchlib(opset_version=OPSET - 1)
    assert vars(ONNXRegistry)["from_torchlib"] is own
    assert translations().functions == before
    assert table.opset_version == OPSET
    assert other.opset_version == OPSET - 1


def quantize(value: FLOAT) -> FLOAT:
    return opset21.Relu(value)
