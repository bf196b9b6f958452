"""What the rules can speak about: the layers of a graph, with their names, roles and sizes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.fx

from gpusq_compile.graph.attention import Attention, find_attentions
from gpusq_compile.graph.query import (
    groups_of,
    input_dependent,
    is_weighted,
    kernel_size,
    module_class,
    module_path,
    op_of,
    operator_name,
    shape_of,
    tensor_attribute,
    value_dependent,
    weight_source,
)
from gpusq_compile.graph.roles import Roles, find_roles, residual_adds
from gpusq_compile.language.loader import Rules
from gpusq_compile.language.matching import Candidate
from gpusq_compile.named_roles import with_named_roles
from gpusq_compile.sparsity import REDUCTION_AXIS


@dataclass(frozen=True)
class Offer:
    """A node offered to the rules. `refusal` says why its weight cannot be compressed at all."""

    node: torch.fx.Node
    candidate: Candidate
    roles: tuple[str, ...]
    weight: str | None = None
    shape: tuple[int, ...] = ()
    refusal: str | None = None
    attention: Attention | None = None


def collect(
    graph_module: torch.fx.GraphModule,
    rules: Rules | None = None,
    tied: Mapping[str, str] | None = None,
) -> list[Offer]:
    """Everything the rules can match, in graph order, under unique names.

    What has a role is among it, whatever operator it is.

    Raises:
        InputError: the `rules` give a role to a name that the graph does not have.
    """
    graph = graph_module.graph
    dependent = input_dependent(graph)
    residuals = set(residual_adds(graph, value_dependent(graph)))
    attentions = find_attentions(graph)
    roles = find_roles(graph)
    if rules is not None and (given := rules.file.roles.given()):
        layers = named_nodes(graph, roles, residuals, attentions, tied or {})
        roles = with_named_roles(graph, roles, given, layers, residuals, rules.roles_at)
    others = read_otherwise(graph)
    offers: list[Offer] = []
    for name, node in named_nodes(graph, roles, residuals, attentions, tied or {}).items():
        source = weight_source(node) if is_weighted(node) else None
        weight = str(source.target) if source is not None else None
        shape = weight_shape(node) if is_weighted(node) else ()
        refusal = None
        if is_weighted(node):
            refusal = uncompressible(graph_module, node, weight, dependent, others)
        candidate = Candidate(
            name=name,
            op="attention" if node in attentions else op_of(node) or operator_name(node),
            roles=frozenset(roles.get(node, ())),
            module_class=module_class(node),
            in_features=shape[REDUCTION_AXIS] if len(shape) > 1 else None,
            out_features=shape[0] if shape else None,
            kernel_size=max(kernel_size(node), default=1) if is_weighted(node) else None,
        )
        offers.append(
            Offer(
                node,
                candidate,
                roles.get(node, ()),
                weight,
                shape,
                refusal,
                attentions.get(node),
            )
        )
    return offers


def named_nodes(
    graph: torch.fx.Graph,
    roles: Roles,
    residuals: set[torch.fx.Node],
    attentions: Mapping[torch.fx.Node, Attention],
    tied: Mapping[str, str],
) -> dict[str, torch.fx.Node]:
    """The nodes that rules can speak about, in graph order, by unique names."""
    found: list[tuple[torch.fx.Node, str]] = []
    for node in graph.nodes:
        op = "attention" if node in attentions else op_of(node)
        if op == "add" and node not in residuals:
            op = None  # Other adds are biases, position embeddings and the like.
        if node.op == "call_function" and (op is not None or node in roles):
            source = weight_source(node) if is_weighted(node) else None
            name = layer_name(node, str(source.target) if source is not None else None, tied)
            found.append((node, name))
    taken: dict[str, int] = {}
    # A layer keeps its name whatever else has a role in its module.
    weighted_first = sorted(found, key=lambda item: not is_weighted(item[0]))
    unique = {node: _unique(name, taken) for node, name in weighted_first}
    return {unique[node]: node for node, _ in found}


def weight_shape(node: torch.fx.Node) -> tuple[int, ...]:
    """The shape of a weighted operator's weight, stored or computed; () where it depends on inputs'
    sizes."""
    weight = node.args[1]
    assert isinstance(weight, torch.fx.Node)
    sizes = shape_of(weight) or ()
    return tuple(map(int, sizes)) if all(isinstance(size, int) for size in sizes) else ()


def uncompressible(
    graph_module: torch.fx.GraphModule,
    node: torch.fx.Node,
    weight: str | None,
    dependent: set[torch.fx.Node],
    others: Mapping[str, str],
) -> str | None:
    """Why the weight of a linear or a convolution cannot be compressed at all."""
    if weight is None:
        return "the weight is computed in the graph, not stored"
    if node not in dependent:
        return "its input is a constant, so the layer runs once, when the engine is built"
    if weight in others:
        return f"the operator {others[weight]} reads the weight {weight} too"
    if not isinstance(tensor_attribute(graph_module, weight), torch.nn.Parameter):
        return f"the weight {weight} is a buffer, not a parameter"
    if node.target is torch.ops.aten.conv2d.padding:
        return f"padding {node.args[4]!r} is uneven: give it as numbers"
    if groups_of(node) != 1:
        return f"grouped convolution ({groups_of(node)} groups)"
    return None


def read_otherwise(graph: torch.fx.Graph) -> dict[str, str]:
    """The stored tensors that an operator reads otherwise than as its weight, and its name."""
    found = {}
    for node in graph.nodes:
        for user in node.users if node.op == "get_attr" else ():
            if not (is_weighted(user) and user.args[1] is node):
                found[str(node.target)] = operator_name(user)
    return found


def layer_name(node: torch.fx.Node, weight: str | None, tied: Mapping[str, str]) -> str:
    """The user's dotted name: the weight's without `.weight`, else the module's and the node's.

    Of a weight with several names it is that of the module that reads it.
    """
    if weight is not None:
        own = f"{module_path(node)}.weight"
        if tied.get(own) == weight:
            return module_path(node)
        return weight.removesuffix(".weight").removesuffix("_weight")
    path = module_path(node)
    if op_of(node) == "add" or not path:
        return f"{path}.{node.name}".removeprefix(".")
    return path


def _unique(name: str, taken: dict[str, int]) -> str:
    taken[name] = taken.get(name, 0) + 1
    return name if taken[name] == 1 else f"{name}#{taken[name]}"
