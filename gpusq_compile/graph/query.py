"""Questions about the IR: which operator a node is, which weight it has, where it came from."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from operator import attrgetter
from pathlib import Path

import torch
import torch.fx
from torch.utils._pytree import tree_leaves

from gpusq_compile.errors import Location, relative_to_cwd
from gpusq_compile.user_code import is_users

aten = torch.ops.aten

_FRAME = re.compile(r'File "(?P<file>[^"]+)", line (?P<line>\d+)')

OPS: dict[object, str] = {
    aten.linear.default: "linear",
    aten.conv2d.default: "conv2d",
    aten.conv2d.padding: "conv2d",
    aten.layer_norm.default: "layer_norm",
    aten.add.Tensor: "add",
}
WEIGHTED_OPS = frozenset({"linear", "conv2d"})


def op_of(node: torch.fx.Node) -> str | None:
    """The rules language's name of a node's operator, None when it has none."""
    return OPS.get(node.target) if node.op == "call_function" else None


def operator_name(node: torch.fx.Node) -> str:
    """An operator's own name, for one that the rules language has no word for: `batch_norm`."""
    packet = getattr(node.target, "overloadpacket", None)
    return str(getattr(packet, "__name__", None) or getattr(node.target, "__name__", node.target))


def is_weighted(node: torch.fx.Node) -> bool:
    return op_of(node) in WEIGHTED_OPS


def kernel_size(node: torch.fx.Node) -> tuple[int, ...]:
    """The kernel of a convolution; () of a linear."""
    weight = node.args[1]
    assert isinstance(weight, torch.fx.Node)
    return tuple(int(size) for size in (shape_of(weight) or ())[2:])


def groups_of(node: torch.fx.Node) -> int:
    """The groups of a convolution; 1 of a linear."""
    groups = node.args[6] if op_of(node) == "conv2d" and len(node.args) > 6 else 1
    assert isinstance(groups, int)
    return groups


def is_gemm(node: torch.fx.Node) -> bool:
    """Whether each output position is a matrix times one input position: a linear, or a
    convolution of one pixel."""
    return is_weighted(node) and groups_of(node) == 1 and set(kernel_size(node)) <= {1}


def mixes_channels(node: torch.fx.Node) -> bool:
    """A weighted operator that makes new channels: any but a grouped convolution, which keeps
    channels (or groups of them) to themselves."""
    return is_weighted(node) and groups_of(node) == 1


def elements_of(node: torch.fx.Node) -> object:
    """How many elements a tensor has, comparable between nodes; None of what is no tensor.

    A number, or with a dynamic batch its expression.
    """
    value = node.meta.get("val")
    if not isinstance(value, torch.Tensor):
        return None
    count = value.numel()
    return count if isinstance(count, int) else count.node.expr


def traced_shape(node: torch.fx.Node) -> tuple[int, ...] | None:
    """The shape with the batch that it was traced on; 0 for a size that depends on values.

    None if it is no tensor.
    """
    value = node.meta.get("val")
    if not isinstance(value, torch.Tensor):
        return None
    sizes = (size if isinstance(size, int) else size.node.hint or 0 for size in value.shape)
    return tuple(map(int, sizes))


def traced_batch(graph: torch.fx.Graph) -> int:
    """Samples in the traced batch: dimension 0 of the first input that is a tensor."""
    for node in graph.nodes:
        if node.op == "placeholder" and (shape := traced_shape(node)):
            return shape[0]
    return 1


def traced_elements(node: torch.fx.Node) -> int:
    """How many elements a tensor has with the batch that it was traced on; 0 of what is none, and
    where it depends on values."""
    value = node.meta.get("val")
    if not isinstance(value, torch.Tensor):
        return 0
    count = value.numel()
    return int(count if isinstance(count, int) else count.node.hint or 0)


def traced_bytes(node: torch.fx.Node) -> int:
    """The memory of a node's value, one tensor or several, with the batch that it was traced on."""
    tensors = [leaf for leaf in tree_leaves(node.meta.get("val")) if torch.is_tensor(leaf)]
    counts = [tensor.numel() for tensor in tensors]
    known = [count if isinstance(count, int) else int(count.node.hint or 0) for count in counts]
    return sum(n * tensor.element_size() for n, tensor in zip(known, tensors, strict=True))


def tensor_attribute(graph_module: torch.fx.GraphModule, path: str) -> torch.Tensor:
    """The parameter, buffer or constant that a `get_attr` node of this `path` reads."""
    value = attrgetter(path)(graph_module)
    if not isinstance(value, torch.Tensor):
        raise TypeError(f"{path} is a {type(value).__name__}, not a tensor")
    return value


def is_parameter(graph_module: torch.fx.GraphModule, node: object) -> bool:
    """Whether a node reads a stored parameter, rather than a buffer or what is computed."""
    return (
        isinstance(node, torch.fx.Node)
        and node.op == "get_attr"
        and isinstance(tensor_attribute(graph_module, str(node.target)), torch.nn.Parameter)
    )


def weight_source(node: torch.fx.Node) -> torch.fx.Node | None:
    """The `get_attr` node of a weighted operator's weight, through masks and fake-quantizers.

    None when the weight is computed in the graph, so that there is no constant to compress.
    """
    source = node.args[1]
    while isinstance(source, torch.fx.Node) and source.op == "call_module":
        source = source.args[0]
    if isinstance(source, torch.fx.Node) and source.op == "get_attr":
        return source
    return None


def module_calls(
    graph_module: torch.fx.GraphModule,
) -> list[tuple[torch.fx.Node, torch.nn.Module]]:
    """Every `call_module` node with the module it calls, in graph order: what passes inserted."""
    modules = dict(graph_module.named_modules())
    return [
        (node, modules[str(node.target)])
        for node in graph_module.graph.nodes
        if node.op == "call_module"
    ]


def shape_of(node: torch.fx.Node) -> tuple[int | torch.SymInt, ...] | None:
    """The shape of a node's value (symbolic dimensions included), None if it is no tensor."""
    value = node.meta.get("val")
    return tuple(value.shape) if isinstance(value, torch.Tensor) else None


def static_shape(node: torch.fx.Node) -> tuple[int | None, ...] | None:
    """The shape with every dynamic dimension as None: comparable between nodes."""
    shape = shape_of(node)
    if shape is None:
        return None
    return tuple(size if isinstance(size, int) else None for size in shape)


def module_stack(node: torch.fx.Node) -> list[tuple[str, str]]:
    """(dotted path, class name) of the modules a node was traced in, outermost first."""
    stack = node.meta.get("nn_module_stack") or {}
    entries: list[tuple[str, str]] = []
    for path, cls in stack.values():
        name = cls if isinstance(cls, str) else f"{cls.__module__}.{cls.__qualname__}"
        entries.append((path, name))
    return entries


def module_path(node: torch.fx.Node) -> str:
    stack = module_stack(node)
    return stack[-1][0] if stack else ""


def module_class(node: torch.fx.Node) -> str:
    stack = module_stack(node)
    return stack[-1][1] if stack else ""


def source_line(node: torch.fx.Node) -> str | None:
    """`file:line` of the code that made this node, None when it was not kept."""
    place = place_of(node)
    return None if place is None else f"{place.file}:{place.line}"


def place_in(stack_trace: str) -> Location | None:
    """The line of a node's stack trace that a person can change.

    The innermost line that is neither this package's nor an installed library's, and where there
    is none (the model itself is a library's) the innermost that is not PyTorch's own.
    """
    frames = [(match["file"], int(match["line"])) for match in _FRAME.finditer(stack_trace)]
    if not frames:
        return None
    file, line = (
        [frame for frame in frames if is_users(frame[0])]
        or [frame for frame in frames if "torch" not in Path(frame[0]).parts]
        or frames
    )[-1]
    return Location(relative_to_cwd(Path(file)), line)


def place_of(node: torch.fx.Node) -> Location | None:
    """Where a node was written, for an error."""
    return place_in(str(node.meta.get("stack_trace") or ""))


def input_dependent(graph: torch.fx.Graph) -> set[torch.fx.Node]:
    """The nodes whose value depends on the graph's inputs (not on parameters alone)."""
    dependent: set[torch.fx.Node] = set()
    for node in graph.nodes:
        if node.op == "placeholder" or any(arg in dependent for arg in node.all_input_nodes):
            dependent.add(node)
    return dependent


def value_dependent(graph: torch.fx.Graph) -> set[torch.fx.Node]:
    """The nodes whose value depends on the values of the graph's inputs.

    What depends on parameters, and beside them on sizes such as the batch's, does not.
    """
    dependent: set[torch.fx.Node] = set()
    for node in graph.nodes:
        reads = any(source in dependent for source in node.all_input_nodes)
        if (node.op == "placeholder" or reads) and not is_size(node):
            dependent.add(node)
    return dependent


def is_size(node: torch.fx.Node) -> bool:
    """Whether a node's value is a number rather than a tensor, as a size is."""
    return isinstance(node.meta.get("val"), (int, torch.SymInt))


def walk_users(
    start: torch.fx.Node, through: Callable[[torch.fx.Node], bool]
) -> Iterator[torch.fx.Node]:
    """Nodes reachable downstream from `start`, each once; goes on past those `through` accepts."""
    yield from _walk(start, lambda node: list(node.users), through)


def walk_inputs(
    start: torch.fx.Node, through: Callable[[torch.fx.Node], bool]
) -> Iterator[torch.fx.Node]:
    """Nodes reachable upstream from `start`, each once; goes on past those `through` accepts."""
    yield from _walk(start, lambda node: node.all_input_nodes, through)


def _walk(
    start: torch.fx.Node,
    step: Callable[[torch.fx.Node], list[torch.fx.Node]],
    through: Callable[[torch.fx.Node], bool],
) -> Iterator[torch.fx.Node]:
    seen = {start}
    queue = list(step(start))
    while queue:
        node = queue.pop(0)
        if node in seen:
            continue
        seen.add(node)
        yield node
        if through(node):
            queue.extend(step(node))


def output_nodes(graph: torch.fx.Graph) -> list[torch.fx.Node]:
    """The nodes whose values the graph returns, flattened, in order."""
    output = next(node for node in reversed(graph.nodes) if node.op == "output")
    return list(output.all_input_nodes)
