"""The exporter's translation of every kind of call in a graph, before anything is compressed.

Whether an operator is translated may depend on its arguments, which its name does not tell. So each
call that differs from the others in more than the sizes of tensors is put once into a program of
its own, without weights, and that is translated.
"""

from __future__ import annotations

import torch
import torch.fx
from torch.export.graph_signature import (
    ExportGraphSignature,
    InputKind,
    InputSpec,
    OutputKind,
    OutputSpec,
    TensorArgument,
)
from torch.utils._pytree import tree_leaves

from gpusq_compile.errors import CheckFailed
from gpusq_compile.graph.query import aten, is_size
from gpusq_compile.lowering.decompose import call_key, decompose
from gpusq_compile.lowering.lift import CallConvention, UndecomposedProgram
from gpusq_compile.lowering.to_onnx import translated

MOVES: frozenset[object] = frozenset(
    {
        aten.expand.default,
        aten.flatten.using_ints,
        aten.permute.default,
        aten.reshape.default,
        aten.select.int,
        aten.slice.Tensor,
        aten.transpose.int,
        aten.unsqueeze.default,
    }
)
"""Operators that are translated whatever the sizes and axes that they are given."""

_TRANSLATED: set[tuple[object, str]] = set()
"""The calls that were translated before, in this process. Other sizes do not count as others: where
they matter, the export says so."""


def rehearse(graph: torch.fx.Graph, convention: CallConvention) -> None:
    """Translate each kind of call once, whole or else decomposed, as the export will.

    Raises:
        CheckFailed: the exporter cannot; with the operator and its place in the model's source.
    """
    calls: dict[tuple[object, str], torch.fx.Node] = {}
    for node in graph.nodes:
        if node.op == "call_function" and _gives_tensors(node):
            calls.setdefault(_kind(node), node)
    fresh = {key: node for key, node in calls.items() if key not in _TRANSLATED}
    if not fresh:
        return
    nodes = list(fresh.values())
    try:
        translated(_program(nodes, convention, UndecomposedProgram))
    except CheckFailed as error:
        try:
            translated(_program(nodes, convention, torch.export.ExportedProgram))
        except CheckFailed:
            raise error from None  # It names the operator that a person knows.
    _TRANSLATED.update(fresh)


def _kind(node: torch.fx.Node) -> tuple[object, str]:
    return (node.target, "") if node.target in MOVES else call_key(node)


def _gives_tensors(node: torch.fx.Node) -> bool:
    """Whether a call is one of an operator on tensors, rather than of sizes or of a tuple."""
    return isinstance(node.target, torch._ops.OpOverload) and not is_size(node)


def _program(
    nodes: list[torch.fx.Node],
    convention: CallConvention,
    kind: type[torch.export.ExportedProgram],
) -> torch.export.ExportedProgram:
    """The calls side by side, on inputs like theirs."""
    graph = torch.fx.Graph()
    values: dict[torch.fx.Node, torch.fx.Node] = {}
    inputs: dict[torch.fx.Node, torch.fx.Node] = {}

    def read(source: torch.fx.Node) -> None:
        """Make a source of a call: a size from its tensor, a tensor as an input."""
        if source in values:
            return
        if source.op == "call_function" and not isinstance(source.meta["val"], torch.Tensor):
            for argument in source.all_input_nodes:
                read(argument)
            values[source] = graph.node_copy(source, values.__getitem__)
            return
        with graph.inserting_before(next(iter(graph.nodes), None)):
            values[source] = inputs[source] = graph.placeholder(f"of_{source.name}")
        values[source].meta = {"val": source.meta["val"]}

    results: list[torch.fx.Node] = []
    for node in nodes:
        for source in node.all_input_nodes:
            read(source)
        result = graph.node_copy(node, values.__getitem__)
        if isinstance(node.meta["val"], torch.Tensor):
            results.append(result)
            continue
        values[node] = result
        results += [graph.node_copy(user, values.__getitem__) for user in node.users]
    graph.output(tuple(results))
    decompose(graph)
    [output] = [node for node in graph.nodes if node.op == "output"]
    placeholders = [node for node in graph.nodes if node.op == "placeholder"]
    signature = ExportGraphSignature(
        [InputSpec(InputKind.USER_INPUT, TensorArgument(n.name), None) for n in placeholders],
        [
            OutputSpec(OutputKind.USER_OUTPUT, TensorArgument(leaf.name), None)
            for leaf in tree_leaves(output.args[0])
        ],
    )
    return kind(
        root=torch.nn.Module(),
        graph=graph,
        graph_signature=signature,
        state_dict={},
        range_constraints=convention.range_constraints,
        module_call_graph=convention.module_call_graph,
        example_inputs=None,
        constants={},
    )
