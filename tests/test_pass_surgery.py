"""surgery: the file has the form that TensorRT runs fast, in the target's precision."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, numpy_helper
from torch import Tensor, nn

from gpusq_compile.compilation import Compilation
from tests.compilations import begin, fork, run_until
from tests.models import Shape, TinyViT, images, labelled, noise, seeded

HALF, FLOAT = TensorProto.FLOAT16, TensorProto.FLOAT
LAYERS = ["stem"] + [f"layers.0.{n}" for n in ("mix.wide", "mix.back", "feed.up", "feed.down")]


@pytest.fixture(scope="module")
def exported() -> Compilation:
    rules = {"version": 1, "extends": "int8", "target": {"precision": "fp16"}}
    model = seeded(TinyViT, Shape(depth=1))
    compilation = begin(model, images(4), rules, data=labelled(2), eval_data=labelled(2, seed=2))
    return run_until(compilation, "export_onnx")


@pytest.fixture(scope="module", params=["fp16", "fp32"])
def operated(request: pytest.FixtureRequest, exported: Compilation) -> Compilation:
    compilation = fork(exported)
    if request.param == "fp32":
        target = compilation.rules.target.model_copy(update={"precision": "fp32"})
        file = compilation.rules.file.model_copy(update={"target": target})
        compilation.rules = type(compilation.rules)(file, compilation.rules.rules, ())
    return run_until(compilation, "store_int4")


def model_of(compilation: Compilation) -> onnx.ModelProto:
    assert compilation.onnx_model is not None
    return compilation.onnx_model


def nodes_of(compilation: Compilation) -> dict[str, onnx.NodeProto]:
    return {node.name: node for node in model_of(compilation).graph.node}


def constants_of(compilation: Compilation) -> dict[str, np.ndarray]:
    tensors = model_of(compilation).graph.initializer
    return {tensor.name: numpy_helper.to_array(tensor) for tensor in tensors}


def test_gemms_and_their_quantizers_bear_the_users_names(operated: Compilation) -> None:
    nodes = nodes_of(operated)
    for layer in LAYERS:
        assert nodes[layer].op_type == "MatMul"
        assert nodes[f"{layer}/input_q"].op_type == "QuantizeLinear"
        assert nodes[f"{layer}/input_dq"].op_type == "DequantizeLinear"
        assert nodes[f"{layer}/weight_dq"].op_type == "DequantizeLinear"
        assert nodes[f"{layer}/output_q"].op_type == "QuantizeLinear"
        assert nodes[f"{layer}/output_dq"].op_type == "DequantizeLinear"
    assert sum(name.endswith("/output_q") for name in nodes) == len(LAYERS)


def test_weights_are_stored_as_k_by_n_with_scales_on_the_output_channels(
    exported: Compilation, operated: Compilation
) -> None:
    before, after, nodes = constants_of(exported), constants_of(operated), nodes_of(operated)
    for layer in LAYERS:
        weight = after[f"{layer}.weight"]
        assert weight.dtype == np.int8
        assert np.array_equal(weight, before[f"{layer}.weight"].T)
        assert after[nodes[f"{layer}/weight_dq"].input[1]].shape == weight.shape[1:]
        [axis] = [a.i for a in nodes[f"{layer}/weight_dq"].attribute if a.name == "axis"]
        assert axis == 1
        assert nodes[layer].input[1] == nodes[f"{layer}/weight_dq"].output[0]


def test_no_transpose_is_left_on_a_weights_path(operated: Compilation) -> None:
    constants = constants_of(operated)
    moved = [n for n in model_of(operated).graph.node if n.op_type == "Transpose"]
    assert all(node.input[0] not in constants for node in moved)


def test_no_cast_stands_next_to_a_quantizer(operated: Compilation) -> None:
    graph = model_of(operated).graph
    producer = {name: node for node in graph.node for name in node.output}
    for node in graph.node:
        for name in node.input:
            other = producer.get(name)
            pair = {node.op_type, other.op_type if other else ""}
            assert not ("Cast" in pair and pair & {"QuantizeLinear", "DequantizeLinear"})


def test_the_precision_is_the_targets_and_inputs_and_outputs_stay_float32(
    operated: Compilation,
) -> None:
    graph = model_of(operated).graph
    half = operated.rules.target.precision == "fp16"
    assert {value.type.tensor_type.elem_type for value in (*graph.input, *graph.output)} == {FLOAT}
    floats = {t.data_type for t in graph.initializer if t.data_type in (HALF, FLOAT)}
    assert floats == {HALF if half else FLOAT}
    casts = [node for node in graph.node if node.op_type == "Cast"]
    assert len(casts) == (2 if half else 0)


def test_learned_scales_are_exact_in_half_precision(
    exported: Compilation, operated: Compilation
) -> None:
    before, after = constants_of(exported), constants_of(operated)
    scales = [name for name in after if "scale" in name]
    assert len(scales) == 3 * len(LAYERS)
    for name in scales:
        assert np.array_equal(after[name].astype(np.float32), before[name])


def test_it_is_a_valid_model_that_really_takes_any_batch(operated: Compilation) -> None:
    onnx.checker.check_model(model_of(operated), full_check=True)
    session = onnxruntime.InferenceSession(
        model_of(operated).SerializeToString(), providers=["CPUExecutionProvider"]
    )
    [name] = [value.name for value in session.get_inputs()]
    for count in (1, 3, 7):
        batch = images(count, seed=count)
        [found] = session.run(None, {name: batch.numpy()})
        with torch.no_grad():
            expected = operated.ir(batch)
        assert found.shape == expected.shape
        assert torch.nn.functional.cosine_similarity(torch.from_numpy(found), expected).min() > 0.99


def test_the_maker_is_named(operated: Compilation) -> None:
    assert model_of(operated).producer_name == "gpusq-compile"


class Classifier(nn.Module):
    """A linear on vectors is a Gemm in ONNX, which keeps its [N, K] weight."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(32, 64)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


def test_a_gemm_keeps_its_weight_as_n_by_k(tmp_path: Path) -> None:
    rules = {
        "version": 1,
        "rules": [
            {"id": "q", "match": {"op": "linear"}, "quantize": {"weight": "int8", "output": "int8"}}
        ],
    }
    compilation = run_until(
        begin(Classifier().eval(), noise(4, 32), rules, tmp_path), "verify_onnx"
    )
    nodes = nodes_of(compilation)
    assert nodes["layer"].op_type == "Gemm"
    assert constants_of(compilation)["layer.weight"].shape == (64, 32)
    [axis] = [a.i for a in nodes["layer/weight_dq"].attribute if a.name == "axis"]
    assert axis == 0
    assert compilation.verify["structure"] == {"layers": 1, "attentions": 0, "faults": []}


@pytest.mark.parametrize("rules", ["int8", "int4"])
def test_a_weight_is_dequantized_right_before_it_is_read(rules: str, tmp_path: Path) -> None:
    """A runtime that keeps to the order of the file would hold what is dequantized before."""
    model = seeded(TinyViT, Shape(depth=2))
    compilation = begin(model, images(4), {"version": 1, "extends": rules}, data=labelled(2))
    graph = model_of(run_until(compilation, "store_int4")).graph
    stored = {tensor.name for tensor in graph.initializer}
    read = {name: at for at, node in reversed([*enumerate(graph.node)]) for name in node.input}
    weights = [
        (at, node.output[0])
        for at, node in enumerate(graph.node)
        if node.op_type == "DequantizeLinear" and node.input[0] in stored
    ]
    assert len(weights) >= len(LAYERS)
    assert all(read[output] == at + 1 for at, output in weights)
