"""Float32 -> FP16 around the quantized operators."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import onnx_ir.passes.common as common_passes
from onnxruntime.transformers.float16 import convert_float_to_float16

from gpusq_compile.lowering.to_onnx import OPSET


def to_half(model: onnx.ModelProto) -> onnx.ModelProto:
    """Convert every float tensor to FP16; graph inputs and outputs stay FP32 behind one Cast each.

    Scales were learned as FP16 values, so their conversion is exact. Values beyond the FP16 range
    (masking constants) are clamped to it.
    """
    own_scales(model)
    name_zeros(model)
    summing = name_summing(model)
    half = convert_float_to_float16(
        model,
        keep_io_types=True,
        disable_shape_infer=True,
        force_fp16_initializers=True,
        # The default list leaves operators in FP32 that TensorRT runs in FP16.
        op_block_list=float32_only({node.op_type for node in model.graph.node}),
        node_block_list=summing,
    )
    drop_repeated(half.graph)
    converted = ir.from_proto(half)
    common_passes.TopologicalSortPass()(converted)
    proto: onnx.ModelProto = ir.to_proto(converted)
    return proto


def own_scales(model: onnx.ModelProto) -> None:
    """Give each Resize its own copy of its scales, which ONNX keeps in FP32.

    The conversion casts them back at each Resize, under a name that is theirs: twice where two
    share them.
    """
    stored = {tensor.name: tensor for tensor in model.graph.initializer}
    for index, node in enumerate(model.graph.node):
        resizes = node.op_type == "Resize" and len(node.input) > 2
        scales = stored.get(node.input[2]) if resizes else None
        if scales is not None:
            copy = model.graph.initializer.add()
            copy.CopyFrom(scales)
            copy.name = node.input[2] = f"{scales.name}_resize_{index}"


def name_zeros(model: onnx.ModelProto) -> None:
    """Give each ConstantOfShape its value, which is a float32 zero where nothing is said.

    The conversion turns values that are there to half, and takes all of its outputs for half.
    """
    for node in model.graph.node:
        if node.op_type == "ConstantOfShape" and not node.attribute:
            zero = onnx.numpy_helper.from_array(np.zeros(1, dtype=np.float32))
            node.attribute.append(onnx.helper.make_attribute("value", zero))


def drop_repeated(graph: onnx.GraphProto) -> None:
    """Keep one of the casts that the conversion adds once for each reader, all of one name."""
    made: set[str] = set()
    for node in list(graph.node):
        if node.output and made.issuperset(node.output):
            graph.node.remove(node)
        made.update(node.output)
    known: set[str] = set()
    for value in list(graph.value_info):
        if value.name in known:
            graph.value_info.remove(value)
        known.add(value.name)


def name_summing(model: onnx.ModelProto) -> list[str]:
    """The names of the scatters that add or multiply what meets at one place, under new ones where
    they have none.

    In half each of many steps rounds, and ONNX Runtime has no kernel for it.
    """
    found = []
    for index, node in enumerate(model.graph.node):
        if node.op_type not in ("ScatterElements", "ScatterND"):
            continue
        if any(a.name == "reduction" and a.s in (b"add", b"mul") for a in node.attribute):
            node.name = node.name or f"scatter_{index}"
            found.append(node.name)
    return found


def float32_only(operators: set[str]) -> list[str]:
    """Those of the standard operators that take floats, and none of 16 bits (NonMaxSuppression)."""
    found = []
    for name in sorted(operators):
        if not onnx.defs.has(name):
            continue
        inputs = onnx.defs.get_schema(name, OPSET).inputs
        floats = [value for value in inputs if "tensor(float)" in value.types]
        if floats and not any("tensor(float16)" in value.types for value in floats):
            found.append(name)
    return found
