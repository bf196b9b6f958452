"""trace: the user's module -> one `torch.fx.GraphModule`, batch dynamic.

Needs nothing. Runs the module once eagerly (its outputs are the reference that every later pass
is compared with), exports it with `torch.export`, and unlifts the program into a graph module
whose parameters keep the user's names. Guarantees `graph`.
"""

from __future__ import annotations

import contextlib
import inspect
import io
import traceback
from collections.abc import Iterator, Mapping
from typing import Any

import torch
import torch.fx
from torch._dynamo.exc import UserError, UserErrorType
from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode
from torch.utils._pytree import tree_leaves, tree_map

from gpusq_compile.batch import describe
from gpusq_compile.batch_inputs import moved, size_of
from gpusq_compile.batch_range import batch_range
from gpusq_compile.compilation import Compilation
from gpusq_compile.data import some_batches
from gpusq_compile.errors import InputError, Location
from gpusq_compile.graph.edit import remove_tensor, set_tensor
from gpusq_compile.graph.functional import is_write, make_functional
from gpusq_compile.graph.inline import inline_disabled_autocast
from gpusq_compile.graph.query import place_in, place_of, source_line
from gpusq_compile.lowering.exportable import check_control_flow
from gpusq_compile.lowering.lift import convention_of
from gpusq_compile.pass_base import Pass, PassResult
from gpusq_compile.remarks import analysis, missed
from gpusq_compile.user_code import described, user_error
from gpusq_compile.user_state import UserParameters

MOST_NAMED = 6
"""Submodules that a hint names."""

MIN_BATCH = 2
"""`torch.export` specializes batch sizes 0 and 1, so the trace needs two or more."""


def run(compilation: Compilation) -> PassResult:
    source, network = compilation.source, compilation.network
    module = network.original
    compilation.frozen = frozen_parameters(module)
    network.root.requires_grad_(False).eval().to(compilation.device)
    inputs = moved(probe_inputs(compilation), compilation.device)
    try:
        args, kwargs = network.scoped_inputs(inputs)
        with torch.no_grad():
            outputs, again = module(*args, **kwargs), module(*args, **kwargs)
    except InputError:
        raise
    except Exception as error:
        check_unbatched(compilation)
        raise user_error(error, source.file, "forward()", "forward-failed") from error
    compilation.probe, compilation.probe_samples = (args, kwargs), size_of(inputs) or 1
    compilation.reference = check_outputs(outputs, again, source.place("model"))
    program, graph_module = functional(compilation, export(compilation, module, args, kwargs))
    check_program(program)
    check_control_flow(graph_module.graph)
    compilation.convention = convention_of(program, outputs)
    constraints = program.range_constraints
    compilation.engine_batch = batch_range(graph_module.graph, constraints, source.place("model"))
    compilation.graph = graph_module
    shapes = {name: parameter.shape for name, parameter in module.named_parameters()}
    compilation.parameters = UserParameters(shapes, tied_names(module))
    read_by_first_name(graph_module, compilation.parameters.tied)
    compilation.forget_module()
    nodes = len(compilation.graph.graph.nodes)
    result = PassResult(matched=1, changed=1)
    result.remarks.append(analysis("traced", f"{nodes} nodes from {source.origin}"))
    for code, text in source.facts:
        compilation.console.info(text)
        result.remarks.append(analysis(code, text))
    for code, text in source.notes:
        compilation.console.warn(text)
        result.remarks.append(missed(code, text))
    return result


def tied_names(module: torch.nn.Module) -> dict[str, str]:
    """For each further name of a parameter that has several, the first."""
    first: dict[torch.nn.Parameter, str] = {}
    tied = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        if first.setdefault(parameter, name) != name:
            tied[name] = first[parameter]
    return tied


def read_by_first_name(graph_module: torch.fx.GraphModule, tied: Mapping[str, str]) -> None:
    """Let the graph read and hold each parameter under one name; `torch.export` takes any."""
    for node in graph_module.graph.nodes:
        if node.op == "get_attr" and str(node.target) in tied:
            node.target = tied[str(node.target)]
    held = dict(graph_module.named_parameters(remove_duplicate=False))
    for name in tied.keys() & held.keys():
        if tied[name] not in held:
            set_tensor(graph_module, tied[name], held[name], trainable=True)
        remove_tensor(graph_module, name)
    graph_module.recompile()


def frozen_parameters(module: torch.nn.Module) -> frozenset[str]:
    """The parameters that the user froze; none where all are, as in a model made for inference."""
    names = [name for name, value in module.named_parameters() if not value.requires_grad]
    return frozenset(names) if len(names) < len(list(module.parameters())) else frozenset()


def check_outputs(outputs: Any, again: Any, place: Location | None = None) -> list[torch.Tensor]:
    """The tensors of a model's outputs, which must be finite and the same for the same inputs.

    Args:
        place: where the model is made.

    Raises:
        InputError: they are not, so that no later number would mean anything.
    """
    tensors = [leaf for leaf in tree_leaves(outputs) if torch.is_tensor(leaf)]
    repeated = [leaf for leaf in tree_leaves(again) if torch.is_tensor(leaf)]
    if not any(tensor.ndim for tensor in tensors):
        found = f"a number, {describe(tensors[0])}" if tensors else described(outputs)
        raise InputError(
            "outputs-kind",
            f"forward() returns {found}; expected tensors with the batch first",
            location=place,
            hint="return what the loss is computed from, such as logits [batch, classes], or "
            "compile a submodule with --scope",
        )
    stateful = "forward() must not count its calls or keep anything else from one to the next"
    if len(tensors) != len(repeated):
        raise InputError(
            "not-deterministic",
            f"two runs on the same inputs give {len(tensors)} and {len(repeated)} tensors",
            location=place,
            hint=stateful,
        )
    for index, (first, second) in enumerate(zip(tensors, repeated, strict=True)):
        if first.is_floating_point() and not bool(first.isfinite().all()):
            raise InputError(
                "outputs-not-finite", f"output {index} of the model is NaN or infinite"
            )
        if describe(first) != describe(second):
            raise InputError(
                "not-deterministic",
                f"two runs on the same inputs give {describe(first)} and {describe(second)} for "
                f"output {index}",
                location=place,
                hint=stateful,
            )
        if not torch.allclose(first, second, rtol=1e-3, atol=1e-5):
            raise InputError(
                "not-deterministic",
                f"two runs on the same inputs differ at output {index}",
                hint="dropout and noise must follow self.training, which is off here",
            )
    return tensors


def _takes(compilation: Compilation, inputs: tuple[Any, ...]) -> bool:
    try:
        with torch.no_grad():
            compilation.network.root(*moved(inputs, compilation.device))
    except Exception:
        return False
    return True


def check_unbatched(compilation: Compilation) -> None:
    """Look whether a model that cannot take its example inputs can with a batch in front.

    Raises:
        InputError: it can.
    """
    source = compilation.source
    given = source.example_inputs
    if not all(isinstance(value, torch.Tensor) for value in given):
        return
    batched = tuple(torch.stack([value] * MIN_BATCH) for value in given)
    # Otherwise it is something else that the model cannot take, and it says what.
    try:
        as_given = _takes(compilation, two_samples(given))
    except InputError:
        return  # Nobody can tell which of several inputs has the batch.
    if as_given or not _takes(compilation, batched):
        return
    raise InputError(
        "example-inputs",
        f"example_inputs() returned {', '.join(map(describe, given))}, whose first dimension is "
        "taken for the batch; forward() takes "
        f"{', '.join(describe(value[:1]) for value in batched)}",
        location=source.place("example_inputs"),
        hint="put the batch in front: `image.unsqueeze(0)`, or `torch.randn(1, 3, 224, 224)`",
    )


def probe_inputs(compilation: Compilation) -> tuple[Any, ...]:
    """Two real inputs where there is data, for every numerical check; else the example's."""
    source = compilation.source
    if source.dynamic_shapes is not None:
        return source.example_inputs
    found = some_batches(source, compilation.device, limit=1)
    if found:
        return two_samples(found[0].inputs)
    return two_samples(source.example_inputs)


def two_samples(inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    """The batch cut, or repeated, to two samples; inputs without the batch dimension as they are.

    Where no input is a batched tensor, lists have one item per sample.

    Raises:
        InputError: with a batch of one, several inputs may or may not have the batch dimension.
    """
    if not any(isinstance(value, torch.Tensor) and value.ndim for value in inputs):
        return tuple(
            (value * MIN_BATCH)[:MIN_BATCH] if isinstance(value, list) else value
            for value in inputs
        )
    tensors = [value for value in inputs if isinstance(value, torch.Tensor) and value.ndim]
    batch = tensors[0].shape[0]
    batched = [value for value in tensors if value.shape[0] == batch]
    if batch == 1 and len(batched) > 1:
        raise InputError(
            "ambiguous-batch",
            f"{len(batched)} inputs have a first dimension of 1: which of them is the batch?",
            hint="give a batch of two or more, or define dynamic_shapes()",
        )

    def two(value: Any) -> Any:
        if not any(value is tensor for tensor in batched):
            return value
        return value[:MIN_BATCH] if batch > 1 else torch.cat([value] * MIN_BATCH)

    return tuple(two(value) for value in inputs)


def export(
    compilation: Compilation, module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> torch.export.ExportedProgram:
    """`torch.export` with dimension 0 of every batched tensor dynamic."""
    shapes = compilation.source.dynamic_shapes
    if shapes is None:
        shapes = batch_dynamic(module, args, kwargs)
    try:
        # Gradients that the model switches off itself would be a graph of their own.
        with quiet_export(), torch.no_grad():
            return torch.export.export(module, args, kwargs, dynamic_shapes=shapes)
    except Exception as error:
        raise _export_error(compilation, error) from error


def functional(
    compilation: Compilation, program: torch.export.ExportedProgram
) -> tuple[torch.export.ExportedProgram, torch.fx.GraphModule]:
    """The program, and its graph with no operator that writes to its input."""
    graph_module = unlift(program)
    if not any(is_write(node) for node in graph_module.graph.nodes):
        return program, graph_module
    if not make_functional(graph_module):
        try:
            # An empty table functionalizes and decomposes nothing; it costs a second trace.
            program = program.run_decompositions({})
        except Exception as error:
            raise _export_error(compilation, error) from error
        graph_module = unlift(program)
    return program, graph_module


def batch_dynamic(
    module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> dict[str, Any]:
    """Dynamic shapes by parameter name: dimension 0 of every tensor as long as the first one."""
    leaves = tree_leaves((args, kwargs))
    tensors = [leaf for leaf in leaves if torch.is_tensor(leaf) and leaf.ndim]
    if not tensors:
        raise InputError("scope-without-inputs", "the compiled module is called without a tensor")
    batch = tensors[0].shape[0]
    dimension = torch.export.Dim("batch")

    def dynamic(value: Any) -> Any:
        batched = torch.is_tensor(value) and value.ndim and value.shape[0] == batch
        return {0: dimension} if batched else None

    called = inspect.signature(module.forward).bind(*args, **kwargs)
    shapes: dict[str, Any] = tree_map(dynamic, dict(called.arguments))
    return shapes


def check_program(program: torch.export.ExportedProgram) -> None:
    """Raise InputError for what no ONNX graph of this compiler can say."""
    written = program.graph_signature.buffers_to_mutate
    if written:
        names = ", ".join(sorted(written.values()))
        places = [place_of(node) for node in program.graph.nodes if node.name in written]
        raise InputError(
            "buffer-written",
            f"forward() writes to its buffers: {names}",
            location=next(filter(None, places), None),
            hint="compute them outside of forward(), or compile a submodule with --scope",
        )
    check_returned(program)


def check_returned(program: torch.export.ExportedProgram) -> None:
    """Raise InputError for an output that is another one, an input, or computed from no input."""
    signature = program.graph_signature
    stored = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
    constants = signature.inputs_to_lifted_tensor_constants
    dependent = set(signature.user_inputs)
    for node in program.graph.nodes:
        if any(source.name in dependent for source in node.all_input_nodes):
            dependent.add(node.name)
    returned = next(node for node in reversed(program.graph.nodes) if node.op == "output")
    seen: dict[torch.fx.Node, int] = {}
    leaves = [leaf for leaf in tree_leaves(returned.args) if isinstance(leaf, torch.fx.Node)]
    for index, leaf in enumerate(leaves):
        hint = "return each result once, or compile a submodule with --scope"
        code = "outputs-alias"
        value = leaf.meta.get("val")
        floating = isinstance(value, torch.Tensor) and value.is_floating_point()
        if leaf in seen:
            text = f"returns one tensor twice, as output {seen[leaf]} and as output {index}"
        elif leaf.op == "placeholder" and leaf.name in dependent:
            text = f"returns its input '{leaf.name}' as it is, as output {index}"
        elif leaf.op == "placeholder" or (floating and leaf.name not in dependent):
            name = stored.get(leaf.name)
            what = f"'{name}' of the model as it is" if name else "a constant"
            if leaf.name in constants:
                what = "a tensor that is made outside of it"
            text = f"returns {what}, as output {index}, which depends on no input"
            hint = "return what is computed from the inputs alone, and read the rest off the model"
            code = "outputs-constant"
        elif not isinstance(value, torch.Tensor):
            text = f"returns a size of a tensor as output {index}, expected tensors"
            hint = "read sizes off the tensors that are returned"
            code = "outputs-kind"
        else:
            seen[leaf] = index
            continue
        # The line that reads a size is torch's own.
        place = None if code == "outputs-kind" else place_of(leaf)
        raise InputError(code, f"forward() {text}", location=place, hint=hint)


@contextlib.contextmanager
def quiet_export() -> Iterator[None]:
    """Without the whole graph that `torch.export` prints on stderr when it fails."""
    with contextlib.redirect_stderr(io.StringIO()):
        yield


def _export_error(compilation: Compilation, error: Exception) -> InputError:
    source = compilation.source
    text = str(error).strip()
    found = text.splitlines()[0] if text else type(error).__name__
    location = user_error(error, source.file, "torch.export", "export-failed").location
    hint = f"--scope PATH compiles a submodule that can be traced{_submodules(compilation)}"
    kind = error.error_type if isinstance(error, UserError) else None
    if isinstance(error, GuardOnDataDependentSymNode):
        found = "the line turns the values of a tensor into Python control flow or a Python number"
        if location is not None:
            hint = f"torch.where(condition, a, b) keeps both branches in the graph; {hint}"
        # A library's line, which nobody is going to change, says at least what it is about.
        location = location or place_in("".join(traceback.format_tb(error.__traceback__)))
    elif source.dynamic_shapes is not None and kind is not None:
        location = source.place("dynamic_shapes")
        hint = "dynamic_shapes() returns what torch.export takes as `dynamic_shapes`"
    elif kind is UserErrorType.CONSTRAINT_VIOLATION:
        found = "forward() works for one batch size alone"
        location = source.place("model")
        hint = "use x.shape[0] or -1 for the batch where a number stands in a reshape or expand"
    return InputError(
        "export-failed",
        f"torch.export cannot trace the model: {found}",
        location=location,
        hint=hint,
    )


def _submodules(compilation: Compilation) -> str:
    """`, such as backbone or head`: the parts of the module that is compiled."""
    network = compilation.network
    prefix = "" if network.scope is None else f"{network.scope}."
    names = [
        f"{prefix}{name}"
        for name, part in network.original.named_children()
        if has_parameters(part)
    ]
    return f", such as {', '.join(names[:MOST_NAMED])}" if names else ""


def has_parameters(module: torch.nn.Module) -> bool:
    """Whether a module has any parameter, so that there is something to compress."""
    return next(module.parameters(), None) is not None


def unlift(program: torch.export.ExportedProgram) -> torch.fx.GraphModule:
    """The program as a plain graph module that can be edited, trained and put back in place.

    `ExportedProgram.module()` pins `train()` and `eval()` to errors; a fresh graph module over
    the same attributes does not.
    """
    unlifted = program.module(check_guards=False)
    graph_module = torch.fx.GraphModule(unlifted, unlifted.graph)
    inline_disabled_autocast(graph_module)
    drop_checks(graph_module)
    for node in graph_module.graph.nodes:
        node.meta.pop("from_node", None)
        line = source_line(node)
        if line:
            node.meta["source_line"] = line
    return graph_module


def drop_checks(graph_module: torch.fx.GraphModule) -> None:
    """Erase operators that return nothing (`_assert_tensor_metadata` of a cast, ...) and write
    nothing: they check what tracing has settled."""
    for node in reversed(list(graph_module.graph.nodes)):
        returns = getattr(getattr(node.target, "_schema", None), "returns", None)
        nothing = node.op == "call_function" and returns is not None and not len(returns)
        if nothing and not is_write(node):
            graph_module.graph.erase_node(node)
    graph_module.graph.eliminate_dead_code()
    graph_module.recompile()


PASS = Pass(
    name="trace",
    summary="torch.export the module, batch dynamic, into one fx graph",
    run=run,
    ensures=("graph",),
    preserves=1e-4,
)
