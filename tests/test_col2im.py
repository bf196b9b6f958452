"""`nn.Fold` as a transposed convolution: the same sums, any batch, and an engine that reads it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from gpusq_compile import compile_model
from gpusq_compile.graph.col2im import spell_out_fold
from gpusq_compile.remarks import Kind
from tests.compilations import begin, make_rules, remarks_of, run_until, targets
from tests.models import noise

pairs = st.tuples(st.integers(1, 3), st.integers(1, 3))


class Fold(nn.Module):
    def __init__(self, size: tuple[int, int], **arguments: Any) -> None:
        super().__init__()
        self.arguments = {"output_size": size, **arguments}

    def forward(self, x: Tensor) -> Tensor:
        return F.fold(x, **self.arguments)


def fold_of(graph_module: torch.fx.GraphModule) -> torch.fx.Node:
    target = torch.ops.aten.col2im.default
    [node] = graph_module.graph.find_nodes(op="call_function", target=target)
    return node


@settings(max_examples=25, deadline=None)
@given(
    channels=st.integers(1, 3),
    size=st.tuples(st.integers(1, 9), st.integers(1, 9)),
    kernel=pairs,
    dilation=pairs,
    padding=st.tuples(st.integers(0, 2), st.integers(0, 2)),
    stride=pairs,
    batched=st.booleans(),
)
def test_the_sums_are_the_same_for_every_geometry(
    channels: int,
    size: tuple[int, int],
    kernel: tuple[int, int],
    dilation: tuple[int, int],
    padding: tuple[int, int],
    stride: tuple[int, int],
    batched: bool,
) -> None:
    axes = list(zip(size, kernel, dilation, padding, stride, strict=True))
    places = [(n + 2 * p - d * (k - 1) - 1) // s + 1 for n, k, d, p, s in axes]
    assume(min(places) >= 1)
    arguments = {
        "kernel_size": kernel,
        "dilation": dilation,
        "padding": padding,
        "stride": stride,
    }
    model = Fold(size, **arguments).eval()
    rows = (channels * kernel[0] * kernel[1], places[0] * places[1])
    columns = noise(2, *rows) if batched else noise(*rows)
    graph_module = torch.export.export(model, (columns,)).graph_module
    assert spell_out_fold(graph_module, fold_of(graph_module)) is None
    graph_module.recompile()
    torch.testing.assert_close(graph_module(columns)[0], model(columns))


SUMMED = ["aten.reshape.default", "aten.convolution.default"]
ORDERED = ["aten.reshape.default", "aten.permute.default", "aten.reshape.default"]


@pytest.mark.parametrize(("padding", "stride", "form"), [(1, 2, SUMMED), (0, 3, ORDERED)])
def test_any_batch_is_folded(padding: int, stride: int, form: list[str]) -> None:
    model = Fold((6, 6), kernel_size=3, padding=padding, stride=stride).eval()
    two, five = (noise(batch, 36, 9 if stride == 2 else 4) for batch in (2, 5))
    compilation = run_until(begin(model, (two,), make_rules()), "canonicalize")
    assert targets(compilation) == form
    torch.testing.assert_close(compilation.ir(five), model(five))


def test_a_map_of_a_size_that_varies_is_left_to_the_exporter() -> None:
    class Same(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            columns = F.unfold(x, 3, padding=1)
            return F.fold(columns, (x.shape[2], x.shape[3]), 3, padding=1)

    height = torch.export.Dim("height", min=4, max=16)
    program = torch.export.export(Same(), (noise(2, 4, 8, 8),), dynamic_shapes=({2: height},))
    graph_module = program.graph_module
    refusal = spell_out_fold(graph_module, fold_of(graph_module))
    assert refusal == "the size of the map is not static"


def test_channels_of_a_number_that_varies_are_left_to_the_exporter() -> None:
    model = Fold((4, 4), kernel_size=2, stride=2)
    channels = torch.export.Dim("channels", min=2, max=16)
    program = torch.export.export(model, (noise(2, 12, 4),), dynamic_shapes=({1: 4 * channels},))
    graph_module = program.graph_module
    refusal = spell_out_fold(graph_module, fold_of(graph_module))
    assert refusal is not None
    assert refusal.startswith("the number of channels is not static")


@pytest.mark.parametrize("batched", [True, False])
def test_patches_that_tile_the_map_are_only_put_into_order(batched: bool) -> None:
    model = Fold((6, 12), kernel_size=(3, 4), stride=(3, 4)).eval()
    columns = noise(2, 24, 6) if batched else noise(24, 6)
    columns[..., 0] = torch.inf
    graph_module = torch.export.export(model, (columns,)).graph_module
    assert spell_out_fold(graph_module, fold_of(graph_module)) is None
    found = {str(node.target) for node in graph_module.graph.nodes if node.op == "call_function"}
    assert found == {"aten.reshape.default", "aten.permute.default"}
    graph_module.recompile()
    assert torch.equal(graph_module(columns)[0], model(columns))


def test_a_convolution_of_huge_weights_is_refused_with_the_reason() -> None:
    model = Fold((64, 64), kernel_size=32, stride=16).eval()
    compilation = begin(model, (torch.zeros(2, 32 * 1024, 9),), make_rules())
    compilation = run_until(compilation, "canonicalize")
    assert targets(compilation) == ["aten.col2im.default"]
    [remark] = remarks_of(compilation, "canonicalize")
    assert (remark.code, remark.kind) == ("col2im", Kind.ANALYSIS)
    assert remark.reason.endswith("a convolution's weights would take 128 MB, limit 64")


class Outlook(nn.Module):
    """A linear per place whose answers are summed over the places' neighbourhoods."""

    def __init__(self) -> None:
        super().__init__()
        self.values = nn.Linear(32, 9 * 32)
        self.head = nn.Linear(32, 32)

    def forward(self, x: Tensor) -> Tensor:
        columns = self.values(x.flatten(2).transpose(1, 2)).transpose(1, 2)
        summed = F.fold(columns, (8, 8), 3, padding=1)
        return self.head(summed.flatten(2).transpose(1, 2))


def test_an_engine_is_built_of_it(tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx")
    torch.manual_seed(0)
    result = compile_model(
        Outlook().eval(),
        (noise(2, 32, 8, 8),),
        rules="int8",
        calibration_data=[(noise(2, 32, 8, 8, seed=2),)],
        finetune=False,
        engine="tensorrt-rtx",
        output=tmp_path / "out",
    )
    assert result.report["status"] == "ok"
    assert result.onnx_model is not None
    operators = {node.op_type for node in result.onnx_model.graph.node}
    assert "ConvTranspose" in operators
    assert "Col2Im" not in operators
    assert not [name for name in result.state_dict() if "fold" in name]
