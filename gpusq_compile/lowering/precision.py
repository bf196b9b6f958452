"""Float32 -> FP16 around the quantized operators."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

import numpy as np
import onnx
import onnx_ir as ir
import onnx_ir.passes.common as common_passes
from onnxruntime.transformers.float16 import convert_float_to_float16

from gpusq_compile.lowering.exporter_table import OPSET

CAST_TO_HALF, CAST_TO_FLOAT = "_cast_to_fp16_node", "_cast_to_fp32_node"
"""How the names end of the casts that the conversion puts around an operator in FP32."""

ROOTS = frozenset(
    {"Add", "Mul", "Div", "Sqrt", "Reciprocal", "Pow", "Max", "Clip"}
    | {"Reshape", "Squeeze", "Unsqueeze"}
)
"""What comes between a sum of squares and a number of the size of what was squared, where all that
it reads else is stored."""
INPUT_CAST, OUTPUT_CAST = re.compile(r"graph_input_cast\d+"), re.compile(r"graph_output_cast\d+")
"""The names of the casts that the conversion puts at the model's ends."""


def to_half(model: onnx.ModelProto, kept: Sequence[str] = ()) -> onnx.ModelProto:
    """Convert every float tensor to FP16; graph inputs and outputs stay FP32 behind one Cast each.

    Scales were learned as FP16 values, so their conversion is exact. Constants beyond the FP16
    range (masks) are clamped to it. The nodes named in `kept` stay FP32 (half_range.py).
    """
    own_scales(model)
    name_zeros(model)
    exact = [*name_summing(model), *name_squares(model), *kept]
    half = convert_float_to_float16(
        model,
        keep_io_types=True,
        disable_shape_infer=True,
        # The default list leaves operators in FP32 that TensorRT runs in FP16.
        op_block_list=float32_only({node.op_type for node in model.graph.node}),
        node_block_list=exact,
    )
    drop_repeated(half.graph)
    drop_round_trips(half.graph)
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


def drop_round_trips(graph: onnx.GraphProto) -> None:
    """Hand on as it is what one operator in FP32 makes for another.

    The conversion casts it to half and back in between, for each of them by itself, and does so
    between them and the model's inputs and outputs.
    """
    down = {
        n.output[0]: n
        for n in graph.node
        if n.name.endswith(CAST_TO_HALF) or INPUT_CAST.fullmatch(n.name)
    }
    for node in graph.node:
        if OUTPUT_CAST.fullmatch(node.name) and node.input[0] in down:
            node.input[0] = down[node.input[0]].input[0]
    up = [n for n in graph.node if n.name.endswith(CAST_TO_FLOAT) and n.input[0] in down]
    exact = {n.output[0]: down[n.input[0]].input[0] for n in up}
    for node in graph.node:
        for index, name in enumerate(node.input):
            if name in exact:
                node.input[index] = exact[name]
    for node in up:
        graph.node.remove(node)
    read = {name for node in graph.node for name in node.input}
    read |= {value.name for value in graph.output}
    for name, node in down.items():
        if name not in read:
            graph.node.remove(node)


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


def name_squares(model: onnx.ModelProto) -> list[str]:
    """The names of what takes the mean or the sum of squares, of the squares themselves and of the
    root that follows, under new ones where they have none.

    Half has no room for the square of 256, which an activation in front of a normalization may
    well be. LayerNormalization knows that by itself; RMSNorm and norms in a model's own words do
    not.
    """
    stored = {tensor.name: tensor for tensor in model.graph.initializer}
    makers = {name: node for node in model.graph.node for name in node.output}
    readers: dict[str, list[onnx.NodeProto]] = {}
    for node in model.graph.node:
        for name in node.input:
            readers.setdefault(name, []).append(node)
    found: dict[int, onnx.NodeProto] = {}
    for node in model.graph.node:
        square = makers.get(node.input[0]) if node.input else None
        if node.op_type in ("ReduceMean", "ReduceSum"):
            if square is None or not is_square(square, stored):
                continue
            found[id(square)] = square
        elif node.op_type not in ("ReduceL2", "ReduceSumSquare") and not contracts_itself(node):
            continue
        queue = [node]
        for current in queue:
            found[id(current)] = current
            queue += [
                reader
                for name in current.output
                for reader in readers.get(name, ())
                if reader.op_type in ROOTS
                and id(reader) not in found
                and all(other == name or other in stored for other in reader.input)
            ]
    for index, node in enumerate(found.values()):
        node.name = node.name or f"square_{index}"
    return [node.name for node in found.values()]


def contracts_itself(node: onnx.NodeProto) -> bool:
    """Whether a node sums products of a tensor with itself: `einsum('bnd,bnd->bn', x, x)`."""
    return node.op_type == "Einsum" and len(node.input) == 2 and len(set(node.input)) == 1


def is_square(node: onnx.NodeProto, stored: Mapping[str, onnx.TensorProto]) -> bool:
    """Whether a node multiplies a tensor with itself; `stored` are the constants by name."""
    if node.op_type == "Mul":
        return bool(node.input[0] == node.input[1])
    exponent = stored.get(node.input[1]) if node.op_type == "Pow" else None
    return exponent is not None and bool((onnx.numpy_helper.to_array(exponent) == 2).all())


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
