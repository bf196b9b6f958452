"""The structural check of INT4 weights in blocks: whatever is tampered with is named."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import numpy_helper
from torch import Tensor, nn

from gpusq_compile.compilation import Compilation
from gpusq_compile.lowering.check import StoredLayer, check_layers
from tests.compilations import INT8, SPARSE, begin, make_rules, plans_of, run_until
from tests.models import Shape, TinyViT, images, noise, seeded

LAYER = "layers.0.feed.up"
BLOCKS = {"weight": "int4", "activation": "none", "block": 64}


@pytest.fixture(scope="module")
def small() -> Compilation:
    rule = {"id": "w", "match": {"op": "linear"}, "quantize": BLOCKS, "sparsity": SPARSE}
    model = seeded(TinyViT, Shape(depth=1, dim=64))
    return run_until(begin(model, images(4), make_rules(rule, precision="fp16")), "store_int4")


WEIGHT = f"{LAYER}.weight"
SCALE = "gpusq.weight_scale.layers_0_feed_up"


def check(compiled: Compilation, model: onnx.ModelProto) -> dict[str, StoredLayer]:
    plans = [plan for plan in plans_of(compiled).values() if plan.applied.weight]
    return {layer.name: layer for layer in check_layers(model, plans)}


def tensor_of(model: onnx.ModelProto, name: str) -> onnx.TensorProto:
    return next(tensor for tensor in model.graph.initializer if tensor.name == name)


def change(model: onnx.ModelProto, name: str, edit: Callable[[np.ndarray], np.ndarray]) -> None:
    tensor = tensor_of(model, name)
    tensor.CopyFrom(numpy_helper.from_array(edit(np.array(numpy_helper.to_array(tensor))), name))


def set_attribute(model: onnx.ModelProto, name: str, value: int) -> None:
    node = next(node for node in model.graph.node if node.name == f"{LAYER}/weight_dq")
    next(a for a in node.attribute if a.name == name).i = value


def widen_to_int8(model: onnx.ModelProto) -> None:
    change(model, WEIGHT, lambda value: value.astype(np.int8))


def reach_minus_8(model: onnx.ModelProto) -> None:
    def lowest(value: np.ndarray) -> np.ndarray:
        value[value == value.min()] = -8
        return value

    change(model, WEIGHT, lowest)


def fill_a_group(model: onnx.ModelProto) -> None:
    def fill(value: np.ndarray) -> np.ndarray:
        value[:4, 0] = 1
        return value

    change(model, WEIGHT, fill)


def halve_the_blocks(model: onnx.ModelProto) -> None:
    set_attribute(model, "block_size", 32)


def turn_the_axis(model: onnx.ModelProto) -> None:
    set_attribute(model, "axis", 1)


def double_the_scales(model: onnx.ModelProto) -> None:
    change(model, SCALE, lambda value: value.repeat(2, axis=0))


def zero_a_scale(model: onnx.ModelProto) -> None:
    change(model, SCALE, lambda value: value * 0)


def quantize_the_input(model: onnx.ModelProto) -> None:
    gemm = next(node for node in model.graph.node if node.name == LAYER)
    index = list(model.graph.node).index(gemm)
    model.graph.initializer.append(numpy_helper.from_array(np.array(0.1, np.float16), "step"))
    model.graph.initializer.append(numpy_helper.from_array(np.array(0, np.int8), "zero"))
    nodes = [
        onnx.helper.make_node("QuantizeLinear", [gemm.input[0], "step", "zero"], ["xq"]),
        onnx.helper.make_node("DequantizeLinear", ["xq", "step", "zero"], ["xdq"]),
    ]
    gemm.input[0] = "xdq"
    for offset, node in enumerate(nodes):
        model.graph.node.insert(index + offset, node)


CASES: dict[Callable[[onnx.ModelProto], None], str] = {
    widen_to_int8: "its weight is int8, not int4",
    reach_minus_8: "its weight reaches -8, outside the symmetric range [-7, 7] of int4",
    fill_a_group: "1 groups break 2:4",
    halve_the_blocks: "its scales are for blocks of 32, not of 64",
    turn_the_axis: "scales lie on axis 1, not 0",
    double_the_scales: "scales of shape [2, 128], not [1, 128]",
    zero_a_scale: "a weight scale is not positive and finite",
    quantize_the_input: "its input is quantized, and only its weight should be",
}


@pytest.mark.parametrize("damage", CASES, ids=lambda damage: damage.__name__)
def test_what_was_tampered_with_is_named_with_its_layer(
    small: Compilation, damage: Callable[[onnx.ModelProto], None]
) -> None:
    model = copy.deepcopy(small.onnx_model)
    assert model is not None
    assert not any(layer.faults for layer in check(small, model).values())
    damage(model)
    found = check(small, model)
    assert CASES[damage] in found[LAYER].faults
    assert [name for name in found if found[name].faults] == [LAYER]


def test_the_quantized_output_of_the_layer_before_is_no_quantized_input(tmp_path: Path) -> None:
    class Chain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Linear(64, 64), nn.Linear(64, 64)

        def forward(self, x: Tensor) -> Tensor:
            return self.two(self.one(x))

    first = {"id": "a", "match": {"name": "one"}, "quantize": {**INT8, "output": "int8"}}
    second = {"id": "b", "match": {"name": "two"}, "quantize": BLOCKS}
    compilation = begin(seeded(Chain), noise(4, 8, 64), make_rules(first, second), tmp_path)
    run_until(compilation, "verify_onnx")
    assert compilation.verify["structure"] == {"layers": 2, "attentions": 0, "faults": []}
