"""Structural truth of the final ONNX file: what is stored for each layer, read back from it.

Nothing here trusts a pass: it starts at the GEMM that bears the layer's name and walks to the
stored weight.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper, numpy_helper

from gpusq_compile.plan import LayerPlan
from gpusq_compile.quantization.fake_quantize import (
    ACTIVATION_RANGES,
    WEIGHT_RANGES,
    IntegerRange,
)
from gpusq_compile.sparsity import PATTERNS, violations


@dataclass(frozen=True)
class StoredLayer:
    """What the file holds for one layer.

    `mask_ok` is None when no sparsity was applied. `weight_bytes` counts the weight and its
    scales. `faults` are the promises that the file breaks.
    """

    name: str
    weight_dtype: str | None
    mask_ok: bool | None
    weight_bytes: int
    faults: tuple[str, ...]


_WIDENED = {TensorProto.INT4: np.int8, TensorProto.UINT4: np.uint8}


class StoredGraph:
    """A model's nodes by name, by output and by input, and its stored tensors by name."""

    def __init__(self, model: onnx.ModelProto) -> None:
        self.initializers = {tensor.name: tensor for tensor in model.graph.initializer}
        self.nodes = {node.name: node for node in model.graph.node}
        self.producers = {output: node for node in model.graph.node for output in node.output}
        self.users: dict[str, list[onnx.NodeProto]] = {}
        for node in model.graph.node:
            for name in node.input:
                self.users.setdefault(name, []).append(node)

    def array(self, name: str) -> np.ndarray | None:
        """The values of an initializer; those of 4-bit types widened to 8 bits."""
        tensor = self.initializers.get(name)
        if tensor is None:
            return None
        values = numpy_helper.to_array(tensor)
        widened = _WIDENED.get(tensor.data_type)
        return values if widened is None else values.astype(widened)

    def type_of(self, name: str) -> str:
        return helper.tensor_dtype_to_np_dtype(self.initializers[name].data_type).name

    def bytes_of(self, name: str) -> int:
        tensor = self.initializers[name]
        values = math.prod(int(size) for size in tensor.dims)
        if tensor.data_type in _WIDENED:
            return (values + 1) // 2
        itemsize: int = helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize
        return values * itemsize


def check_layers(model: onnx.ModelProto, plans: list[LayerPlan]) -> list[StoredLayer]:
    """Check every planned layer of the final model."""
    graph = StoredGraph(model)
    return [_check_layer(graph, plan) for plan in plans]


def _check_layer(graph: StoredGraph, plan: LayerPlan) -> StoredLayer:
    gemm = graph.nodes.get(plan.name)
    if gemm is None:
        return StoredLayer(plan.name, None, None, 0, ("no node of this name in the file",))
    faults: list[str] = []
    dequantize = graph.producers.get(gemm.input[1])
    if dequantize is None:
        weight, scales = gemm.input[1], ""
    elif dequantize.op_type == "DequantizeLinear":
        weight, scales = dequantize.input[0], dequantize.input[1]
    else:
        weight, scales = "", ""
    stored, scale = graph.array(weight), graph.array(scales)
    if stored is None:
        return StoredLayer(plan.name, None, None, 0, ("its weight is no stored constant",))
    dtype, size = graph.type_of(weight), graph.bytes_of(weight)
    # MatMul stores [K, N]; Gemm with transB [N, K]; Conv [out, in, kh, kw].
    output_axis = 1 if gemm.op_type == "MatMul" or not _attribute(gemm, "transB", 1) else 0
    by_output = np.moveaxis(stored, output_axis, 0)
    if by_output.shape != plan.shape:
        fault = f"its weight has shape {list(by_output.shape)}, not {list(plan.shape)}"
        return StoredLayer(plan.name, dtype, None, size, (fault,))
    mask_ok = None
    if plan.applied.sparsity is not None:
        pattern = PATTERNS[plan.applied.sparsity]
        bad = violations(torch.from_numpy(by_output.copy()), pattern)
        mask_ok = bad == 0
        if bad:
            faults.append(f"{bad} groups break {plan.applied.sparsity}")
    block = plan.quantize.block if plan.quantize is not None else None
    if plan.applied.weight is not None:
        grid = WEIGHT_RANGES[plan.applied.weight]
        wanted = _Form("int8" if block is None else "int4", grid, output_axis, block)
        if dequantize is None or scale is None:
            faults.append(f"its weight is stored as {dtype}, not as {wanted.dtype} with scales")
        else:
            faults += _weight_faults(graph, dequantize, stored, scale, wanted)
            if block is not None and plan.applied.activation is None:
                faults += _float_input_faults(graph, graph.producers.get(gemm.input[0]))
    if plan.applied.activation is not None:
        grid = ACTIVATION_RANGES[plan.applied.activation]
        faults += activation_faults(graph, graph.producers.get(gemm.input[0]), grid, "input")
    if plan.applied.output is not None:
        faults += _output_faults(graph, gemm, ACTIVATION_RANGES[plan.applied.output])
    if scale is not None:
        size += graph.bytes_of(scales)
    return StoredLayer(plan.name, dtype, mask_ok, size, tuple(faults))


@dataclass(frozen=True)
class _Form:
    """How a quantized weight should be stored.

    `grid` are the levels it may have; `block` is the number of input channels that share a scale,
    None where all of them do.
    """

    dtype: str
    grid: IntegerRange
    output_axis: int
    block: int | None


def _weight_faults(
    graph: StoredGraph,
    dequantize: onnx.NodeProto,
    stored: np.ndarray,
    scale: np.ndarray,
    wanted: _Form,
) -> list[str]:
    faults = []
    grid, output_axis = wanted.grid, wanted.output_axis
    dtype = graph.type_of(dequantize.input[0])
    if dtype != wanted.dtype:
        faults.append(f"its weight is {dtype}, not {wanted.dtype}")
    for reached in (int(stored.min(initial=0)), int(stored.max(initial=0))):
        if not grid.qmin <= reached <= grid.qmax:
            allowed = f"the symmetric range [{grid.qmin}, {grid.qmax}] of {grid.name}"
            faults.append(f"its weight reaches {reached}, outside {allowed}")
    axis = _attribute(dequantize, "axis", 1)
    block = _attribute(dequantize, "block_size", 0)
    if wanted.block is None:
        if scale.shape != (stored.shape[output_axis],):
            faults.append(f"{scale.shape} scales for {stored.shape[output_axis]} output channels")
        wanted_axis = output_axis
    else:
        wanted_axis = 1 - output_axis
        shape = list(stored.shape)
        shape[wanted_axis] //= wanted.block
        if scale.shape != tuple(shape):
            faults.append(f"scales of shape {list(scale.shape)}, not {shape}")
    if block != (wanted.block or 0):
        faults.append(f"its scales are for blocks of {block}, not of {wanted.block or 0}")
    if axis != wanted_axis:
        faults.append(f"scales lie on axis {axis}, not {wanted_axis}")
    if not bool((np.isfinite(scale) & (scale > 0)).all()):
        faults.append("a weight scale is not positive and finite")
    return faults + _zero_point_faults(graph, dequantize, "weight")


def _float_input_faults(graph: StoredGraph, dequantize: onnx.NodeProto | None) -> list[str]:
    """Whether an input that should stay float is quantized, other than as a layer's output."""
    if dequantize is None or dequantize.op_type != "DequantizeLinear":
        return []
    source = graph.producers.get(dequantize.input[0])
    while source is not None and source.op_type in ("QuantizeLinear", "Clip", "Add"):
        computed = [graph.producers[name] for name in source.input if name in graph.producers]
        # A bias is a constant; an add of two computed tensors is no part of a layer.
        source = computed[0] if len(computed) == 1 else None
    if source is not None and source.op_type in ("MatMul", "Gemm", "Conv"):
        return []
    return ["its input is quantized, and only its weight should be"]


def activation_faults(
    graph: StoredGraph, dequantize: onnx.NodeProto | None, grid: IntegerRange, side: str
) -> list[str]:
    """What is wrong with the Q/DQ of one activation, from the node that should dequantize it."""
    if dequantize is None or dequantize.op_type != "DequantizeLinear":
        return [f"its {side} is not quantized"]
    quantize = graph.producers.get(dequantize.input[0])
    if quantize is None or quantize.op_type != "QuantizeLinear":
        return [f"its {side} is dequantized, but never quantized"]
    faults = []
    scales = [graph.array(node.input[1]) for node in (quantize, dequantize)]
    for node, scale in zip((quantize, dequantize), scales, strict=True):
        if scale is None or scale.ndim != 0:
            faults.append(f"its {side} scale is not one constant")
        elif not (np.isfinite(scale) and float(scale) > 0):
            faults.append(f"its {side} scale is {float(scale)}")
        faults += _zero_point_faults(graph, node, side)
    if not faults and float(scales[0]) != float(scales[1]):  # type: ignore[arg-type]
        faults.append(f"its {side} is quantized by {scales[0]} and dequantized by {scales[1]}")
    if not faults and grid != ACTIVATION_RANGES["int8"]:
        faults += _clip_faults(graph, quantize, float(scales[0]), grid, side)  # type: ignore[arg-type]
    return faults


def _clip_faults(
    graph: StoredGraph, quantize: onnx.NodeProto, scale: float, grid: IntegerRange, side: str
) -> list[str]:
    """Whether the values are held to the levels of a type narrower than int8."""
    clip = graph.producers.get(quantize.input[0])
    if clip is None or clip.op_type != "Clip":
        return [f"its {side} is not clipped to the range of {grid.name}"]
    low, high = (_level(graph, clip, index, scale) for index in (1, 2))
    if (low, high) != (str(grid.qmin), str(grid.qmax)):
        allowed = f"{grid.qmin} to {grid.qmax}"
        return [f"its {side} is clipped to the levels {low} to {high}, not {allowed}"]
    return []


def _level(graph: StoredGraph, clip: onnx.NodeProto, index: int, scale: float) -> str:
    """The level that a border of a Clip rounds to; `?` where it is no finite constant."""
    border = graph.array(clip.input[index]) if index < len(clip.input) else None
    if border is None or not np.isfinite(border).all():
        return "?"
    return str(round(float(border) / scale))


def _output_faults(graph: StoredGraph, gemm: onnx.NodeProto, grid: IntegerRange) -> list[str]:
    users = graph.users.get(gemm.output[0], [])
    if len(users) == 1 and users[0].op_type == "Add":
        users = graph.users.get(users[0].output[0], [])
    if grid != ACTIVATION_RANGES["int8"] and len(users) == 1 and users[0].op_type == "Clip":
        users = graph.users.get(users[0].output[0], [])
    if not users or any(user.op_type != "QuantizeLinear" for user in users):
        return ["its output is not quantized"]
    return [
        fault
        for user in users
        for reader in graph.users.get(user.output[0], [])
        for fault in activation_faults(graph, reader, grid, "output")
    ]


def _zero_point_faults(graph: StoredGraph, node: onnx.NodeProto, side: str) -> list[str]:
    if len(node.input) < 3 or not node.input[2]:
        # DequantizeLinear then takes 0 of its input's type; QuantizeLinear would give uint8.
        return [f"its {side} is quantized to uint8"] if node.op_type == "QuantizeLinear" else []
    zero_point = graph.array(node.input[2])
    if zero_point is None or zero_point.dtype != np.int8 or bool((zero_point != 0).any()):
        return [f"its {side} zero-point is not int8 0"]
    return []


def _attribute(node: onnx.NodeProto, name: str, default: int) -> int:
    """The integer attribute; for `transB` of a Conv the default says its weight is output-first."""
    for attribute in node.attribute:
        if attribute.name == name:
            return int(attribute.i)
    return 0 if name == "transB" and node.op_type == "Gemm" else default
