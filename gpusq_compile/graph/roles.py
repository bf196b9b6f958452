"""Roles of operators, found from the graph's dataflow and not from any library's names.

- `patch_embed` (linear, conv2d): the first weighted operators downstream of the graph's inputs.
- `attention_qkv` (linear): its output reaches an attention product with no other weighted
  operator, activation or residual add between.
- `attention_proj` (linear): the first linear downstream of an attention product.
- `mlp` (linear): before or after an activation function.
- `stage_end` (add): the last residual add of the last block of a stage.
- `final_projection` (normalization): the last one before the classifier.
- `classifier` (linear): its output reaches the graph's output with no other weighted operator,
  normalization or residual add between.

A stage is a run of blocks whose feature map has one shape; an isotropic model has one stage.
"""

from __future__ import annotations

import itertools
from collections import Counter

import torch
import torch.fx

from gpusq_compile.graph.query import (
    input_dependent,
    is_weighted,
    op_of,
    output_nodes,
    static_shape,
    value_dependent,
    walk_inputs,
    walk_users,
)

aten = torch.ops.aten

ROLES = (
    "patch_embed",
    "attention_qkv",
    "attention_proj",
    "mlp",
    "stage_end",
    "final_projection",
    "classifier",
)

ACTIVATIONS = {
    aten.gelu.default,
    aten.relu.default,
    aten.silu.default,
    aten.sigmoid.default,
    aten.tanh.default,
    aten.hardswish.default,
    aten.leaky_relu.default,
    aten.elu.default,
}
NORMALIZATIONS = {
    aten.layer_norm.default,
    aten.group_norm.default,
    aten.batch_norm.default,
    aten.rms_norm.default,
}
FUSED_ATTENTION = {aten.scaled_dot_product_attention.default}
SOFTMAX = {aten.softmax.int, aten._softmax.default}
PRODUCTS = {aten.matmul.default, aten.bmm.default, aten.einsum.default}

Roles = dict[torch.fx.Node, tuple[str, ...]]


def find_roles(graph: torch.fx.Graph) -> Roles:
    """The roles of the graph's nodes; a node may have several, most have none."""
    dependent = input_dependent(graph)
    found: dict[torch.fx.Node, list[str]] = {}

    def add(role: str, nodes: list[torch.fx.Node]) -> None:
        for node in nodes:
            found.setdefault(node, []).append(role)

    attentions = attention_products(graph)
    valued = value_dependent(graph)
    residuals = residual_adds(graph, valued)
    classifiers = _classifiers(graph, dependent, set(residuals))
    first = _patch_embeddings(graph, valued)
    # Without a patch embedding (a bare encoder, a scope of one block) a QKV layer comes first.
    embeds = [n for n in first if _linear_role(n, attentions, residuals) != "attention_qkv"]
    add("patch_embed", [n for n in embeds if n not in classifiers])
    for node in graph.nodes:
        unknown = op_of(node) == "linear" and node in dependent and node not in found
        if not unknown or node in classifiers:
            continue
        role = _linear_role(node, attentions, residuals)
        if role:
            add(role, [node])
    for node in graph.nodes:
        unknown = op_of(node) == "linear" and node in dependent and node not in found
        if unknown and _feeds_mlp(node, found, residuals):
            add("mlp", [node])
    add("stage_end", _stage_ends(graph, residuals, attentions))
    add("final_projection", _final_projections(graph, classifiers))
    add("classifier", classifiers)
    return {node: tuple(roles) for node, roles in found.items()}


def attention_products(graph: torch.fx.Graph) -> set[torch.fx.Node]:
    """Fused attention nodes, and both matrix products around a softmax where it is spelled out."""
    products: set[torch.fx.Node] = set()
    for node in graph.nodes:
        if node.target in FUSED_ATTENTION:
            products.add(node)
        elif node.target in SOFTMAX:
            upstream = [n for n in walk_inputs(node, _moves_data) if n.target in PRODUCTS]
            downstream = [n for n in walk_users(node, _moves_data) if n.target in PRODUCTS]
            if upstream and downstream:
                products.update(upstream, downstream)
    return products


def residual_adds(graph: torch.fx.Graph, dependent: set[torch.fx.Node]) -> list[torch.fx.Node]:
    """Adds of a feature map and something computed from that feature map, in one shape.

    Args:
        dependent: the nodes that depend on the inputs' values.
    """
    skips = {
        node: min(node.all_input_nodes)
        for node in graph.nodes
        if node.target is aten.add.Tensor
        and len(node.all_input_nodes) == 2
        and all(operand in dependent for operand in node.all_input_nodes)
        and static_shape(node.all_input_nodes[0]) == static_shape(node.all_input_nodes[1])
        and len(static_shape(node) or ()) >= 3
        and _is_skip(*node.all_input_nodes, dependent)
    }
    # What is added again in block after block is a position embedding, not the feature map.
    added = Counter(skips.values())
    return [node for node, earlier in skips.items() if added[earlier] == 1]


def _is_skip(first: torch.fx.Node, second: torch.fx.Node, dependent: set[torch.fx.Node]) -> bool:
    """Whether one is computed from the other (a rotary embedding's two halves are not)."""
    earlier, later = sorted((first, second))
    return earlier in set(walk_inputs(later, lambda node: node > earlier and node in dependent))


def _moves_data(node: torch.fx.Node) -> bool:
    """Neither a weighted operator, an attention product, an activation nor a normalization."""
    return (
        node.op in ("call_function", "call_module")
        and not is_weighted(node)
        and node.target not in PRODUCTS | FUSED_ATTENTION | SOFTMAX | ACTIVATIONS | NORMALIZATIONS
    )


def _patch_embeddings(graph: torch.fx.Graph, dependent: set[torch.fx.Node]) -> list[torch.fx.Node]:
    """Weighted operators on the input's path with no weighted operator upstream."""
    found: list[torch.fx.Node] = []
    after_weight: set[torch.fx.Node] = set()
    for node in graph.nodes:
        if any(source in after_weight for source in node.all_input_nodes):
            after_weight.add(node)
        elif is_weighted(node) and node in dependent:
            found.append(node)
            after_weight.add(node)
    return found


def _linear_role(
    node: torch.fx.Node, attentions: set[torch.fx.Node], residuals: list[torch.fx.Node]
) -> str | None:
    def through(user: torch.fx.Node) -> bool:
        # Query and key may be normalized on their way (SwinV2, ViTs with qk-norm).
        return (_moves_data(user) or user.target in NORMALIZATIONS) and user not in residuals

    if any(user in attentions for user in walk_users(node, through)):
        return "attention_qkv"
    data = node.args[0]
    assert isinstance(data, torch.fx.Node)
    upstream = [data, *(walk_inputs(data, _moves_data) if _moves_data(data) else ())]
    if any(source in attentions for source in upstream):
        return "attention_proj"
    if any(source.target in ACTIVATIONS for source in upstream):
        return "mlp"
    if any(user.target in ACTIVATIONS for user in walk_users(node, _moves_data)):
        return "mlp"
    return None


def _feeds_mlp(
    node: torch.fx.Node, found: dict[torch.fx.Node, list[str]], residuals: list[torch.fx.Node]
) -> bool:
    """Whether a linear feeds an `mlp` one: the ungated half of a gated unit (SwiGLU) does."""

    def through(user: torch.fx.Node) -> bool:
        return _moves_data(user) and user not in residuals

    return any("mlp" in found.get(user, ()) for user in walk_users(node, through))


def _classifiers(
    graph: torch.fx.Graph, dependent: set[torch.fx.Node], residuals: set[torch.fx.Node]
) -> list[torch.fx.Node]:
    def through(node: torch.fx.Node) -> bool:
        # Probabilities in place of logits change nothing about who the classifier is.
        ends = node.target in SOFTMAX | ACTIVATIONS
        return (_moves_data(node) or ends) and node not in residuals

    found: list[torch.fx.Node] = []
    for output in output_nodes(graph):
        reachable = [output, *(walk_inputs(output, through) if through(output) else ())]
        for node in reachable:
            if op_of(node) == "linear" and node in dependent and node not in found:
                found.append(node)
    return found


def _stage_ends(
    graph: torch.fx.Graph, residuals: list[torch.fx.Node], attentions: set[torch.fx.Node]
) -> list[torch.fx.Node]:
    """The last residual add before each change of the feature map's shape, and the last of all."""
    if not attentions:
        return []
    order = {node: index for index, node in enumerate(graph.nodes)}
    # Deformable attention weighs samples by a softmax without a product of queries and keys.
    weighs = (node for node in graph.nodes if node in attentions or node.target in SOFTMAX)
    first_attention = min(order[node] for node in weighs)
    adds = [node for node in residuals if order[node] > first_attention]
    ends = []
    for node, following in itertools.zip_longest(adds, adds[1:]):
        if following is None or _size(following) != _size(node):
            ends.append(node)
    return ends


def _size(node: torch.fx.Node) -> int:
    """Elements per sample: one number for [B, H, W, C] and [B, H * W, C] of one feature map."""
    size = 1
    for dimension in (static_shape(node) or ())[1:]:
        size *= dimension or 1
    return size


def _final_projections(
    graph: torch.fx.Graph, classifiers: list[torch.fx.Node]
) -> list[torch.fx.Node]:
    """The normalization that feeds each classifier; without one, what feeds it."""
    starts = [node.args[0] for node in classifiers] or output_nodes(graph)
    found: list[torch.fx.Node] = []
    for start in starts:
        assert isinstance(start, torch.fx.Node)
        upstream = [start, *(walk_inputs(start, _moves_data) if _moves_data(start) else ())]
        norms = [node for node in upstream if node.target in NORMALIZATIONS]
        choice = norms[0] if norms else start
        if choice not in found:
            found.append(choice)
    return found
