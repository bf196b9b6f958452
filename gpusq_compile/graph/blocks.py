"""Cut the graph into blocks that can be fitted one after the other.

A block is what lies between two places where one tensor carries all that the part before has to
say, found from the dataflow and not from any library's names. In a transformer these places are
the residual stream where it begins and after each residual add, so that attention and MLP are
blocks of their own.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.fx
from torch import nn

from gpusq_compile.graph.query import (
    input_dependent,
    output_nodes,
    tensor_attribute,
    value_dependent,
    walk_inputs,
)
from gpusq_compile.graph.roles import residual_adds


@dataclass(frozen=True)
class Block:
    """The nodes that compute `targets` from `inputs`, in graph order.

    `inputs` were computed before the block and depend on the graph's inputs: the tensor at the
    cut before it, and whatever else the block reads (another input of the model, a batch size).
    What is computed from parameters and constants alone is among the `nodes`.
    """

    inputs: tuple[torch.fx.Node, ...]
    nodes: tuple[torch.fx.Node, ...]
    targets: tuple[torch.fx.Node, ...]


def find_blocks(
    graph_module: torch.fx.GraphModule, usable: Callable[[torch.fx.Node], bool] = lambda _: True
) -> list[Block]:
    """The blocks from one cut point to the next, the last one up to the graph's outputs.

    A graph without cut points is one block; of a graph without floating-point outputs the part
    after the last cut point is none.

    Args:
        usable: whether the graph may be cut behind a node.
    """
    graph = graph_module.graph
    dependent = input_dependent(graph)
    cuts = cut_points(graph_module, usable)
    if cuts and all(_behind_modules(node) is cuts[-1] for node in output_nodes(graph)):
        cuts.pop()  # Behind it are inserted modules alone, and those belong to the block before.
    blocks = [
        _block(dependent, before, (cut,)) for before, cut in zip([None, *cuts], cuts, strict=False)
    ]
    last = cuts[-1] if cuts else None
    outputs = [node for node in output_nodes(graph) if node in dependent and _after(node, last)]
    ends = tuple(node for node in outputs if _is_float(node))
    return [*blocks, _block(dependent, last, ends)] if ends else blocks


def cut_points(
    graph_module: torch.fx.GraphModule, usable: Callable[[torch.fx.Node], bool] = lambda _: True
) -> list[torch.fx.Node]:
    """The residual adds, and the tensors they start from, that a block can end at.

    Of the activations that such a tensor is made of since the cut before, no other may be read
    later: it alone passes on what the block computed. What was there before may stay in use (a
    detector reads the feature maps of all stages), and so may a branch that leaves the stream.
    """
    active = activations(graph_module)
    candidates: set[torch.fx.Node] = set()
    for add in residual_adds(graph_module.graph, value_dependent(graph_module.graph)):
        candidates |= {add, _behind_modules(min(add.all_input_nodes))}
    cuts: list[torch.fx.Node] = []
    last: torch.fx.Node | None = None
    for node in sorted(candidates & active):
        made_of = [source for source in _upstream(node, last) if source in active]
        read_later = any(user > node and user in active for n in made_of for user in n.users)
        if usable(node) and not read_later:
            cuts.append(node)
            last = node
    return cuts


def activations(graph_module: torch.fx.GraphModule) -> set[torch.fx.Node]:
    """The nodes whose values depend on the graph's inputs and on its parameters.

    A size is none, however it came about, nor is what depends on the inputs through sizes alone.
    """
    by_input: set[torch.fx.Node] = set()
    by_parameter: set[torch.fx.Node] = set()
    for node in graph_module.graph.nodes:
        if node.op == "get_attr":
            if isinstance(tensor_attribute(graph_module, str(node.target)), nn.Parameter):
                by_parameter.add(node)
        elif not _is_size(node):
            if node.op == "placeholder" or not by_input.isdisjoint(node.all_input_nodes):
                by_input.add(node)
            if not by_parameter.isdisjoint(node.all_input_nodes):
                by_parameter.add(node)
    return by_input & by_parameter


def owned_parameters(graph_module: torch.fx.GraphModule, block: Block) -> dict[str, nn.Parameter]:
    """The parameters, by dotted name, that nothing but the block's targets depends on.

    One that another block reads too, or a branch that leaves this one, is not among them.
    """
    owned = set(block.targets)
    for node in reversed(block.nodes):
        if all(user in owned or _is_size(user) for user in node.users):
            owned.add(node)
    own: dict[str, nn.Parameter] = {}
    shared: set[nn.Parameter] = set()
    for node in graph_module.graph.nodes:
        found = _parameters_read(graph_module, node)
        if node in owned:
            own |= found
        else:
            shared.update(found.values())
    return {name: parameter for name, parameter in own.items() if parameter not in shared}


def block_module(graph_module: torch.fx.GraphModule, block: Block) -> torch.fx.GraphModule:
    """The block by itself: called with the values of its inputs, returns a tuple of its targets.

    Its parameters and modules are the graph module's own, under the same names.
    """
    graph = torch.fx.Graph()
    copies: dict[torch.fx.Node, torch.fx.Node] = {}
    for node in block.inputs:
        copies[node] = graph.placeholder(node.name)
    for node in block.nodes:
        copies[node] = graph.node_copy(node, lambda source: copies[source])
    graph.output(tuple(copies[target] for target in block.targets))
    return torch.fx.GraphModule(graph_module, graph)


def _parameters_read(
    graph_module: torch.fx.GraphModule, node: torch.fx.Node
) -> dict[str, nn.Parameter]:
    path = str(node.target)
    if node.op == "call_module":
        return dict(graph_module.get_submodule(path).named_parameters(prefix=path))
    if node.op == "get_attr":
        tensor = tensor_attribute(graph_module, path)
        return {path: tensor} if isinstance(tensor, nn.Parameter) else {}
    return {}


def _block(
    dependent: set[torch.fx.Node], before: torch.fx.Node | None, targets: tuple[torch.fx.Node, ...]
) -> Block:
    def is_inside(node: torch.fx.Node) -> bool:
        if node not in dependent:
            return True
        return node.op != "placeholder" and _after(node, before)

    reached = set(targets)
    for target in targets:
        reached.update(walk_inputs(target, is_inside))
    inside = {node for node in reached if is_inside(node)}
    return Block(tuple(sorted(reached - inside)), tuple(sorted(inside)), targets)


def _upstream(node: torch.fx.Node, last: torch.fx.Node | None) -> list[torch.fx.Node]:
    """What a node is computed from after `last`."""
    found = walk_inputs(node, lambda source: _after(source, last))
    return [source for source in found if _after(source, last)]


def _after(node: torch.fx.Node, other: torch.fx.Node | None) -> bool:
    return other is None or node > other


def _behind_modules(node: torch.fx.Node) -> torch.fx.Node:
    """The user's own node below the taps and fake-quantizers that passes put behind it."""
    while node.op == "call_module":
        node = node.all_input_nodes[0]
    return node


def _is_size(node: torch.fx.Node) -> bool:
    return isinstance(node.meta.get("val"), (int, float, torch.SymInt, torch.SymFloat))


def _is_float(node: torch.fx.Node) -> bool:
    value = node.meta.get("val")
    return isinstance(value, torch.Tensor) and value.is_floating_point()
