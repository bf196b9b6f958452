"""An ONNX model as text: one line an input, stored tensor, operator and output."""

from __future__ import annotations

import onnx
from onnx import TensorProto, helper


def onnx_text(model: onnx.ModelProto) -> str:
    """The model for a person to read and to compare; of stored tensors type and shape alone."""
    graph = model.graph
    lines = [f"input {_value(value)}" for value in graph.input]
    for tensor in graph.initializer:
        kind = TensorProto.DataType.Name(tensor.data_type).lower()
        lines.append(f"stored {tensor.name}: {kind} {list(tensor.dims)}")
    for node in graph.node:
        attributes = ", ".join(str(helper.printable_attribute(item)) for item in node.attribute)
        call = f"{node.op_type}({', '.join(node.input)})"
        given = f" {{{attributes}}}" if attributes else ""
        lines.append(f"{', '.join(node.output)} = {call}{given}  # {node.name}")
    lines += [f"output {_value(value)}" for value in graph.output]
    return "\n".join(lines) + "\n"


def _value(value: onnx.ValueInfoProto) -> str:
    tensor = value.type.tensor_type
    kind = TensorProto.DataType.Name(tensor.elem_type).lower()
    sizes = [size.dim_param or size.dim_value for size in tensor.shape.dim]
    return f"{value.name}: {kind} {sizes}"
