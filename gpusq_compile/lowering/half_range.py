"""What of a model has no room in half, whose largest number is 65504, on data of the user's."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import onnx
import torch
from onnx import TensorProto, helper

from gpusq_compile.lowering.runtime import open_session, run_session

HALF_MAX = 65504.0
MARGIN = 2.0
"""Other data may reach this much further than the batch that is looked at."""
MASK = 1e30
"""What is beyond it stands for infinity: scores that are masked out, which half clamps."""
QUANTIZERS = frozenset({"QuantizeLinear", "DequantizeLinear"})


def wide_tensors(
    model: onnx.ModelProto, inputs: Sequence[torch.Tensor], path: Path
) -> dict[str, float]:
    """The float32 tensors of a model that come too near to half's largest number on one batch.

    They are measured in ONNX Runtime, in float32: its CPU kernels compute operators in half as
    floats, so that a model in half shows nothing. `path` is where the model is kept meanwhile.

    Returns:
        The largest magnitude of each such tensor, by name.

    Raises:
        CheckFailed: ONNX Runtime cannot run the model.
    """
    graph = model.graph
    found = {
        value.name: largest
        for value, given in zip(graph.input, inputs, strict=True)
        if given.is_floating_point() and (largest := _largest(given.min(), given.max())) is not None
    }
    nodes, outputs = len(graph.node), len(graph.output)
    floats = {value.name for value in graph.value_info if _is_float(value)}
    floats |= {value.name for value in graph.output if _is_float(value)}
    names = [name for node in graph.node for name in node.output if name in floats]
    for kind in ("ReduceMin", "ReduceMax"):
        for name in names:
            reduced = f"{name}.{kind}"
            graph.node.append(helper.make_node(kind, [name], [reduced], keepdims=0))
            graph.output.append(helper.make_tensor_value_info(reduced, TensorProto.FLOAT, []))
    try:
        onnx.save(model, path)
    finally:
        del graph.node[nodes:]
        del graph.output[outputs:]
    reduced_values = run_session(open_session(path, runs=1), list(inputs))[outputs:]
    path.unlink()
    lows, highs = reduced_values[: len(names)], reduced_values[len(names) :]
    for name, low, high in zip(names, lows, highs, strict=True):
        largest = _largest(low, high)
        if largest is not None:
            found[name] = largest
    return found


def _is_float(value: onnx.ValueInfoProto) -> bool:
    kind = value.type.tensor_type
    sizes = [dimension.dim_value for dimension in kind.shape.dim if dimension.HasField("dim_value")]
    return bool(kind.elem_type == TensorProto.FLOAT) and 0 not in sizes


def _largest(low: torch.Tensor, high: torch.Tensor) -> float | None:
    """The magnitude of the larger end, None where half has room for both with the margin."""
    ends = [abs(float(end)) for end in (low, high)]
    largest = max((end for end in ends if end < MASK and not math.isnan(end)), default=0.0)
    return largest if largest > HALF_MAX / MARGIN else None


def around(model: onnx.ModelProto, wide: Iterable[str]) -> list[str]:
    """The names of the nodes that make or read one of the `wide` tensors, under new ones where
    they have none: they stay in float32.

    A quantizer saturates at infinity as at any large number, and what reads a dequantized tensor
    has to be in its type for TensorRT to know a quantized GEMM: neither is among them.
    """
    names = set(wide)
    found = []
    dequantized = _dequantized(model)
    for index, node in enumerate(model.graph.node):
        if node.op_type in QUANTIZERS or not dequantized.isdisjoint(node.input):
            continue
        if not names.isdisjoint([*node.input, *node.output]):
            node.name = node.name or f"wide_{index}"
            found.append(node.name)
    return found


def beyond(model: onnx.ModelProto, wide: Mapping[str, float]) -> list[tuple[onnx.NodeProto, float]]:
    """The quantized GEMMs whose output is infinite in half, each with the magnitude of it."""
    dequantized = _dequantized(model)
    return [
        (node, wide[name])
        for node in model.graph.node
        if node.op_type not in QUANTIZERS and not dequantized.isdisjoint(node.input)
        for name in node.output
        if wide.get(name, 0.0) > HALF_MAX
    ]


def _dequantized(model: onnx.ModelProto) -> set[str]:
    return {n.output[0] for n in model.graph.node if n.op_type == "DequantizeLinear"}
