"""split_attention: spell out the fused attentions that are to be quantized.

Needs `marked`. `scaled_dot_product_attention` has no place for a quantizer on what its two products
multiply. Each one with a plan becomes query * scale, its product with the transposed key, plus the
mask, softmax, and the product with the value: the same function, in the same type. Queries are
scaled before the product, so that no score exceeds FP16 that would not in the fused operator.
Guarantees `attention_split`.
"""

from __future__ import annotations

import torch
import torch.fx

from gpusq_compile.attention_plan import ATTENTION_PLAN, planned_attentions
from gpusq_compile.compilation import Compilation
from gpusq_compile.graph.attention import fused_arguments
from gpusq_compile.graph.edit import finish, insert_call, replace
from gpusq_compile.graph.products import FUSED_ATTENTION
from gpusq_compile.graph.query import aten
from gpusq_compile.pass_base import Pass, PassResult
from gpusq_compile.plan import TAP_PLAN
from gpusq_compile.remarks import passed


def run(compilation: Compilation) -> PassResult:
    graph_module = compilation.ir
    result = PassResult()
    for node, plan in list(planned_attentions(graph_module.graph)):
        if plan.quantize is None:
            continue
        result.matched += 1
        if node.target not in FUSED_ATTENTION:
            continue
        split(node)
        result.changed += 1
        result.remarks.append(passed("split-attention", "spelled out for its Q/DQ", plan.name))
    finish(graph_module)
    return result


def split(node: torch.fx.Node) -> torch.fx.Node:
    """Replace a fused attention by its operators; returns the second product.

    query [..., queries, head_dim], key [..., keys, head_dim], value [..., keys, value_dim] and a
    mask that broadcasts to [..., queries, keys], as in `torch.nn.functional`.
    """
    given = fused_arguments(node)
    query, key, mask = given["query"], given["key"], given["attn_mask"]
    factor = given["scale"]
    if factor is None:
        factor = query.meta["val"].shape[-1] ** -0.5
    graph = node.graph
    with graph.inserting_before(node):
        scaled = insert_call(graph, aten.mul.Tensor, (query, factor), provenance=node)
        turned = insert_call(graph, aten.transpose.int, (key, -2, -1), provenance=node)
        scores = insert_call(graph, aten.matmul.default, (scaled, turned), provenance=node)
        if mask is not None:
            scores = masked(scores, mask, node)
        weights = insert_call(graph, aten.softmax.int, (scores, -1), provenance=node)
        output = insert_call(graph, aten.matmul.default, (weights, given["value"]), provenance=node)
    for key_of_plan in (ATTENTION_PLAN, TAP_PLAN):
        if key_of_plan in node.meta:
            output.meta[key_of_plan] = node.meta[key_of_plan]
    replace(node, output)
    return output


def masked(scores: torch.fx.Node, mask: torch.fx.Node, node: torch.fx.Node) -> torch.fx.Node:
    """The scores plus a float mask, or with those of false entries out of the softmax's reach.

    The lowest number stands in for minus infinity, which FP16 turns into NaN where a query may see
    no key at all.
    """
    graph = scores.graph
    if mask.meta["val"].dtype != torch.bool:
        return insert_call(graph, aten.add.Tensor, (scores, mask), provenance=node)
    hidden = insert_call(graph, aten.logical_not.default, (mask,), provenance=node)
    lowest = torch.finfo(scores.meta["val"].dtype).min
    return insert_call(graph, aten.masked_fill.Scalar, (scores, hidden, lowest), provenance=node)


PASS = Pass(
    name="split_attention",
    summary="spell out the fused attentions that are to be quantized",
    run=run,
    requires=("marked",),
    ensures=("attention_split",),
    preserves=1e-4,
)
