"""Which operators of a graph ONNX has no form of, found before anything is compressed.

PyTorch's exporter knows at once what it translates whole. Any other operator is exported by itself,
with the exporter's decompositions, as the whole graph will be: seconds now, and not hours later.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.fx
from torch import nn
from torch.onnx._internal.exporter import _registration

from gpusq_compile.errors import GpusqError, InputError
from gpusq_compile.graph.query import aten, operator_name, place_of, value_dependent
from gpusq_compile.lowering.to_onnx import WAY_OUT, to_onnx

SCALARS: frozenset[object] = frozenset({aten.item.default, aten._local_scalar_dense.default})


def check_exportable(graph: torch.fx.Graph) -> None:
    """Find the first operator that cannot become ONNX.

    Raises:
        InputError: naming it and its place in the source of the model.
    """
    known = _registration.ONNXRegistry.from_torchlib()
    dependent = value_dependent(graph)
    tried: set[object] = set()
    for node in graph.nodes:
        if node.op != "call_function":
            continue
        if node.target in SCALARS and any(n in dependent for n in node.all_input_nodes):
            raise refusal(
                node,
                "the line makes a Python number of a tensor's value",
                "keep it a tensor: a scalar tensor works wherever a number does, so leave out "
                "`.item()`, `float()` or `int()`",
            )
        if not isinstance(node.target, torch._ops.OpOverload) or node.target in tried:
            continue
        tried.add(node.target)
        if node.target not in SCALARS and not known.is_registered(node.target):
            why = _obstacle(node)
            if why is not None:
                name = operator_name(node)
                raise refusal(node, f"ONNX has no form of the operator '{name}'{why}", WAY_OUT)


def refusal(node: torch.fx.Node, text: str, hint: str) -> InputError:
    """The error that an operator cannot be compiled, at its place in the source."""
    return InputError("operator-unsupported", text, location=place_of(node), hint=hint)


class _Alone(nn.Module):
    """One operator of a graph, called with the tensors that it reads there."""

    def __init__(self, node: torch.fx.Node) -> None:
        super().__init__()
        self.node = node
        self.sources = [n for n in node.all_input_nodes if _is_tensor(n)]

    def forward(self, *values: torch.Tensor) -> Any:
        given = dict(zip(self.sources, values, strict=True))

        def value_of(node: torch.fx.Node) -> Any:
            return given[node] if node in given else _hint(node.meta["val"])

        args, kwargs = torch.fx.node.map_arg((self.node.args, self.node.kwargs), value_of)
        return self.node.target(*args, **kwargs)  # type: ignore[operator]


def _obstacle(node: torch.fx.Node) -> str | None:
    """Why an operator cannot be exported alone; None where it can, or was not to be tried."""
    alone = _Alone(node)
    try:
        inputs = tuple(
            torch.zeros([_hint(size) for size in n.meta["val"].shape], dtype=n.meta["val"].dtype)
            for n in alone.sources
        )
        program = torch.export.export(alone, inputs)
    except Exception:
        return None  # What does not run on its own is judged with the whole graph.
    try:
        to_onnx(program)
    except GpusqError as error:
        return "" if error.location or "has no ONNX form" in error.message else f": {error.message}"
    return None


def _is_tensor(node: torch.fx.Node) -> bool:
    return isinstance(node.meta.get("val"), torch.Tensor)


def _hint(value: Any) -> Any:
    return value.node.hint if isinstance(value, (torch.SymInt, torch.SymFloat)) else value
