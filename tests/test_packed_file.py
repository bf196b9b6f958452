"""weights.safetensors and graph.json: all of the network, read back exactly."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from operator import attrgetter
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import numpy_helper
from safetensors.torch import load_file
from torch import Tensor

from gpusq_compile import (
    CheckFailed,
    InternalError,
    compile_model,
    load_packed,
)
from gpusq_compile.gates import Gates
from gpusq_compile.graph.as_json import graph_tensors
from gpusq_compile.output import digest
from gpusq_compile.packed_file import write_packed
from gpusq_compile.packed_graph import GRAPH, WEIGHTS, row_ranges
from gpusq_compile.plan import planned
from gpusq_compile.report.terminal import against_fp32, packed_lines
from gpusq_compile.sparsity import PATTERNS, magnitude_mask
from gpusq_compile.user_state import UserParameters
from tests.compilations import make_rules
from tests.models import Shape, TinyViT, images, labelled, seeded
from tests.packed_cases import KINDS, Case, Mixed, compiled

PACKED = {
    "2:4 int8": ("int8", "2:4", 20),
    "portable int4": ("int4", "pair4:8", 20),
    "pair4:8 int4": ("int4", "pair4:8", 20),
    "sparse fp16": ("float16", "2:4", 36),
    "dense int8": ("int8", None, 8),
    "split int8": ("int8", "2:4", 20),
}


@pytest.mark.parametrize("kind", [*KINDS, "mixed", "blocks"])
def test_every_tensor_of_the_graph_comes_back_exactly(
    kind: str, cases: Callable[[str], Case]
) -> None:
    case = cases(kind)
    packed = load_packed(case.folder)
    expected = graph_tensors(case.result.graph)
    assert packed.tensors.keys() == expected.keys()
    half = {layer.weight for layer in packed.graph.layers if layer.packing.values == "float16"}
    assert bool(half) == (kind == "sparse fp16")
    for name, value in expected.items():
        wanted = value.half() if name in half else value
        assert packed.tensors[name].dtype == wanted.dtype, name
        assert torch.equal(packed.tensors[name], wanted), name


@pytest.mark.parametrize("kind", KINDS)
def test_the_weights_are_those_of_the_onnx_file(kind: str, cases: Callable[[str], Case]) -> None:
    case = cases(kind)
    packed = load_packed(case.folder)
    stored = {
        tensor.name: numpy_helper.to_array(tensor)
        for tensor in onnx.load(case.folder / "model.onnx").graph.initializer
    }
    assert len(packed.graph.layers) == (8 if kind == "split int8" else 6)
    for layer in packed.graph.layers:
        ours, theirs = packed.tensors[layer.weight].numpy(), stored[layer.weight]
        assert ours.dtype == theirs.dtype
        # A MatMul's weight is [in, out].
        assert any(np.array_equal(ours, value) for value in (theirs, theirs.T)), layer.name


@pytest.mark.parametrize("kind", KINDS)
def test_each_layer_says_how_it_is_packed(kind: str, cases: Callable[[str], Case]) -> None:
    case = cases(kind)
    packed = load_packed(case.folder)
    plans = {plan.name: plan for _, plan in planned(case.result.graph.graph)}
    for layer in packed.graph.layers:
        plan = plans[layer.name]
        packing = layer.packing
        assert (packing.values, packing.pattern, packing.bits_per_group) == PACKED[kind]
        assert packing.axes == ["out", "in"]
        assert (layer.op, layer.roles, tuple(layer.shape)) == (
            plan.op,
            list(plan.roles),
            plan.shape,
        )
        assert (layer.pattern, layer.activation) == (plan.applied.sparsity, plan.applied.activation)
        assert (layer.tensors.metadata is None) == (plan.applied.sparsity is None)
        assert (layer.tensors.scale is None) == (plan.applied.weight is None)
        assert layer.tensors.values in packed.stored


def test_a_convolution_is_stored_with_its_input_channels_last(
    cases: Callable[[str], Case],
) -> None:
    packed = load_packed(cases("mixed").folder)
    [layer] = [layer for layer in packed.graph.layers if layer.name == "mid"]
    assert (layer.op, layer.shape) == ("conv2d", [16, 16, 3, 3])
    assert layer.packing.axes == ["out", "kh", "kw", "in"]
    assert packed.stored[layer.tensors.values].shape == (16, 3, 3, 8)
    assert packed.stored[str(layer.tensors.metadata)].shape == (16, 3, 3, 2)


@pytest.mark.parametrize("kind", KINDS)
def test_the_state_dict_is_that_of_the_compile(kind: str, cases: Callable[[str], Case]) -> None:
    case = cases(kind)
    ours, expected = load_packed(case.folder).state_dict(), case.result.state_dict()
    assert ours.keys() == expected.keys()
    for name, value in expected.items():
        rounded = value.half().float() if (kind, value.ndim > 1) == ("sparse fp16", True) else value
        wanted = value if name == "place" else rounded
        assert ours[name].dtype == torch.float32
        assert torch.equal(ours[name], wanted), name
    eager = seeded(TinyViT, Shape(depth=1))
    assert eager.load_state_dict(ours, strict=False) == ([], [])


def test_what_the_graph_does_not_read_is_not_in_the_state_dict(
    cases: Callable[[str], Case],
) -> None:
    case = cases("mixed")
    ours = load_packed(case.folder).state_dict()
    assert ours.keys() == case.result.state_dict().keys()
    assert "head.weight" in ours


class Replay:
    """Runs graph.json's nodes with the unpacked tensors, and nothing else of the compile."""

    def __init__(self, folder: Path) -> None:
        packed = load_packed(folder)
        self.nodes, self.tensors = packed.graph.nodes, packed.tensors
        self.values: dict[str, Any] = {}

    def __call__(self, *inputs: Tensor) -> Any:
        given = list(inputs)
        for node in self.nodes:
            args = [self.value(argument) for argument in node.args]
            kwargs = {name: self.value(argument) for name, argument in node.kwargs.items()}
            if node.op == "placeholder":
                self.values[node.name] = given.pop(0)
            elif node.op == "get_attr":
                self.values[node.name] = self.tensors[node.target]
            elif node.op == "output":
                return args[0]
            else:
                where = __import__("operator") if "_operator." in node.target else torch.ops
                target = attrgetter(node.target.removeprefix("_operator."))(where)
                self.values[node.name] = target(*args, **kwargs)
            if node.op != "output" and isinstance(found := self.values[node.name], Tensor):
                [said] = node.outputs
                assert said.dtype == str(found.dtype).removeprefix("torch.")
                for size, actual in zip(said.shape, found.shape, strict=True):
                    assert size in (None, actual)
        raise AssertionError("no output")

    def value(self, argument: Any) -> Any:
        if isinstance(argument, list):
            return [self.value(item) for item in argument]
        if not isinstance(argument, dict):
            return argument
        [(kind, content)] = argument.items()
        if kind == "node":
            return self.values[content]
        return getattr(torch, content) if kind == "dtype" else {"float": float}[kind](content)


@pytest.mark.parametrize("kind", ["2:4 int8", "portable int4", "split int8", "mixed", "blocks"])
def test_the_two_files_are_the_whole_network(kind: str, cases: Callable[[str], Case]) -> None:
    case = cases(kind)
    batch = images(3, seed=7)
    with torch.no_grad():
        [found] = Replay(case.folder)(batch)
        assert torch.equal(found, case.result.graph(batch))


def test_nodes_say_which_of_the_users_modules_they_come_from(cases: Callable[[str], Case]) -> None:
    packed = load_packed(cases("2:4 int8").folder)
    modules = {node.module for node in packed.graph.nodes if node.target == "aten.linear.default"}
    assert modules == {layer.name for layer in packed.graph.layers}


def test_scales_take_two_bytes_where_that_loses_nothing(cases: Callable[[str], Case]) -> None:
    packed = load_packed(cases("2:4 int8").folder)
    scales = [layer.tensors.scale for layer in packed.graph.layers]
    assert {packed.stored[str(name)].dtype for name in scales} == {torch.float16}
    assert {packed.tensors[str(name)].dtype for name in scales} == {torch.float32}
    assert packed.stored["last_norm.weight"].dtype == torch.float32


def test_weights_in_blocks_are_packed_with_all_their_scales(cases: Callable[[str], Case]) -> None:
    case = cases("blocks")
    packed = load_packed(case.folder)
    layers = {layer.name: layer for layer in packed.graph.layers}
    assert len(layers) == 5
    down = layers["layers.0.feed.down"]
    assert (down.packing.values, down.packing.pattern, down.activation) == ("int4", "2:4", None)
    assert packed.tensors[str(down.tensors.scale)].shape == (128, 256 // 64)
    expected = case.result.state_dict()
    for name, value in packed.state_dict().items():
        assert torch.equal(value, expected[name]), name
    assert case.result.report["storage"]["packed_gemm_ratio"] == pytest.approx(128 / 12)


def test_a_split_parameter_is_whole_in_the_state_dict(cases: Callable[[str], Case]) -> None:
    packed = load_packed(cases("split int8").folder)
    [(weight, parts), (bias, _)] = packed.graph.parts.items()
    assert (weight, bias) == ("layers.0.mix.wide.weight", "layers.0.mix.wide.bias")
    assert [part.rows for part in parts] == [[[0, 32]], [[32, 64]], [[64, 96]]]
    assert weight not in packed.tensors
    assert packed.state_dict()[weight].shape == (96, 32)


@settings(deadline=None)
@given(st.lists(st.integers(0, 30), unique=True))
def test_ranges_of_rows_are_the_rows_in_their_order(rows: list[int]) -> None:
    ranges = row_ranges(rows)
    assert [row for first, end in ranges for row in range(first, end)] == rows
    assert all(before[1] != after[0] for before, after in pairwise(ranges))


def test_equal_compiles_write_equal_files(cases: Callable[[str], Case], tmp_path: Path) -> None:
    rule = {"id": "all", "match": {"op": "linear"}, **KINDS["2:4 int8"]}
    compiled(seeded(TinyViT, Shape(depth=1)), tmp_path, rule)
    for name in (WEIGHTS, GRAPH):
        assert digest(tmp_path / name) == digest(cases("2:4 int8").folder / name), name


@pytest.mark.parametrize("value", [1, 100])
def test_a_weight_that_breaks_its_plan_is_an_internal_error(
    value: int, cases: Callable[[str], Case], tmp_path: Path
) -> None:
    """One non-zero too many, or one beyond 4 bits."""
    graph = cases("pair4:8 int4").result.graph
    weight = graph.get_buffer("stem.weight")
    before = weight.clone()
    try:
        if value == 1:
            weight[0, :8] = 1
        else:
            weight[weight != 0] = value
        with pytest.raises(InternalError) as caught:
            write_packed(
                graph, tmp_path, model="m", scope=None, parameters=UserParameters(), half=True
            )
    finally:
        weight.copy_(before)
    assert caught.value.code == "cannot-pack"
    assert caught.value.message.startswith("stem: ")
    assert not (tmp_path / WEIGHTS).exists()


def test_a_failed_gate_leaves_neither_file(tmp_path: Path) -> None:
    with pytest.raises(CheckFailed, match="head: not split"):
        compile_model(
            seeded(Mixed),
            (images(2),),
            rules=make_rules({"id": "all", "match": {"op": "linear"}, **KINDS["split int8"]}),
            calibration_data=labelled(2),
            finetune=False,
            output=tmp_path,
            engine="none",
            gates=Gates(strict=True),
        )
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "evidence.json",
        "manifest.json",
        "report.html",
        "report.json",
    ]


def test_values_beyond_float16_are_stored_as_its_largest(
    cases: Callable[[str], Case], tmp_path: Path
) -> None:
    graph = cases("sparse fp16").result.graph
    weight = graph.get_parameter("stem.weight")
    before = weight.detach().clone()
    mask = magnitude_mask(before, PATTERNS["2:4"])
    with torch.no_grad():
        try:
            weight.copy_(mask * 1e6)
            write_packed(
                graph, tmp_path, model="m", scope=None, parameters=UserParameters(), half=True
            )
        finally:
            weight.copy_(before)
    assert torch.equal(
        load_packed(tmp_path).tensors["stem.weight"], mask * torch.tensor(65504.0).half()
    )


@pytest.mark.parametrize(
    ("kind", "ratio", "paper"),
    [
        ("split int8", 6.4, {"printed": 6.4, "derived": 6.4}),
        ("2:4 int8", 6.4, {"printed": 6.4, "derived": 6.4}),
        ("portable int4", 12.8, {"printed": 12.7, "derived": 12.8}),
        ("pair4:8 int4", 12.8, {"printed": 12.7, "derived": 12.8}),
        ("sparse fp16", 32 * 4 / 36, None),
        ("dense int8", 4.0, None),
    ],
)
def test_the_report_has_the_ratios_from_the_bytes_that_were_written(
    kind: str, ratio: float, paper: dict[str, float] | None, cases: Callable[[str], Case]
) -> None:
    case = cases(kind)
    storage = case.result.report["storage"]
    stored = load_file(case.folder / WEIGHTS)
    layers = load_packed(case.folder).graph.layers
    weights = scales = 0
    for layer in layers:
        own = [layer.tensors.values, layer.tensors.metadata]
        size = sum(stored[name].nbytes for name in own if name is not None)
        scale = stored[layer.tensors.scale].nbytes if layer.tensors.scale else 0
        [entry] = [e for e in case.result.report["layers"] if e["name"] == layer.name]
        assert entry["packed_bytes"] == size + scale
        weights, scales = weights + size, scales + scale
    dense = sum(4 * value.numel() for value in TinyViT(Shape(depth=1)).parameters())
    size = (case.folder / WEIGHTS).stat().st_size
    assert (storage["packed_bytes"], storage["packed_gemm_bytes"]) == (size, weights)
    assert storage["packed_scale_bytes"] == scales
    assert storage["packed_model_ratio"] == pytest.approx(dense / size)
    # The classifier has 32 inputs and ten outputs: whole groups, so that nothing is padded.
    assert storage["packed_gemm_ratio"] == pytest.approx(ratio)
    fp32 = storage["gemm_dense_fp32_bytes"]
    assert storage["packed_gemm_ratio_with_scales"] == pytest.approx(fp32 / (weights + scales))
    assert storage["paper_gemm_ratio"] == paper


def test_whoever_may_read_the_model_may_read_the_weights(cases: Callable[[str], Case]) -> None:
    folder = cases("portable int4").folder
    modes = {name: (folder / name).stat().st_mode for name in (WEIGHTS, "model.onnx")}
    assert modes[WEIGHTS] == modes["model.onnx"]


def test_the_terminal_shows_the_ratios_beside_the_papers(cases: Callable[[str], Case]) -> None:
    [line] = packed_lines(cases("portable int4").result.report["storage"])
    assert line.startswith("packed: weights.safetensors ")
    assert "smaller than FP32, what is not compressed in its own type; GEMMs" in line
    assert "; GEMMs 12.80x, " in line
    assert line.endswith("x with their scales (the paper: 12.7x, 12.8x by its own bits)")
    [line] = packed_lines(cases("2:4 int8").result.report["storage"])
    assert line.endswith("(the paper: 6.4x)")
    [line] = packed_lines(cases("dense int8").result.report["storage"])
    assert line.endswith("x with their scales")
    assert packed_lines({"packed_bytes": None}) == []
    assert packed_lines({}) == []  # A report of an earlier version.


@pytest.mark.parametrize(
    ("ratio", "said"), [(6.4, "6.40x smaller than FP32"), (0.5, "2.00x larger than FP32")]
)
def test_what_grew_is_called_larger(ratio: float, said: str) -> None:
    assert against_fp32(ratio) == said
