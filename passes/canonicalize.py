"""canonicalize: bring the graph to the few forms that later passes know.

Needs `graph`. Rewrites, each exact:
- `dropout` in eval mode, `alias`, `detach`, `contiguous`, a cast to the same type -> nothing;
- a slice of the whole -> nothing, one part of a stack -> that part, `copy` -> what is copied;
- `view` -> `reshape`, which is legal for every stride that later rewrites may leave behind;
- products in other words (`baddbmm`, `tensordot`, an `einsum` of two factors) -> `matmul`, and
  products with a stored weight (`x @ w.T`, `w @ x`, `addmm`, an `einsum`) -> `linear`, so that
  attention and GEMMs have one form; a weight that is turned before is stored as [out, in];
- a parameter of which layers read some rows each -> one parameter for each of them;
- a layer that is called again on the same input -> computed once;
- fused attention on other than four axes -> on four, all that an engine knows, or spelled out;
- patches summed into a map (`nn.Fold`) -> a permutation or a transposed convolution, which engines
  know;
- `scatter_reduce` of a mean, or without what is there -> scatters that add; of a source larger than
  its index -> of the part that the index reaches;
- a non-overlapping convolution (kernel = stride, no padding) -> patches @ linear, so that a patch
  embedding is a GEMM with reduction size C * P * P.
Refuses an operator that cannot become ONNX, with its place in the model's source: what is found
here costs no fine-tune. Guarantees `canonical`.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
import torch.fx

from gpusq_compile.compilation import Compilation
from gpusq_compile.graph.attention import fused_arguments
from gpusq_compile.graph.col2im import spell_out_fold
from gpusq_compile.graph.edit import bypass, finish, insert_call, replace
from gpusq_compile.graph.einsum import einsum_to_linear, einsum_to_matmul, tensordot_to_einsum
from gpusq_compile.graph.equal_nodes import merge_equal_layers
from gpusq_compile.graph.one_form import (
    ENGINE_AXES,
    added_product_to_matmul,
    attention_to_four_axes,
    product_to_linear,
    turn_left_product,
)
from gpusq_compile.graph.patches import CONVOLUTIONS, pad_numerically, patchify
from gpusq_compile.graph.products import FUSED_ATTENTION, PRODUCTS, attention_parts, factors_of
from gpusq_compile.graph.query import input_dependent, module_path, shape_of, static_shape
from gpusq_compile.graph.scatter import cut_to_index, spell_out_scatter
from gpusq_compile.graph.stored_rows import store_rows_apart
from gpusq_compile.graph.stored_weights import parameter_behind, store_as_read
from gpusq_compile.lowering.exportable import check_exportable
from gpusq_compile.pass_base import Pass, PassResult
from gpusq_compile.passes.split_attention import split
from gpusq_compile.remarks import analysis, passed

aten = torch.ops.aten

IDENTITIES = {
    aten.dropout.default,
    aten.alias.default,
    aten.detach.default,
    aten.contiguous.default,
    aten.lift_fresh_copy.default,
}
VIEWS = {aten.view.default, aten._unsafe_view.default}
VIEWS_LIKE_ANOTHER = {aten.view_as.default, aten.reshape_as.default}
"""They read of a second tensor its shape alone, which is no flow of data."""


def run(compilation: Compilation) -> PassResult:
    graph_module = compilation.ir
    result = PassResult()
    store_parts(compilation, result)
    for rewrites in REWRITES:
        for node in list(graph_module.graph.nodes):
            if any(rewrite(graph_module, node) for rewrite in rewrites):
                result.matched += 1
                result.changed += 1
    turn_weights(compilation, result)
    compute_once(graph_module, result)
    name_other_products(graph_module, result)
    spell_out_folds(graph_module, result)
    patchify_all(graph_module, result)
    finish(graph_module)
    assert compilation.convention is not None
    check_exportable(graph_module.graph, compilation.convention)
    return result


def store_parts(compilation: Compilation, result: PassResult) -> None:
    """Store a parameter of which layers read some rows each as one parameter per layer."""
    compilation.parameters.apart = store_rows_apart(compilation.ir)
    for path, pieces in compilation.parameters.apart.items():
        names = {piece.tensor for piece in pieces}
        if path in compilation.frozen:
            compilation.frozen |= names
        result.matched += 1
        result.changed += 1
        text = f"{path} is read in parts, stored as {', '.join(sorted(names))}"
        result.remarks.append(passed("rows-apart", text, path.removesuffix("_weight")))


def turn_weights(compilation: Compilation, result: PassResult) -> None:
    """Store each linear's weight as [out, in]."""
    graph_module = compilation.ir
    for node in graph_module.graph.find_nodes(op="call_function", target=aten.linear.default):
        stored = store_as_read(graph_module, node)
        if stored is not None:
            path, turned = stored
            compilation.parameters.turned[path] = turned
            result.matched += 1
            result.changed += 1
            text = f"weight stored as [out, in], its axes in the order {list(turned.axes)}"
            result.remarks.append(passed("weight-turned", text, path.removesuffix(".weight")))


def compute_once(graph_module: torch.fx.GraphModule, result: PassResult) -> None:
    for name in merge_equal_layers(graph_module):
        result.matched += 1
        result.changed += 1
        text = "called again on the same input: computed once"
        result.remarks.append(passed("computed-once", text, name))


def name_other_products(graph_module: torch.fx.GraphModule, result: PassResult) -> None:
    """Say which stored weights are multiplied in another way than by a linear."""
    graph = graph_module.graph
    in_attention = attention_parts(graph, input_dependent(graph)).products
    for node in graph.nodes:
        if node.target not in PRODUCTS or node in in_attention:
            continue
        for factor in factors_of(node):
            parameter = parameter_behind(graph_module, factor)
            if parameter is not None:
                result.matched += 1
                result.skipped += 1
                path = str(parameter.target)
                text = (
                    f"the product with the weight {path} stays in floats: it is no linear, whose "
                    "weight has axes of its inputs and outputs alone"
                )
                result.remarks.append(analysis("no-linear", text, path.removesuffix(".weight")))


def spell_out_folds(graph_module: torch.fx.GraphModule, result: PassResult) -> None:
    for node in graph_module.graph.find_nodes(op="call_function", target=aten.col2im.default):
        result.matched += 1
        layer = module_path(node) or node.name
        refusal = spell_out_fold(graph_module, node)
        if refusal is None:
            result.changed += 1
        else:
            result.skipped += 1
            text = f"left as Col2Im, which no TensorRT reads: {refusal}"
            result.remarks.append(analysis("col2im", text, layer))


def patchify_all(graph_module: torch.fx.GraphModule, result: PassResult) -> None:
    for node in list(graph_module.graph.nodes):
        pad_numerically(node)
        if node.target not in CONVOLUTIONS:
            continue
        result.matched += 1
        path = str(node.args[1].target) if isinstance(node.args[1], torch.fx.Node) else node.name
        refusal = patchify(graph_module, node)
        layer = path.removesuffix(".weight")
        if refusal is None:
            result.changed += 1
            result.remarks.append(
                passed("patchify", "convolution rewritten as patches @ linear", layer)
            )
        else:
            result.skipped += 1
            result.remarks.append(analysis("patchify", f"left a convolution: {refusal}", layer))


def remove_identity(graph_module: torch.fx.GraphModule, node: torch.fx.Node) -> bool:
    if node.target not in IDENTITIES and not casts_to_own_type(node) and not takes_all(node):
        return False
    if node.target is aten.dropout.default and len(node.args) > 2 and node.args[2]:
        return False
    bypass(node)
    return True


def casts_to_own_type(node: torch.fx.Node) -> bool:
    source = node.args[0] if node.args else None
    return (
        node.target is aten.to.dtype
        and isinstance(source, torch.fx.Node)
        and source.meta["val"].dtype == node.meta["val"].dtype
    )


def takes_all(node: torch.fx.Node) -> bool:
    """Whether a slice is the whole: the `:` of `x[:, 0]`."""
    if node.target is not aten.slice.Tensor:
        return False
    arguments: tuple[Any, ...] = (*node.args, *(None, 0, None, None, 1)[len(node.args) :])
    _, _, start, end, step = arguments
    return bool(start in (0, None) and end in (sys.maxsize, None) and step == 1)


def copy_to_source(graph_module: torch.fx.GraphModule, node: torch.fx.Node) -> bool:
    """`copy(target, source)`, what is left of `x[...] = source` -> the source in that form."""
    if node.target is not aten.copy.default:
        return False
    target, source = node.args[:2]
    assert isinstance(target, torch.fx.Node)
    assert isinstance(source, torch.fx.Node)
    value, like = source.meta["val"], node.meta["val"]
    with node.graph.inserting_before(node):
        if value.dtype != like.dtype:
            cast = (source, like.dtype)
            source = insert_call(node.graph, aten.to.dtype, cast, provenance=node)
        if static_shape(source) != static_shape(target):
            both = (source, target)
            source = insert_call(node.graph, aten.expand_as.default, both, provenance=node)
    replace(node, source)
    return True


def select_from_stack(graph_module: torch.fx.GraphModule, node: torch.fx.Node) -> bool:
    """`stack([a, b, c])[1]` -> `b`: a model that returns one of its layers' answers needs no other.

    What nothing else reads goes with it.
    """
    stack = node.args[0] if node.target is aten.select.int else None
    if not isinstance(stack, torch.fx.Node) or stack.target is not aten.stack.default:
        return False
    axis: Any = stack.args[1] if len(stack.args) > 1 else 0
    parts, rank = stack.args[0], len(shape_of(stack) or ())
    chosen: Any = node.args[1]
    index = node.args[2]
    if not isinstance(index, int) or axis % rank != chosen % rank:
        return False
    assert isinstance(parts, (list, tuple))
    part = parts[index]
    assert isinstance(part, torch.fx.Node)
    replace(node, part)
    return True


def spell_out_attention(graph_module: torch.fx.GraphModule, node: torch.fx.Node) -> bool:
    """Fused attention that cannot have four axes (a mask differs along others) -> its operators."""
    if node.target not in FUSED_ATTENTION:
        return False
    given = fused_arguments(node)
    if given["enable_gqa"] or given["is_causal"] or node.meta["val"].ndim == ENGINE_AXES:
        return False
    split(node)
    return True


def view_to_reshape(graph_module: torch.fx.GraphModule, node: torch.fx.Node) -> bool:
    if node.target in VIEWS_LIKE_ANOTHER:
        shape = static_shape(node) or ()
        if shape.count(None) > 1:
            return False
        sizes = [-1 if size is None else size for size in shape]
        node.args = (node.args[0], sizes)
    elif node.target not in VIEWS:
        return False
    node.target = aten.reshape.default
    return True


REWRITES: tuple[tuple[Callable[[torch.fx.GraphModule, torch.fx.Node], bool], ...], ...] = (
    (tensordot_to_einsum,),
    (
        remove_identity,
        view_to_reshape,
        added_product_to_matmul,
        einsum_to_linear,
        einsum_to_matmul,
        cut_to_index,
    ),
    (turn_left_product,),
    (
        product_to_linear,
        attention_to_four_axes,
        spell_out_attention,
        spell_out_scatter,
        copy_to_source,
        select_from_stack,
    ),
)
"""At each node the first that applies, once for each group: a later group sees what the earlier
ones made."""


PASS = Pass(
    name="canonicalize",
    summary="drop identities, view -> reshape, patch-embedding convolution -> linear",
    run=run,
    requires=("graph",),
    ensures=("canonical",),
    preserves=1e-4,
)
