"""INT4 weights in the ONNX file."""

from __future__ import annotations

from collections.abc import Collection

import onnx
from onnx import TensorProto, helper, numpy_helper


def store_as_int4(model: onnx.ModelProto, names: Collection[str]) -> None:
    """Turn int8 initializers of [-8, 7] into INT4 ones, two values a byte, the first one low.

    The last step on a model: onnx-graphsurgeon neither reads nor writes INT4 (ONNX IR, "4 bit
    integer types"; `DequantizeLinear` takes INT4 from opset 21 on).

    Raises:
        ValueError: a value is outside of [-8, 7].
    """
    int4 = helper.tensor_dtype_to_np_dtype(TensorProto.INT4)
    for tensor in model.graph.initializer:
        if tensor.name not in names:
            continue
        levels = numpy_helper.to_array(tensor)
        if levels.min(initial=0) < -8 or levels.max(initial=0) > 7:
            raise ValueError(f"{tensor.name} has values outside of the range of INT4")
        tensor.CopyFrom(numpy_helper.from_array(levels.astype(int4), tensor.name))
    for value in model.graph.value_info:
        if value.name in names:
            value.type.tensor_type.elem_type = TensorProto.INT4
