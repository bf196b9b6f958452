"""What of a model has no room in half, whose largest number is 65504, on data of the user's."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import onnx
import torch
from onnx import TensorProto, helper

from gpusq_compile.lowering.runtime import run_once

HALF_MAX = 65504.0
MARGIN = 2.0
"""Other data may reach this much further than the batch that is looked at."""
MASK = 1e30
"""What is beyond it stands for infinity: scores that are masked out, which half clamps."""
MOVES = frozenset({"Flatten", "Identity", "Reshape", "Squeeze", "Transpose", "Unsqueeze"})
"""What gives the values that it reads."""
ENDS = ("ReduceMin", "ReduceMax")
QUANTIZERS = frozenset({"QuantizeLinear", "DequantizeLinear"})


@dataclass(frozen=True)
class MeasuredRun:
    """What a model gave for flat `inputs`: its flat `outputs`, and its `wide` tensors, those in
    float32 that come too near to half's largest number, by name with their largest magnitudes."""

    inputs: list[torch.Tensor]
    outputs: list[torch.Tensor]
    wide: dict[str, float]


def run_measured(model: onnx.ModelProto, inputs: Sequence[torch.Tensor], path: Path) -> MeasuredRun:
    """Run a model once on one batch in ONNX Runtime, and see which of its tensors are wide.

    In float32: its CPU kernels compute operators in half as floats, so that a model in half shows
    nothing. `path` is where the model is kept meanwhile.

    Raises:
        CheckFailed: ONNX Runtime cannot run the model.
    """
    graph = model.graph
    wide = {
        value.name: largest
        for value, given in zip(graph.input, inputs, strict=True)
        if given.is_floating_point() and (largest := _largest(given.min(), given.max())) is not None
    }
    with with_extremes(graph) as names:
        found = run_once(model, inputs, path)
    outputs, ends = found[: len(graph.output)], found[len(graph.output) :]
    for name, low, high in zip(names, ends[::2], ends[1::2], strict=True):
        largest = _largest(low, high)
        if largest is not None:
            wide[name] = largest
    for node in graph.node:
        if node.op_type in MOVES and node.input[0] in wide:
            wide[node.output[0]] = wide[node.input[0]]
    return MeasuredRun(list(inputs), outputs, wide)


@contextlib.contextmanager
def with_extremes(graph: onnx.GraphProto) -> Iterator[list[str]]:
    """Let a graph give the smallest and the largest value of its float tensors, too.

    Each is reduced right behind what makes it: otherwise all of them would be kept for the end.

    Yields:
        The names of the tensors, in the order of the further outputs, of which each has two.
    """
    outputs, nodes = len(graph.output), list(graph.node)
    floats = {v.name for v in (*graph.value_info, *graph.output) if _is_float(v)}
    measured, names = [], []
    for node in nodes:
        measured.append(node)
        if node.op_type not in MOVES:
            found = [name for name in node.output if name in floats]
            measured += [
                helper.make_node(kind, [name], [f"{name}.{kind}"], keepdims=0)
                for name in found
                for kind in ENDS
            ]
            names += found
    try:
        del graph.node[:]
        graph.node.extend(measured)
        graph.output.extend(
            helper.make_tensor_value_info(f"{name}.{kind}", TensorProto.FLOAT, [])
            for name in names
            for kind in ENDS
        )
        yield names
    finally:
        del graph.node[:]
        graph.node.extend(nodes)
        del graph.output[outputs:]


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
