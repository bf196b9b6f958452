"""Operators that the ONNX exporter cannot translate, in terms of those that it can.

The exporter's own way is to decompose the whole program, which traces it several times more and
takes longer than the translation. Here each such operator alone is decomposed, by the exporter's
table (PyTorch, "Export IR", core ATen decompositions), in milliseconds.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
import torch.fx
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.node import map_arg
from torch.onnx._internal.exporter import _decomp
from torch.onnx._internal.exporter._registration import ONNXRegistry
from torch.utils._pytree import tree_map_only

from gpusq_compile.graph.edit import copy_provenance, fake_mode_of
from gpusq_compile.graph.inline import put_in_line
from gpusq_compile.lowering.exporter_table import translations
from gpusq_compile.lowering.norms import rms_norm
from gpusq_compile.quantization.operators import DEQUANTIZE, QUANTIZE

OWN: dict[object, Callable[..., Any]] = {torch.ops.aten.rms_norm.default: rms_norm}
"""Decompositions in place of PyTorch's."""


@cache
def _decompositions(table: ONNXRegistry) -> dict[Any, Callable[..., Any]]:
    """The exporter's table of decompositions into what a table of translations has."""
    known = set(_decomp.get_onnx_implemented_overloads(table))
    return _decomp.create_onnx_friendly_decomposition_table(known)


def is_translated(target: object) -> bool:
    """Whether an operator is translated as it is: by the exporter, or by a translation of ours."""
    if not isinstance(target, torch._ops.OpOverload) or target in (QUANTIZE, DEQUANTIZE):
        return True
    return bool(translations().is_registered(target))


def untranslatable(graph: torch.fx.Graph) -> torch.fx.Node | None:
    """The first node that neither has a translation nor decomposes into operators that have.

    A node whose decomposition cannot be traced counts as one that has: the exporter will tell.
    """
    seen: set[object] = set()
    for node in graph.nodes:
        if node.op != "call_function" or is_translated(node.target) or call_key(node) in seen:
            continue
        seen.add(call_key(node))
        parts = decomposition(node)
        if parts is not None and not all(is_translated(part.target) for part in parts.nodes):
            found: torch.fx.Node = node
            return found
    return None


def call_key(node: torch.fx.Node) -> tuple[object, str]:
    """What a decomposition may depend on: the operator, types and axes of tensors, all the rest."""

    def kind(source: torch.fx.Node) -> str:
        value = source.meta["val"]
        return f"{value.dtype}[{value.ndim}]" if isinstance(value, torch.Tensor) else "size"

    return node.target, str(map_arg((node.args, node.kwargs), kind))


def decomposition(node: torch.fx.Node) -> torch.fx.Graph | None:
    """A node as a graph of its `all_input_nodes`; None where it cannot be traced."""
    sources = node.all_input_nodes

    def call(*values: Any) -> Any:
        by_source = dict(zip(sources, values, strict=True))
        args, kwargs = map_arg((node.args, node.kwargs), lambda source: by_source[source])
        function = OWN.get(node.target, node.target)
        assert callable(function)
        return function(*args, **kwargs)

    try:
        with fake_mode_of(node.graph):
            # ONNX knows no strides: to keep them would take operators of their own.
            values = [tree_map_only(torch.Tensor, _contiguous, s.meta["val"]) for s in sources]
            known = _decompositions(translations())
            traced = make_fx(call, decomposition_table=known, _allow_non_fake_inputs=True)(*values)
    except Exception:
        return None  # Whatever it is, the exporter meets it too, and says so with the node's name.
    graph: torch.fx.Graph = traced.graph
    graph.eliminate_dead_code()
    return None if any(part.op == "get_attr" for part in graph.nodes) else graph


def _contiguous(value: torch.Tensor) -> torch.Tensor:
    return value.contiguous()


def decompose(graph: torch.fx.Graph) -> int:
    """Decompose in place each node that the exporter cannot translate; returns how many."""
    count = 0
    for node in list(graph.nodes):
        if node.op != "call_function" or is_translated(node.target):
            continue
        parts = decomposition(node)
        if parts is not None:
            for part in put_in_line(node, parts, node.all_input_nodes):
                copy_provenance(node, part)
            count += 1
    return count
