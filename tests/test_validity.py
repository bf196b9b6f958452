"""A model is checked whole, however large its tensors are."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from gpusq_compile.lowering import validity
from gpusq_compile.lowering.validity import check_valid

FLOAT = TensorProto.FLOAT
SHAPE = numpy_helper.from_array(np.array([2, -1], dtype=np.int64), "shape")


def product(weight: TensorProto, operator: str = "MatMul") -> onnx.ModelProto:
    """x [2, 256] @ weight, as [2, ...] of a stored shape."""
    nodes = [
        helper.make_node(operator, ["x", "weight"], ["y"]),
        helper.make_node("Reshape", ["y", "shape"], ["z"]),
    ]
    graph = helper.make_graph(
        nodes,
        "product",
        [helper.make_tensor_value_info("x", FLOAT, [2, 256])],
        [helper.make_tensor_value_info("z", FLOAT, [2, 256])],
        [weight, SHAPE],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)])


def weight(rows: int = 256, kind: type[np.generic] = np.float32) -> TensorProto:
    return numpy_helper.from_array(np.ones((rows, 256), dtype=kind), "weight")


def cut(tensor: TensorProto) -> TensorProto:
    tensor.raw_data = tensor.raw_data[:-4]
    return tensor


def test_a_valid_model_passes_and_is_left_as_it_is() -> None:
    model = product(weight())
    assert len(model.graph.initializer[0].raw_data) > validity.LARGE
    before = model.SerializeToString(deterministic=True)
    check_valid(model)
    assert model.SerializeToString(deterministic=True) == before


@pytest.mark.parametrize(
    "model",
    [
        product(weight(rows=128)),
        product(weight(kind=np.int8)),
        product(cut(weight())),
        product(weight(), operator="MatMult"),
    ],
    ids=["a size", "a type", "too few bytes", "an operator"],
)
def test_what_is_not_valid_is_refused_as_the_checker_does(model: onnx.ModelProto) -> None:
    faults = (onnx.checker.ValidationError, onnx.shape_inference.InferenceError)
    with pytest.raises(faults):
        onnx.checker.check_model(model, full_check=True)
    with pytest.raises(faults):
        check_valid(model)
