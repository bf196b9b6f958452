"""Find attention: a softmax between two matrix products, as one operator or spelled out.

Libraries write it in many ways: `scaled_dot_product_attention`, `q @ k.mT` with a scale before or
after it, position biases and masks added, whole windows viewed apart in between. What counts is
the two products and what lies between them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.fx

from gpusq_compile.graph.channels import moves_data, name_of
from gpusq_compile.graph.products import FUSED_ATTENTION, PRODUCTS, SOFTMAX
from gpusq_compile.graph.query import (
    aten,
    is_size,
    is_weighted,
    shape_of,
    walk_inputs,
    walk_users,
)

MATMULS: frozenset[object] = frozenset({aten.matmul.default, aten.bmm.default})
SCORE_OPS: frozenset[object] = frozenset(
    {
        aten.add.Tensor,
        aten.div.Tensor,
        aten.masked_fill.Scalar,
        aten.mul.Tensor,
        aten.sub.Tensor,
        aten.where.ScalarOther,
        aten.where.ScalarSelf,
        aten.where.self,
    }
)
"""What may scale, bias or mask the scores between the first product and the softmax."""


@dataclass(frozen=True)
class AttentionSizes:
    """The axes of an attention; None where they are dynamic.

    `head_dim` is what the first product sums over, `value_dim` the size of a value; `queries` and
    `keys` count positions. `heads` is None too where one axis holds heads and batch.
    """

    heads: int | None = None
    head_dim: int | None = None
    value_dim: int | None = None
    queries: int | None = None
    keys: int | None = None


@dataclass(frozen=True)
class Attention:
    """One attention. `node` gives its output: the fused operator, or the second product.

    `query` [..., queries, head_dim] and `value` [..., keys, value_dim] are the nodes that it reads,
    `key` is [..., keys, head_dim] of a fused operator and [..., head_dim, keys] of a product.
    Spelled out, `scores` is the first product and `softmax` the softmax; both are None where it is
    fused. `biased` says whether anything is added to the scores or masks them, `obstacle` why it is
    not of the one form that can be quantized.
    """

    node: torch.fx.Node
    query: torch.fx.Node
    key: torch.fx.Node
    value: torch.fx.Node
    sizes: AttentionSizes
    scores: torch.fx.Node | None = None
    softmax: torch.fx.Node | None = None
    biased: bool = False
    obstacle: str | None = None

    @property
    def is_fused(self) -> bool:
        return self.scores is None


def find_attentions(graph: torch.fx.Graph) -> dict[torch.fx.Node, Attention]:
    """Every attention of the graph by its `node`, in graph order."""
    found = []
    for node in graph.nodes:
        if node.target in FUSED_ATTENTION:
            found.append(_fused(node))
        elif node.target in SOFTMAX:
            found += _spelled_out(node)
    return {attention.node: attention for attention in sorted(found, key=lambda item: item.node)}


def attention_at(product: torch.fx.Node) -> Attention:
    """The spelled-out attention whose second product this is.

    Raises:
        ValueError: it is none.
    """
    upstream = [node for node in walk_inputs(product, _between) if node.target in SOFTMAX]
    for softmax in upstream:
        for attention in _spelled_out(softmax):
            if attention.node is product:
                return attention
    raise ValueError(f"{product} is no attention")


def operands(attention: Attention) -> Iterator[tuple[str, torch.fx.Node, int]]:
    """What an attention's two products multiply: (name, product, index of its argument)."""
    assert attention.scores is not None
    yield "query", attention.scores, 0
    yield "key", attention.scores, 1
    yield "value", attention.node, 1
    yield "softmax", attention.node, 0


def fused_arguments(node: torch.fx.Node) -> dict[str, Any]:
    """The arguments of `scaled_dot_product_attention` by name, defaults included."""
    names = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")
    defaults = {"attn_mask": None, "dropout_p": 0.0, "is_causal": False}
    defaults |= {"scale": None, "enable_gqa": False}
    return {**defaults, **dict(zip(names, node.args, strict=False)), **node.kwargs}


def moved_readers(node: torch.fx.Node) -> list[tuple[torch.fx.Node, torch.fx.Node]]:
    """Who reads the elements of a node after they were moved: (reader, what it reads) each."""
    moved = {node, *(user for user in walk_users(node, moves_data) if moves_data(user))}
    return [
        (user, source)
        for source in sorted(moved)
        for user in source.users
        if user not in moved and not is_size(user)
    ]


def unmoved(node: torch.fx.Node) -> torch.fx.Node:
    """The node whose elements this one holds, behind every operator that moves data."""
    while moves_data(node):
        source = node.args[0]
        assert isinstance(source, torch.fx.Node)
        node = source
    return node


def _fused(node: torch.fx.Node) -> Attention:
    given = fused_arguments(node)
    obstacle = None
    if given["is_causal"]:
        obstacle = "it is causal: which keys a query sees is decided inside the operator"
    elif given["enable_gqa"]:
        obstacle = "several heads of queries share one of keys (grouped-query attention)"
    elif given["dropout_p"]:
        obstacle = f"it drops weights with probability {given['dropout_p']:g}"
    query, key, value = given["query"], given["key"], given["value"]
    sizes = _sizes(query, value, _size(key, -2))
    masked = given["attn_mask"] is not None
    return Attention(node, query, key, value, sizes, biased=masked, obstacle=obstacle)


def _spelled_out(softmax: torch.fx.Node) -> list[Attention]:
    """The attention around a softmax; none where it stands between no two products."""
    upstream = list(walk_inputs(softmax, _between))
    firsts = [node for node in upstream if node.target in PRODUCTS]
    seconds = [node for node in walk_users(softmax, _between) if node.target in PRODUCTS]
    if not firsts or not seconds:
        return []
    scores, node = max(firsts), min(seconds)
    foreign = next((n for n in (scores, node) if n.target not in MATMULS), None)
    if foreign is not None:
        reason = f"{name_of(foreign)} is not followed"
        unknown = AttentionSizes()
        return [Attention(node, scores, scores, node, unknown, scores, softmax, obstacle=reason)]
    between = set(upstream).intersection(walk_users(scores, _between))
    (query, key), (weights, value) = _factors(scores), _factors(node)
    odd = [link for link in sorted(between) if not (link.target in SCORE_OPS or moves_data(link))]
    obstacle = None
    if len(firsts) > 1:
        obstacle = "several products reach its softmax"
    elif odd:
        obstacle = f"{name_of(odd[0])} lies between the product and the softmax"
    elif _unquantized(weights) is not softmax:
        obstacle = "the softmax is not the first factor of the second product"
    elif len(seconds) > 1 or _other_readers(softmax, node):
        obstacle = "the softmax is read by others than the second product"
    elif not _over_last_axis(softmax):
        obstacle = "the softmax runs over another axis than the last"
    sizes = _sizes(query, value, _size(key, -1))
    biased = any(n.target in SCORE_OPS and len(n.all_input_nodes) > 1 for n in between)
    return [Attention(node, query, key, value, sizes, scores, softmax, biased, obstacle)]


def _factors(product: torch.fx.Node) -> tuple[torch.fx.Node, torch.fx.Node]:
    first, second = product.args[:2]
    assert isinstance(first, torch.fx.Node)
    assert isinstance(second, torch.fx.Node)
    return first, second


def _between(node: torch.fx.Node) -> bool:
    """What a search for a softmax's products goes through."""
    ends = PRODUCTS | FUSED_ATTENTION | SOFTMAX
    return node.op in ("call_function", "call_module") and not (
        is_weighted(node) or node.target in ends
    )


def _unquantized(node: torch.fx.Node) -> torch.fx.Node:
    """The node behind moves and inserted modules."""
    while moves_data(node) or node.op == "call_module":
        source = node.args[0]
        assert isinstance(source, torch.fx.Node)
        node = source
    return node


def _other_readers(softmax: torch.fx.Node, product: torch.fx.Node) -> bool:
    def through(node: torch.fx.Node) -> bool:
        return moves_data(node) or node.op == "call_module"

    reached = {softmax, *(user for user in walk_users(softmax, through) if through(user))}
    others = {user for node in reached for user in node.users} - reached - {product}
    return not all(is_size(user) for user in others)


def _over_last_axis(softmax: torch.fx.Node) -> bool:
    axis = softmax.args[1] if len(softmax.args) > 1 else softmax.kwargs.get("dim")
    return axis in (-1, len(shape_of(softmax) or ()) - 1)


def _sizes(query: torch.fx.Node, value: torch.fx.Node, keys: int | None) -> AttentionSizes:
    return AttentionSizes(_heads(query), _size(query, -1), _size(value, -1), _size(query, -2), keys)


def _heads(query: torch.fx.Node) -> int | None:
    """The axis in front of the queries; where that is the batch alone, there is one head."""
    shape = shape_of(query) or ()
    if len(shape) >= 4:
        return _size(query, -3)
    batch = shape[0] if shape else 1
    return 1 if isinstance(batch, int) or batch.node.expr.is_Symbol else None


def _size(node: torch.fx.Node, axis: int) -> int | None:
    shape = shape_of(node) or ()
    size = shape[axis] if len(shape) >= 2 else None
    return size if isinstance(size, int) else None
