"""Whether an ONNX model is valid, without the copies that checking it whole would take."""

from __future__ import annotations

import onnx

LARGE = 1 << 16
"""Bytes of a stored tensor from which on it is checked by itself. Shapes are never as large."""


def check_valid(model: onnx.ModelProto) -> None:
    """Check every operator, type and shape of a model, and each stored tensor.

    The checker copies a model several times. Large tensors are therefore inputs of the one that it
    gets, as it infers nothing from their values.

    Source: ONNX, `onnx.checker.check_model` with `full_check`.

    Raises:
        onnx.checker.ValidationError, onnx.shape_inference.InferenceError: the model is not valid.
    """
    graph = model.graph
    light = onnx.ModelProto(
        ir_version=model.ir_version, opset_import=model.opset_import, functions=model.functions
    )
    light.graph.name = graph.name
    light.graph.node.extend(graph.node)
    light.graph.input.extend(graph.input)
    light.graph.output.extend(graph.output)
    light.graph.value_info.extend(graph.value_info)
    for tensor in graph.initializer:
        if len(tensor.raw_data) < LARGE:
            light.graph.initializer.append(tensor)
            continue
        onnx.checker.check_tensor(tensor)
        light.graph.input.append(
            onnx.helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims)
        )
    onnx.checker.check_model(light, full_check=True)
