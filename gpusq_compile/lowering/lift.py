"""A graph module -> an `ExportedProgram`, without tracing it again.

`torch.export`'s unlifted form reads parameters by `get_attr`; the program form takes them as graph
inputs described by a signature (torch.export, "Export IR Spec"). Tracing the rewritten module
again would cost seconds and lose provenance; lifting it is a rename.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

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

from gpusq_compile.graph.query import tensor_attribute
from gpusq_compile.lowering.decompose import decompose


@dataclass(frozen=True)
class CallConvention:
    """How the traced program is called: what a rewritten graph of it must keep.

    Kept in place of the program itself, which would hold every dense weight until the end.
    `out_leaves` holds None for each output tensor, and `(value,)` for each output that is none.
    """

    range_constraints: dict[Any, Any]
    module_call_graph: list[Any]
    example_inputs: Any
    out_spec: Any
    out_leaves: tuple[Any, ...]


def convention_of(program: torch.export.ExportedProgram, outputs: Any) -> CallConvention:
    """The convention of `program`; `outputs` are the eager module's, for what is no tensor."""
    leaves = (None if torch.is_tensor(leaf) else (leaf,) for leaf in tree_leaves(outputs))
    return CallConvention(
        out_leaves=tuple(leaves),
        range_constraints=program.range_constraints,
        module_call_graph=program.module_call_graph,
        example_inputs=program.example_inputs,
        out_spec=program.call_spec.out_spec,
    )


class UndecomposedProgram(torch.export.ExportedProgram):
    """A program that the ONNX exporter translates operator by operator, as it is.

    The exporter first decomposes every program, which traces it several more times and takes
    longer than the translation. Operators that it translates whole (linear, layer_norm, attention,
    gelu, ...) need no decomposition.
    """

    def run_decompositions(self, *_: Any, **__: Any) -> torch.export.ExportedProgram:
        return self


def lift(
    graph_module: torch.fx.GraphModule,
    convention: CallConvention,
    kind: type[torch.export.ExportedProgram] = torch.export.ExportedProgram,
) -> torch.export.ExportedProgram:
    """The program of a rewritten `graph_module`, called as the traced one was.

    Every tensor the graph reads becomes an input of the program: parameters as such, everything
    else as a buffer. Operators without a translation to ONNX are decomposed. `kind` is the class of
    the program.
    """
    graph = torch.fx.Graph()
    values: dict[torch.fx.Node, Any] = {}
    parameters = dict(graph_module.named_parameters(remove_duplicate=False))
    specs: list[InputSpec] = []
    state: dict[str, torch.Tensor] = {}
    lifted: dict[str, torch.fx.Node] = {}
    for node in graph_module.graph.nodes:
        if node.op != "get_attr":
            continue
        path = str(node.target)
        if path not in lifted:
            role = InputKind.PARAMETER if path in parameters else InputKind.BUFFER
            placeholder = graph.placeholder(("p_" if path in parameters else "b_") + node.name)
            placeholder.meta = copy.copy(node.meta)
            lifted[path] = placeholder
            state[path] = tensor_attribute(graph_module, path)
            persistent = None if role is InputKind.PARAMETER else True
            specs.append(InputSpec(role, TensorArgument(placeholder.name), path, persistent))
        values[node] = lifted[path]
    for node in graph_module.graph.nodes:
        if node.op == "placeholder" and isinstance(node.meta["val"], torch.Tensor):
            values[node] = graph.node_copy(node)
            argument = TensorArgument(values[node].name)
            specs.append(InputSpec(InputKind.USER_INPUT, argument, None))
    for node in graph_module.graph.nodes:
        if node.op in ("get_attr", "placeholder"):
            continue
        if node.op != "output":
            values[node] = graph.node_copy(node, lambda argument: values[argument])
    output = next(node for node in reversed(graph_module.graph.nodes) if node.op == "output")
    results = [values[leaf] for leaf in tree_leaves(output.args[0]) if leaf in values]
    returned = graph.output(tuple(results))
    decompose(graph)
    # Read off the graph, as an output itself may have been decomposed.
    results = list(returned.args[0])
    outputs = [
        OutputSpec(OutputKind.USER_OUTPUT, TensorArgument(result.name), None) for result in results
    ]
    return kind(
        root=torch.nn.Module(),
        graph=graph,
        graph_signature=ExportGraphSignature(specs, outputs),
        state_dict=state,
        range_constraints=convention.range_constraints,
        module_call_graph=convention.module_call_graph,
        example_inputs=convention.example_inputs,
        constants={},
    )
