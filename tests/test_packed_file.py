"""weights.safetensors and graph.json: all of the network, read back exactly or refused by name."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from operator import attrgetter
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from onnx import numpy_helper
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from gpusq_compile import (
    CheckFailed,
    CompileResult,
    InputError,
    InternalError,
    compile_model,
    load_packed,
)
from gpusq_compile.gates import Gates
from gpusq_compile.graph.as_json import graph_tensors
from gpusq_compile.output import digest
from gpusq_compile.packed_file import write_packed
from gpusq_compile.packed_graph import GRAPH, WEIGHTS, document_digest, row_ranges
from gpusq_compile.packed_model import MAX_GRAPH_BYTES
from gpusq_compile.plan import planned
from gpusq_compile.report.terminal import packed_lines
from gpusq_compile.sparsity import PATTERNS, magnitude_mask
from tests.compilations import make_rules
from tests.models import Shape, TinyViT, images, labelled, seeded

INT4 = {"weight": "int4", "activation": "int4"}
KINDS: dict[str, dict[str, Any]] = {
    "2:4 int8": {"sparsity": {"pattern": "2:4"}, "quantize": {"weight": "int8"}},
    "portable int4": {"sparsity": {"pattern": "portable"}, "quantize": INT4},
    "pair4:8 int4": {"sparsity": {"pattern": "pair4:8"}, "quantize": INT4},
    "sparse fp16": {"sparsity": {"pattern": "2:4"}},
    "dense int8": {"quantize": {"weight": "int8"}},
    "split int8": {"sparsity": {"pattern": "2:4"}, "quantize": {"weight": "int8", "split": True}},
}
PACKED = {
    "2:4 int8": ("int8", "2:4", 20),
    "portable int4": ("int4", "pair4:8", 20),
    "pair4:8 int4": ("int4", "pair4:8", 20),
    "sparse fp16": ("float16", "2:4", 36),
    "dense int8": ("int8", None, 8),
    "split int8": ("int8", "2:4", 20),
}
BLOCKS = {
    "sparsity": {"pattern": "2:4"},
    "quantize": {"weight": "int4", "activation": "none", "block": 64},
}
LOOSE = {"min_cosine": -1, "min_top1_agreement": 0, "max_difference": 1e6}


class Mixed(nn.Module):
    """A convolution that stays one, a constant, infinity as an argument, and what nothing reads."""

    order: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(2, 16, 3, padding=1)
        self.mid = nn.Conv2d(16, 16, 3, stride=2)
        self.head = nn.Linear(16, 8)
        self.register_buffer("order", torch.arange(15, -1, -1), persistent=False)
        self.unread = nn.Parameter(torch.ones(3))

    def forward(self, x: Tensor) -> Tensor:
        x = self.mid(self.stem(x).relu())
        x = x.flatten(2).amax(dim=2)[:, self.order]
        kept = x.masked_fill(x < -1e4, float("-inf"))
        return self.head(kept.sigmoid())


@dataclass
class Case:
    result: CompileResult
    folder: Path


def compiled(model: nn.Module, folder: Path, *rules: dict[str, Any]) -> Case:
    result = compile_model(
        model,
        (images(2),),
        rules=make_rules(*rules, precision="fp16", verify=LOOSE),
        calibration_data=labelled(2),
        finetune=False,
        engine="none",
        output=folder,
    )
    return Case(result, folder)


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Case]:
    """A real compile of each kind, made when it is first asked for."""
    made: dict[str, Case] = {}

    def case(kind: str) -> Case:
        if kind not in made:
            folder = tmp_path_factory.mktemp("packed") / "out"
            if kind == "mixed":
                rule = {"id": "all", "match": {"op": ["linear", "conv2d"]}, **KINDS["2:4 int8"]}
                made[kind] = compiled(seeded(Mixed), folder, rule)
            elif kind == "blocks":
                match = {"op": "linear", "in_features": {"multiple_of": 64}}
                rule = {"id": "wide", "match": match, **BLOCKS}
                made[kind] = compiled(seeded(TinyViT, Shape(depth=1, dim=128)), folder, rule)
            else:
                rule = {"id": "all", "match": {"op": "linear"}, **KINDS[kind]}
                made[kind] = compiled(seeded(TinyViT, Shape(depth=1)), folder, rule)
        return made[kind]

    return case


@pytest.fixture
def copy(cases: Callable[[str], Case], tmp_path: Path) -> Path:
    """A folder of its own with the two files of a 2:4 INT8 compile."""
    for name in (WEIGHTS, GRAPH):
        shutil.copy(cases("2:4 int8").folder / name, tmp_path / name)
    return tmp_path


def document(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / GRAPH).read_text())
    return found


# --- what comes back -----------------------------------------------------------------------------


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


# --- writing -------------------------------------------------------------------------------------


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
            write_packed(graph, tmp_path, model="m", scope=None, parameters={}, half=True)
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
    assert sorted(path.name for path in tmp_path.iterdir()) == ["manifest.json", "report.json"]


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
            write_packed(graph, tmp_path, model="m", scope=None, parameters={}, half=True)
        finally:
            weight.copy_(before)
    assert torch.equal(
        load_packed(tmp_path).tensors["stem.weight"], mask * torch.tensor(65504.0).half()
    )


# --- the report ----------------------------------------------------------------------------------


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


def test_the_terminal_shows_the_ratios_beside_the_papers(cases: Callable[[str], Case]) -> None:
    [line] = packed_lines(cases("portable int4").result.report["storage"])
    assert line.startswith("packed: weights.safetensors ")
    assert "; GEMMs 12.80x, " in line
    assert line.endswith("x with their scales (the paper: 12.7x, 12.8x by its own bits)")
    [line] = packed_lines(cases("2:4 int8").result.report["storage"])
    assert line.endswith("(the paper: 6.4x)")
    [line] = packed_lines(cases("dense int8").result.report["storage"])
    assert line.endswith("x with their scales")
    assert packed_lines({"packed_bytes": None}) == []
    assert packed_lines({}) == []  # A report of an earlier version.


# --- refused -------------------------------------------------------------------------------------


def refusal(folder: Path) -> InputError:
    with pytest.raises(InputError) as caught:
        load_packed(folder)
    return caught.value


def outcome(folder: Path) -> str | None:
    """The code that a folder is refused with, None if it is read; nothing else may come of it."""
    try:
        load_packed(folder).state_dict()
    except InputError as error:
        return error.code
    return None


def rewrite(folder: Path, change: Callable[[dict[str, Any]], Any], tensors: Any = None) -> None:
    """Change graph.json, and the tensors, as one would who makes the digests fit again."""
    found = document(folder)
    change(found)
    if tensors is not None:
        stored = load_file(folder / WEIGHTS)
        tensors(stored)
        save_file(stored, folder / WEIGHTS)
        found["weights"]["bytes"] = (folder / WEIGHTS).stat().st_size
        found["weights"]["sha256"] = digest(folder / WEIGHTS)
    found["sha256"] = document_digest(found)
    (folder / GRAPH).write_text(json.dumps(found))


@pytest.mark.parametrize("name", [WEIGHTS, GRAPH])
def test_a_missing_file_is_named(name: str, copy: Path) -> None:
    (copy / name).unlink()
    error = refusal(copy)
    assert error.code == "packed-missing"
    assert f"{name}: there is no such file" in error.message


def test_a_folder_in_place_of_a_file_is_named(copy: Path) -> None:
    (copy / GRAPH).unlink()
    (copy / GRAPH).mkdir()
    assert refusal(copy).code == "packed-missing"


@pytest.mark.parametrize("folder", ["nowhere", "with\0nul"])
def test_a_missing_folder_is_named(folder: str, tmp_path: Path) -> None:
    assert refusal(tmp_path / folder).code == "packed-missing"


def test_a_file_in_place_of_the_folder_is_refused(copy: Path) -> None:
    error = refusal(copy / GRAPH)
    assert error.code == "packed-not-a-folder"
    assert "give the folder" in str(error)


@pytest.mark.parametrize("text", ["", "{", "no JSON", "\0", '{"a": ' * 100_000, "9" * 5000])
def test_what_is_no_json_is_refused(text: str, copy: Path) -> None:
    (copy / GRAPH).write_text(text)
    assert refusal(copy).code == "packed-not-json"


def test_bytes_that_are_no_text_are_refused(copy: Path) -> None:
    (copy / GRAPH).write_bytes(b'{"format": "\xff"}')
    assert refusal(copy).code == "packed-not-json"


@pytest.mark.parametrize("text", ["[]", "3", "{}", '{"format": "other"}', '{"format": []}'])
def test_another_format_is_refused(text: str, copy: Path) -> None:
    (copy / GRAPH).write_text(text)
    assert refusal(copy).code == "packed-format"


@pytest.mark.parametrize("version", [0, 2, "1", None, [1]])
def test_another_version_is_refused(version: Any, copy: Path) -> None:
    rewrite(copy, lambda found: found.update(version=version))
    error = refusal(copy)
    assert error.code == "packed-version"
    assert "expected 1" in error.message


def test_an_absurdly_large_graph_is_refused_unread(copy: Path) -> None:
    with (copy / GRAPH).open("r+b") as file:
        file.truncate(MAX_GRAPH_BYTES + 1)  # Sparse: it takes no space on the disk.
    assert refusal(copy).code == "packed-too-large"


@pytest.mark.parametrize("length", [0, 7, 100, -1])
def test_weights_that_were_cut_short_are_refused(length: int, copy: Path) -> None:
    whole = (copy / WEIGHTS).read_bytes()
    (copy / WEIGHTS).write_bytes(whole[:length])
    error = refusal(copy)
    assert error.code == "packed-altered"
    assert "cut short" in error.message


@pytest.mark.parametrize("content", [b"", b"\xff" * 8, b"\x02" + b"\0" * 7 + b"{}" + b"rest"])
def test_what_is_no_safetensors_file_is_refused_whatever_its_digest(
    content: bytes, copy: Path
) -> None:
    (copy / WEIGHTS).write_bytes(content)
    about = {"file": WEIGHTS, "bytes": len(content), "sha256": digest(copy / WEIGHTS)}
    rewrite(copy, lambda found: found.update(weights=about))
    assert refusal(copy).code == "packed-damaged"


def test_the_weights_of_another_run_are_refused(copy: Path, cases: Callable[[str], Case]) -> None:
    stored = load_file(copy / WEIGHTS)
    stored["last_norm.weight"] += 1
    save_file(stored, copy / WEIGHTS)
    error = refusal(copy)
    assert error.code == "packed-altered"
    assert "not the file" in error.message
    shutil.copy(cases("dense int8").folder / WEIGHTS, copy / WEIGHTS)
    assert refusal(copy).code == "packed-altered"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda stored: stored.pop("last_norm.weight"), "has no tensor 'last_norm.weight'"),
        (lambda stored: stored.pop("stem.weight.metadata"), "no tensor 'stem.weight.metadata'"),
        (lambda stored: stored.update(more=torch.ones(1)), "holds 'more', which graph.json"),
        (
            lambda stored: stored.update({"last_norm.weight": torch.ones(31)}),
            "'last_norm.weight' is float32 [31], expected float32 [32]",
        ),
        (
            lambda stored: stored.update({"stem.weight.values": torch.ones(32, 16)}),
            "'stem.weight.values' is float32 [32, 16], expected int8 [32, 16]",
        ),
    ],
)
def test_a_tensor_that_is_not_as_the_graph_says_is_named(
    change: Callable[[dict[str, Tensor]], Any], message: str, copy: Path
) -> None:
    rewrite(copy, lambda found: None, change)
    error = refusal(copy)
    assert error.code == "packed-tensor"
    assert message in error.message


@pytest.mark.parametrize("entry", [0b0000, 0b0101, 0b1111, 0b0001, 0b1011])
def test_illegal_metadata_is_named(entry: int, copy: Path) -> None:
    """Equal and descending indices, which the hardware does not define."""

    def change(stored: dict[str, Tensor]) -> None:
        stored["stem.weight.metadata"][3, 2] = entry | 0b0100 << 4

    rewrite(copy, lambda found: None, change)
    error = refusal(copy)
    assert error.code == "packed-metadata"
    assert "stem: 1 groups have illegal metadata" in error.message


LAYER: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "pattern": (lambda layer: layer["packing"].update(pattern="4:8"), "packing.pattern"),
    "group": (lambda layer: layer["packing"].update(group=8), "no such packing"),
    "axes": (lambda layer: layer["packing"].update(axes=["in", "out"]), "no such packing"),
    "size": (lambda layer: layer.update(shape=[32, 34]), "no such packing"),
    "one axis": (lambda layer: layer.update(shape=[32]), "shape"),
    "negative": (lambda layer: layer.update(shape=[32, -32]), "shape.1"),
    "true": (lambda layer: layer.update(shape=[32, True]), "shape.1"),
    "no metadata": (lambda layer: layer["tensors"].update(metadata=None), "metadata belongs"),
    "no scale": (lambda layer: layer["tensors"].update(scale=None), "scales belong"),
    "unknown scale": (lambda layer: layer["tensors"].update(scale="x"), "'x' is no scale"),
    "other scale": (
        lambda layer: layer["tensors"].update(scale="logits.bias"),
        "'logits.bias' is no scale",
    ),
    "twice": (
        lambda layer: layer["tensors"].update(values="logits.weight.values"),
        "'logits.weight.values' is named twice",
    ),
    "extra": (lambda layer: layer.update(more=1), "more: Extra inputs"),
    "missing": (lambda layer: layer.pop("shape"), "shape: Field required"),
}
OTHER: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "type": (lambda d: d["tensors"]["place"].update(dtype="nn"), "unknown type 'nn'"),
    "stored": (lambda d: d["tensors"]["place"].update(stored="int8"), "not its float32"),
    "parameter": (lambda d: d["parameters"].update({"place": [3]}), "parameter 'place'"),
    "part": (
        lambda d: d["parts"].update(place=[{"tensor": "stem.bias", "rows": [[0, 32]]}]),
        "'stem.bias' is no part of the parameter 'place'",
    ),
    "rows": (
        lambda d: d["parts"].update(
            {"stem.bias": [{"tensor": "stem.bias", "rows": [[0, 10**12]]}]}
        ),
        "'stem.bias' is no part",
    ),
    "range": (
        lambda d: d["parts"].update({"stem.bias": [{"tensor": "stem.bias", "rows": [[3]]}]}),
        "parts.stem.bias.0.rows.0",
    ),
    "file": (lambda d: d["weights"].update(file="/etc/passwd"), "weights.file"),
    "nodes": (lambda d: d.update(nodes=[1]), "nodes.0"),
    "layers": (lambda d: d.update(layers={}), "layers"),
}


@pytest.mark.parametrize("name", LAYER)
def test_a_layer_that_cannot_be_is_named_whatever_the_digest(name: str, copy: Path) -> None:
    change, message = LAYER[name]
    rewrite(copy, lambda found: change(found["layers"][0]))
    error = refusal(copy)
    assert error.code == "packed-damaged"
    assert message in error.message


@pytest.mark.parametrize("name", OTHER)
def test_a_document_that_cannot_be_is_named_whatever_the_digest(name: str, copy: Path) -> None:
    change, message = OTHER[name]
    rewrite(copy, change)
    error = refusal(copy)
    assert error.code == "packed-damaged"
    assert message in error.message


@settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(st.data())
def test_no_changed_byte_goes_unseen(copy: Path, data: st.DataObject) -> None:
    name = data.draw(st.sampled_from([WEIGHTS, GRAPH]))
    whole = (copy / name).read_bytes()
    index = data.draw(st.integers(0, len(whole) - 1))
    byte = data.draw(st.integers(0, 255).filter(lambda value: value != whole[index]))
    before = document(copy)
    (copy / name).write_bytes(whole[:index] + bytes([byte]) + whole[index + 1 :])
    try:
        code = outcome(copy)
        # What may change is no content: a space for a line's end, 1E-5 for 1e-5.
        assert code is not None or (name == GRAPH and document(copy) == before)
    finally:
        (copy / name).write_bytes(whole)


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(st.data())
def test_no_document_leads_to_a_traceback(copy: Path, data: st.DataObject) -> None:
    """Any value in any place, under a digest that fits."""
    whole = (copy / GRAPH).read_bytes()
    found = document(copy)
    place: Any = found
    while True:
        keys = list(place) if isinstance(place, dict) else list(range(len(place)))
        key = data.draw(st.sampled_from(keys))
        inner = place[key]
        if not isinstance(inner, (dict, list)) or not inner or data.draw(st.integers(0, 3)) == 0:
            break
        place = inner
    simple: st.SearchStrategy[Any] = st.none() | st.booleans() | st.integers() | st.text()
    place[key] = data.draw(simple | st.just([]) | st.just({}))
    found["sha256"] = document_digest(found)
    (copy / GRAPH).write_text(json.dumps(found))
    try:
        outcome(copy)
    finally:
        (copy / GRAPH).write_bytes(whole)
