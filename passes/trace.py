"""trace: the user's module -> one `torch.fx.GraphModule`, batch dynamic.

Needs nothing. Runs the module once eagerly (its outputs are the reference that every later pass
is compared with), exports it with `torch.export`, and unlifts the program into a graph module
whose parameters keep the user's names. Guarantees `graph`.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.fx
from torch.utils._pytree import tree_leaves, tree_map

from gpusq_compile.compilation import Compilation
from gpusq_compile.data import batches
from gpusq_compile.errors import InputError
from gpusq_compile.graph.query import source_line
from gpusq_compile.lowering.lift import convention_of
from gpusq_compile.model_source import user_error
from gpusq_compile.pass_base import Pass, PassResult
from gpusq_compile.remarks import analysis, missed

MIN_BATCH = 2
"""`torch.export` specializes batch sizes 0 and 1, so the trace needs two or more."""


def run(compilation: Compilation) -> PassResult:
    source = compilation.source
    module = compilation.network.original
    for parameter in compilation.network.root.parameters():
        parameter.requires_grad_(False)
    compilation.network.root.eval().to(compilation.device)
    inputs = tuple(
        value.to(compilation.device) if isinstance(value, torch.Tensor) else value
        for value in probe_inputs(compilation)
    )
    try:
        args, kwargs = compilation.network.scoped_inputs(inputs)
        args, kwargs = tree_map(at_least_two, (args, kwargs))
        with torch.no_grad():
            outputs = module(*args, **kwargs)
    except InputError:
        raise
    except Exception as error:
        raise user_error(error, source.file, "forward()", "forward-failed") from error
    compilation.probe = (args, kwargs)
    compilation.reference = [leaf for leaf in tree_leaves(outputs) if torch.is_tensor(leaf)]
    program = export(compilation, module, args, kwargs)
    compilation.convention = convention_of(program)
    compilation.graph = unlift(program)
    compilation.parameter_shapes = {
        name: parameter.shape for name, parameter in module.named_parameters()
    }
    compilation.forget_module()
    nodes = len(compilation.graph.graph.nodes)
    result = PassResult(matched=1, changed=1)
    result.remarks.append(analysis("traced", f"{nodes} nodes from {source.origin}"))
    for code, text in source.notes:
        compilation.console.warn(text)
        result.remarks.append(missed(code, text))
    return result


def probe_inputs(compilation: Compilation) -> tuple[Any, ...]:
    """Two real inputs where there is data, for every numerical check; else the example's."""
    source = compilation.source
    factory = source.calibration_data or source.eval_data or source.train_data
    if factory is None:
        return source.example_inputs
    first = next(batches(factory, "calibration_data", compilation.device, limit=1))
    return tuple(
        value[:MIN_BATCH] if isinstance(value, torch.Tensor) and value.ndim else value
        for value in first.inputs
    )


def at_least_two(value: Any) -> Any:
    """Repeat a batch of one to two; anything else as it is."""
    if isinstance(value, torch.Tensor) and value.ndim and value.shape[0] == 1:
        return torch.cat([value] * MIN_BATCH)
    return value


def export(
    compilation: Compilation, module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> torch.export.ExportedProgram:
    """`torch.export` with dimension 0 of every batched tensor dynamic."""
    shapes = compilation.source.dynamic_shapes
    if shapes is None:
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if torch.is_tensor(leaf)]
        batch = next(tensor.shape[0] for tensor in tensors if tensor.ndim)
        dimension = torch.export.Dim("batch")

        def dynamic(value: Any) -> Any:
            batched = torch.is_tensor(value) and value.ndim and value.shape[0] == batch
            return {0: dimension} if batched else None

        shapes = (*tree_map(dynamic, args), *tree_map(dynamic, kwargs).values())
    try:
        program = torch.export.export(module, args, kwargs, dynamic_shapes=shapes)
        # Passes move nodes, which is legal only where no operator writes to its input. An empty
        # table functionalizes and decomposes nothing; it costs a second trace.
        return program.run_decompositions({}) if mutates(program) else program
    except Exception as error:
        raise _export_error(compilation, error) from error


def mutates(program: torch.export.ExportedProgram) -> bool:
    """Whether any operator of the program writes to its input (`relu_`, `zero_`, ...)."""
    return any(
        isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable
        for node in program.graph.nodes
    )


def _export_error(compilation: Compilation, error: Exception) -> InputError:
    text = str(error).strip()
    first = text.splitlines()[0] if text else type(error).__name__
    placed = user_error(error, compilation.source.file, "torch.export", "export-failed")
    return InputError(
        "export-failed",
        f"torch.export cannot trace the model: {first}",
        location=placed.location,
        hint="--scope PATH compiles a submodule that can be traced",
    )


def unlift(program: torch.export.ExportedProgram) -> torch.fx.GraphModule:
    """The program as a plain graph module that can be edited, trained and put back in place.

    `ExportedProgram.module()` pins `train()` and `eval()` to errors; a fresh graph module over
    the same attributes does not.
    """
    unlifted = program.module(check_guards=False)
    graph_module = torch.fx.GraphModule(unlifted, unlifted.graph)
    for node in graph_module.graph.nodes:
        node.meta.pop("from_node", None)
        line = source_line(node)
        if line:
            node.meta["source_line"] = line
    return graph_module


PASS = Pass(
    name="trace",
    summary="torch.export the module, batch dynamic, into one fx graph",
    run=run,
    ensures=("graph",),
    preserves=1e-4,
)
