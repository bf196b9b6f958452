"""permute: reorder a layer's input channels so that its sparsity pattern keeps more of the weight.

Needs `marked`; comes before any mask. For every linear with `sparsity: {permute: true}` it finds
the linears that make the layer's input and checks that nothing else depends on the order of those
channels: the hidden axis of an MLP, and the channels within a head from V to the projection. Their
rows and biases, and the layer's columns, then change places together. Names and shapes stay the
user's. Guarantees `permuted`; the function is the same up to rounding.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.fx

from gpusq_compile.compilation import Compilation
from gpusq_compile.graph.channels import NotTraced, Sizes, Stored, concrete_sizes
from gpusq_compile.graph.producers import InputChannels, trace_back
from gpusq_compile.graph.query import aten, tensor_attribute, value_dependent, weight_source
from gpusq_compile.graph.roles import residual_adds
from gpusq_compile.pass_base import Pass, PassResult
from gpusq_compile.permutation import Order, best_order
from gpusq_compile.plan import LayerPlan, planned
from gpusq_compile.remarks import analysis, missed, passed
from gpusq_compile.second_moments import (
    calibration_parts,
    input_mean_squares,
    samples_with_room,
)
from gpusq_compile.sparsity import PATTERNS

LOOK = 6 * 10**8
"""Parameters times samples that a look at mean squares is worth: of a large model fewer batches
than the other passes see tell them well enough."""


@dataclass(frozen=True)
class Rows:
    """The tensors of a producer that go with its rows: the weight [out, in], the bias's parts.

    A bias may be joined in the graph from several stored vectors.
    """

    weight: torch.Tensor
    bias: tuple[torch.Tensor, ...]


def run(compilation: Compilation) -> PassResult:
    graph_module = compilation.ir
    graph = graph_module.graph
    result = PassResult()
    asked = [
        (node, plan)
        for node, plan in planned(graph)
        if plan.sparsity is not None and plan.sparsity.permute
    ]
    if not asked:
        return result
    result.matched = len(asked)
    stored = Stored(graph_module)
    sizes = concrete_sizes(graph)
    residuals = set(residual_adds(graph, value_dependent(graph)))
    generator = torch.Generator().manual_seed(compilation.options.seed)
    free = []
    for node, plan in asked:
        try:
            free.append((node, plan, *reorderable(stored, node, plan, sizes, residuals)))
        except NotTraced as reason:
            result.skipped += 1
            text = f"its input channels keep their order: {reason}"
            result.remarks.append(analysis("order-fixed", text, plan.name))
    if not free:
        text = "no layer's input channels can change places: the reasons are in the report"
        compilation.console.warn(text)
        result.remarks.append(missed("nothing-permuted", text))
    squares = input_squares(compilation, [(node, plan) for node, plan, _, _ in free])
    with compilation.console.progress("permute", len(free)) as advance:
        for node, plan, channels, rows in free:
            found = search(graph_module, plan, channels, squares.get(node), generator)
            permute(graph_module, plan, found, channels, rows, result)
            advance()
    return result


def reorderable(
    stored: Stored,
    node: torch.fx.Node,
    plan: LayerPlan,
    sizes: Sizes,
    residuals: set[torch.fx.Node],
) -> tuple[InputChannels, list[Rows]]:
    """What goes with the layer's input channels.

    Raises:
        NotTraced: their order is not free; says why.
    """
    if plan.op != "linear":
        raise NotTraced("only a linear's can change places")
    stored.own(weight_source(node) or node)
    channels = trace_back(node, sizes, residuals)
    return channels, [rows_of(stored, producer.node) for producer in channels.producers]


def rows_of(stored: Stored, node: torch.fx.Node) -> Rows:
    """The stored tensors of a linear's output channels.

    Raises:
        NotTraced: the graph computes them, or other operators read them too.
    """
    weight, bias = node.args[1], node.args[2] if len(node.args) > 2 else None
    assert isinstance(weight, torch.fx.Node)
    parts: list[torch.fx.Node] = []
    if isinstance(bias, torch.fx.Node):
        joined = bias.target is aten.cat.default and len(bias.users) == 1
        parts = list(bias.all_input_nodes) if joined else [bias]
    return Rows(stored.own(weight), tuple(stored.own(part) for part in parts))


def input_squares(
    compilation: Compilation,
    layers: list[tuple[torch.fx.Node, LayerPlan]],
) -> dict[torch.fx.Node, torch.Tensor]:
    """The mean square [in] of the input of each layer whose mask will look at it."""
    looking = {
        node: plan.name
        for node, plan in layers
        if plan.sparsity is not None and plan.sparsity.method != "magnitude"
    }
    if not looking:
        return {}
    what = "a permutation for masks that are chosen by inputs"
    samples = min(samples_with_room(compilation).values())
    parts = calibration_parts(compilation, what, samples, most=LOOK)
    return input_mean_squares(compilation.ir, [part.call for part in parts], looking)


def search(
    graph_module: torch.fx.GraphModule,
    plan: LayerPlan,
    channels: InputChannels,
    squares: torch.Tensor | None,
    generator: torch.Generator,
) -> Order:
    """The order for a layer; with `squares` a weight counts as much as what it adds to outputs."""
    assert plan.sparsity is not None
    weight = tensor_attribute(graph_module, plan.weight).detach()
    if squares is not None:
        weight = weight * squares.sqrt().to(weight)
    return best_order(weight, PATTERNS[plan.sparsity.pattern], generator, blocks=channels.blocks)


def permute(
    graph_module: torch.fx.GraphModule,
    plan: LayerPlan,
    found: Order,
    channels: InputChannels,
    rows: list[Rows],
    result: PassResult,
) -> None:
    """Bring the layer's columns and its producers' rows into the order found."""
    assert plan.sparsity is not None
    what = "energy" if plan.sparsity.method == "magnitude" else "energy, weighed by its inputs"
    kept = f"{plan.sparsity.pattern} keeps {found.before:.2%} of the {what}"
    if found.after <= found.before:
        result.skipped += 1
        text = f"{kept}, and no order was found that keeps more"
        result.remarks.append(analysis("order-kept", text, plan.name))
        return
    weight = tensor_attribute(graph_module, plan.weight).detach()
    order = found.channels.to(weight.device)
    weight.copy_(weight[:, order])
    for producer, tensors in zip(channels.producers, rows, strict=True):
        reorder_rows(tensors, producer.rows.to(weight.device), order)
    result.changed += 1
    text = f"{kept} in the given order, {found.after:.2%} in the new one"
    result.remarks.append(passed("permuted", text, plan.name))


def reorder_rows(tensors: Rows, rows: torch.Tensor, order: torch.Tensor) -> None:
    """Row `rows[j]` takes what row `rows[order[j]]` held."""
    tensors.weight[rows] = tensors.weight[rows[order]]
    if tensors.bias:
        bias = torch.cat(tensors.bias)
        bias[rows] = bias[rows[order]]
        lengths = [len(part) for part in tensors.bias]
        for part, values in zip(tensors.bias, torch.split(bias, lengths), strict=True):
            part.copy_(values)


PASS = Pass(
    name="permute",
    summary="reorder input channels so that a pattern keeps more, where the function stays",
    run=run,
    requires=("marked",),
    ensures=("permuted",),
    forbids={"sparse": "the order is there for the mask, which has been chosen by then"},
    preserves=1e-4,
)
