"""Which operators of a graph ONNX has no form of, found before anything is compressed."""

from __future__ import annotations

import torch
import torch.fx

from gpusq_compile.errors import CheckFailed, InputError
from gpusq_compile.graph.inline import AUTOCAST
from gpusq_compile.graph.query import aten, operator_name, place_of, value_dependent
from gpusq_compile.lowering.decompose import untranslatable
from gpusq_compile.lowering.lift import CallConvention
from gpusq_compile.lowering.rehearsal import rehearse
from gpusq_compile.lowering.to_onnx import WAY_OUT

SCALARS: frozenset[object] = frozenset({aten.item.default, aten._local_scalar_dense.default})


def check_exportable(graph: torch.fx.Graph, convention: CallConvention) -> None:
    """Find the first operator that cannot become ONNX, or cannot with its arguments.

    Raises:
        InputError: naming it and its place in the source of the model.
    """
    dependent = value_dependent(graph)
    for node in graph.nodes:
        if node.target in SCALARS and any(n in dependent for n in node.all_input_nodes):
            raise refusal(
                node,
                "the line makes a Python number of a tensor's value",
                "keep it a tensor: a scalar tensor works wherever a number does, so leave out "
                "`.item()`, `float()` or `int()`",
            )
    node = untranslatable(graph)
    if node is not None:
        raise refusal(node, f"ONNX has no form of the operator '{full_name(node)}'", WAY_OUT)
    try:
        rehearse(graph, convention)
    except CheckFailed as error:
        raise InputError(
            "operator-unsupported", error.message, location=error.location, hint=error.hint
        ) from error


def full_name(node: torch.fx.Node) -> str:
    """An operator's name, with its namespace (`mine::warp`) where it is not PyTorch's own."""
    space = getattr(node.target, "namespace", "aten")
    name = operator_name(node)
    return name if space == "aten" else f"{space}::{name}"


def check_control_flow(graph: torch.fx.Graph) -> None:
    """Find the first operator that runs another graph (`torch.cond`, a loop).

    Raises:
        InputError: naming it and its place in the source of the model.
    """
    for node in graph.nodes:
        if node.target is AUTOCAST:
            raise refusal(
                node,
                "autocast changes the types that the region computes in, which the compiler sets",
                "leave `torch.autocast` to the code around the model, or give it `enabled=False`; "
                "precisions are chosen by rules",
            )
        if isinstance(node.target, torch._ops.HigherOrderOperator):
            raise refusal(
                node,
                f"the control flow '{node.target}' is none that a rewritten graph can hold",
                "torch.where(condition, a, b) keeps both branches in the graph; --scope PATH "
                "compiles a submodule without it",
            )


def refusal(node: torch.fx.Node, text: str, hint: str) -> InputError:
    """The error that an operator cannot be compiled, at its place in the source."""
    return InputError("operator-unsupported", text, location=place_of(node), hint=hint)
