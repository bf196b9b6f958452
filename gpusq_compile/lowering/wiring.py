"""Wiring of the ONNX graph around one weight, with onnx-graphsurgeon."""

from __future__ import annotations

import re
from collections.abc import Iterator

import numpy as np
import onnx_graphsurgeon as gs

GEMM_OPS = frozenset({"MatMul", "Gemm", "Conv"})
WEIGHT_PATH_OPS = frozenset({"DequantizeLinear", "Transpose"})


def consumers(weight: gs.Constant) -> Iterator[gs.Node]:
    """The nodes that read a weight, through its DequantizeLinear and Transpose."""
    queue = list(weight.outputs)
    while queue:
        node = queue.pop(0)
        yield node
        if node.op in WEIGHT_PATH_OPS:
            queue.extend(node.outputs[0].outputs)


def untranspose(weight: gs.Constant) -> bool:
    """Store a [N, K] weight that is only read transposed as [K, N], and drop the Transpose.

    The axis of its DequantizeLinear moves with it: of scales per channel from 0 to 1, of blocks
    along K from 1 to 0. Returns whether the graph had that form.
    """
    head = list(weight.outputs)
    dequantize = head[0] if len(head) == 1 and head[0].op == "DequantizeLinear" else None
    readers = list(dequantize.outputs[0].outputs) if dequantize is not None else head
    if not readers or any(
        node.op != "Transpose" or node.attrs.get("perm", [1, 0]) != [1, 0] for node in readers
    ):
        return False
    weight.values = np.ascontiguousarray(weight.values.T)
    source = weight
    if dequantize is not None:
        dequantize.attrs["axis"] = 1 - dequantize.attrs["axis"]
        scale = dequantize.inputs[1]
        if scale.values.ndim == 2:
            scale.values = np.ascontiguousarray(scale.values.T)
        source = dequantize.outputs[0]
        if source.shape is not None:
            source.shape = list(reversed(source.shape))
    for transpose in readers:
        transposed = transpose.outputs[0]
        for user in list(transposed.outputs):
            user.inputs[user.inputs.index(transposed)] = source
        transpose.inputs.clear()
        transpose.outputs.clear()
    return True


def name_quantizers(gemm: gs.Node) -> None:
    """Name the Q/DQ nodes at a GEMM after it: `LAYER/input_q`, `LAYER/weight_dq`, ...

    The clip in front of a 4-bit quantizer is `LAYER/input_clip` or `LAYER/output_clip`.

    A quantized input that several layers read bears the name of the last of them.
    """
    _name_output_quantizer(gemm)
    for position, side in ((0, "input"), (1, "weight")):
        dequantize = producer(gemm.inputs[position])
        if dequantize is None or dequantize.op != "DequantizeLinear":
            continue
        dequantize.name = f"{gemm.name}/{side}_dq"
        quantize = producer(dequantize.inputs[0])
        if quantize is not None and quantize.op == "QuantizeLinear":
            quantize.name = f"{gemm.name}/{side}_q"
            clip = producer(quantize.inputs[0])
            if clip is not None and clip.op == "Clip":
                clip.name = f"{gemm.name}/{side}_clip"


def _name_output_quantizer(gemm: gs.Node) -> None:
    readers = list(gemm.outputs[0].outputs)
    if len(readers) == 1 and readers[0].op == "Add":
        readers = list(readers[0].outputs[0].outputs)
    if len(readers) == 1 and readers[0].op == "Clip":
        clip = readers[0]
        readers = list(clip.outputs[0].outputs)
        if len(readers) == 1 and readers[0].op == "QuantizeLinear":
            clip.name = f"{gemm.name}/output_clip"
    if len(readers) == 1 and readers[0].op == "QuantizeLinear":
        readers[0].name = f"{gemm.name}/output_q"
        for dequantize in readers[0].outputs[0].outputs:
            dequantize.name = f"{gemm.name}/output_dq"


def name_batch(graph: gs.Graph, name: str = "batch") -> None:
    """Call the inputs' dynamic first dimension by a name, in place of the exporter's symbol."""
    sizes = [tensor.shape[0] for tensor in graph.inputs if tensor.shape]
    symbols = {size for size in sizes if isinstance(size, str)}
    if len(symbols) != 1:
        return
    symbol = re.compile(rf"\b{re.escape(symbols.pop())}\b")
    for tensor in graph.tensors().values():
        if isinstance(tensor, gs.Variable) and tensor.shape is not None:
            tensor.shape = [
                symbol.sub(name, size) if isinstance(size, str) else size for size in tensor.shape
            ]


def producer(tensor: gs.Tensor) -> gs.Node | None:
    """The node that computes a tensor, None of an input or a constant."""
    return tensor.inputs[0] if tensor.inputs else None
