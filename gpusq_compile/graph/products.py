"""Products of activations: what attention is made of, however it is written.

A GEMM multiplies activations with a weight. Where two activations are multiplied, tokens (or
channels) look at each other: `softmax(q @ k) @ v`, in either order without the softmax (linear
attention), over channels instead of tokens, with heads mixed in between, or with weights that a
layer computes from each token alone.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.fx

from gpusq_compile.graph.query import (
    aten,
    elements_of,
    is_gemm,
    mixes_channels,
    shape_of,
    walk_inputs,
    walk_users,
)

FUSED_ATTENTION: frozenset[object] = frozenset({aten.scaled_dot_product_attention.default})
SOFTMAX: frozenset[object] = frozenset({aten.softmax.int, aten._softmax.default})
PRODUCTS: frozenset[object] = frozenset(
    {
        aten.matmul.default,
        aten.mm.default,
        aten.bmm.default,
        aten.baddbmm.default,
        aten.addmm.default,
        aten.einsum.default,
    }
)


@dataclass(frozen=True)
class AttentionParts:
    """`products` of all attentions of a graph, and the GEMMs that mix heads between two of them."""

    products: frozenset[torch.fx.Node]
    head_mixers: frozenset[torch.fx.Node]


def attention_parts(graph: torch.fx.Graph, dependent: set[torch.fx.Node]) -> AttentionParts:
    """Fused attention, and every product of two activations that is a part of an attention.

    Of those that are spelled out: the products on both sides of a softmax, one whose factor comes
    straight from a softmax, and those that follow one another with no weight in between.
    """
    found = {node for node in graph.nodes if node.target in FUSED_ATTENTION}
    mixers: set[torch.fx.Node] = set()
    products = {
        node
        for node in graph.nodes
        if node.target in PRODUCTS and all(factor in dependent for factor in factors_of(node))
    }
    for softmax in graph.nodes:
        if softmax.target not in SOFTMAX or softmax not in dependent:
            continue

        def through(node: torch.fx.Node, scores: torch.fx.Node = softmax) -> bool:
            return _joins(node) or mixes_heads(node, scores)

        below = set(walk_users(softmax, through))
        if products.isdisjoint(below):
            continue
        reached = below | set(walk_inputs(softmax, through))
        found |= products & reached
        mixers |= {node for node in reached if mixes_heads(node, softmax)}
    for node in products:
        if following := products.intersection(walk_users(node, _joins)):
            found |= {node, *following}
    return AttentionParts(frozenset(found), frozenset(mixers))


def with_stored_factor(graph: torch.fx.Graph, dependent: set[torch.fx.Node]) -> list[torch.fx.Node]:
    """The products of an activation with something that no input decides, such as a weight per
    head: GEMMs that are no linear.

    Args:
        dependent: the nodes that depend on the inputs.
    """
    return [
        node
        for node in graph.nodes
        if node.target in PRODUCTS
        and len({factor in dependent for factor in factors_of(node)}) == 2
    ]


def factors_of(product: torch.fx.Node) -> list[torch.fx.Node]:
    """The two tensors that an operator of `PRODUCTS` multiplies (of an einsum: all of them)."""
    operands = product.all_input_nodes
    if product.target in (aten.baddbmm.default, aten.addmm.default):
        operands = [node for node in product.args[1:3] if isinstance(node, torch.fx.Node)]
    return operands


def mixes_heads(node: torch.fx.Node, scores: torch.fx.Node) -> bool:
    """Whether a GEMM mixes the heads of attention scores ("Talking-Heads Attention").

    It has as many outputs as inputs, and its tensor is the scores, whichever axis is last.
    """
    if not is_gemm(node):
        return False
    weight = node.args[1]
    assert isinstance(weight, torch.fx.Node)
    rows, columns = (shape_of(weight) or (0, 1))[:2]
    return bool(rows == columns) and elements_of(node) == elements_of(scores)


def carries_values(node: torch.fx.Node) -> bool:
    """An operator whose result is floating-point: neither a mask nor an index nor a size."""
    value = node.meta.get("val")
    values = value if isinstance(value, (list, tuple)) else [value]
    return node.op in ("call_function", "call_module") and any(
        isinstance(item, torch.Tensor) and item.is_floating_point() for item in values
    )


def _joins(node: torch.fx.Node) -> bool:
    """What a search from one product of an attention for another goes through."""
    ends = PRODUCTS | FUSED_ATTENTION | SOFTMAX
    return carries_values(node) and node.target not in ends and not mixes_channels(node)
