"""smooth: move the spread between channels from LayerNorms into the linears behind them.

Needs `marked`; comes before any scale is calibrated. For every LayerNorm that feeds linears with
`quantize: {smooth: alpha}` and nothing else, its weight and bias are divided by s and the linears'
columns multiplied by it, s_j = max|X_j|^alpha / max|W_j|^(1 - alpha) with X the LayerNorm's output
on the calibration data: "SmoothQuant: Accurate and Efficient Post-Training Quantization for Large
Language Models" (Xiao et al., ICML 2023), section 4, equation 4. One scale per tensor then fits
all channels better. Masks stay as they are: they commute with a scale per column.
Guarantees `smoothed`; the function is the same up to rounding.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.fx

from gpusq_compile.compilation import Compilation
from gpusq_compile.data import calibration_calls
from gpusq_compile.errors import InputError
from gpusq_compile.graph.channels import (
    NotTraced,
    Sizes,
    Stored,
    channels_of,
    concrete_sizes,
    from_source,
    moves_data,
    name_of,
    readings,
)
from gpusq_compile.graph.query import aten, tensor_attribute, weight_source
from gpusq_compile.graph.walk import Walk
from gpusq_compile.pass_base import Pass, PassResult
from gpusq_compile.plan import PLAN, TAP_PLAN, LayerPlan, planned
from gpusq_compile.remarks import analysis, missed, passed

LARGEST_SCALE = 64.0
"""Scales stay within [1 / this, this], about a geometric mean of 1, so that neither the LayerNorm's
weight nor the linears' leave what FP16 can say."""


@dataclass(frozen=True)
class Reader:
    """A linear behind a LayerNorm: `columns` int64 [in] are the LayerNorm's channels it reads."""

    node: torch.fx.Node
    plan: LayerPlan
    columns: torch.Tensor


@dataclass(frozen=True)
class Site:
    """A LayerNorm whose output only linears read that ask for the same `alpha`."""

    node: torch.fx.Node
    weight: torch.Tensor
    bias: torch.Tensor | None
    readers: tuple[Reader, ...]
    alpha: float


def run(compilation: Compilation) -> PassResult:
    graph_module = compilation.ir
    result = PassResult()
    asked: dict[torch.fx.Node, list[LayerPlan]] = {}
    for node, plan in planned(graph_module.graph):
        if plan.quantize is not None and plan.quantize.smooth is not None:
            asked.setdefault(source_of(node), []).append(plan)
    if not asked:
        return result
    stored = Stored(graph_module)
    sizes = concrete_sizes(graph_module.graph)
    sites = []
    for source, plans in asked.items():
        result.matched += len(plans)
        try:
            sites.append(site_of(stored, source, sizes))
        except NotTraced as reason:
            result.skipped += len(plans)
            text = f"its input keeps the spread that it has: {reason}"
            result.remarks += [analysis("not-smoothed", text, plan.name) for plan in plans]
    if not sites:
        text = "no LayerNorm can be smoothed: the reasons are in the report"
        compilation.console.warn(text)
        result.remarks.append(missed("nothing-smoothed", text))
        return result
    ranges = output_ranges(compilation, sites)
    for site in sites:
        smooth(graph_module, site, ranges[site.node], result)
    return result


def source_of(node: torch.fx.Node) -> torch.fx.Node:
    """What computed the values that a layer reads, however they were moved since."""
    source = node.args[0]
    assert isinstance(source, torch.fx.Node)
    while moves_data(source):
        following = source.args[0]
        assert isinstance(following, torch.fx.Node)
        source = following
    return source


def site_of(stored: Stored, node: torch.fx.Node, sizes: Sizes) -> Site:
    """The LayerNorm with everything that reads it.

    Raises:
        NotTraced: its output cannot be scaled; says why.
    """
    if node.op == "call_module" or TAP_PLAN in node.meta:
        raise NotTraced("a tap shows it to the fine-tune")
    if node.target is not aten.layer_norm.default:
        what = name_of(node) if node.op == "call_function" else "the model's input"
        raise NotTraced(f"it comes from {what}, not from a LayerNorm that could take the scale")
    arguments = dict(enumerate(node.args))
    shape, weight, bias = arguments[1], arguments.get(2), arguments.get(3)
    if not isinstance(weight, torch.fx.Node):
        raise NotTraced("its LayerNorm has no weight that could take the scale")
    if not isinstance(shape, (list, tuple)) or len(shape) != 1:
        raise NotTraced("its LayerNorm normalizes over several axes")
    scale = stored.own(weight)
    shift = stored.own(bias) if isinstance(bias, torch.fx.Node) else None
    readers, alphas = [], set()
    for reading in readings({node: (from_source(node, sizes),)}, sizes):
        plan = reading.user.meta.get(PLAN)
        name = name_of(reading.user)
        if reading.user.op == "call_module":
            raise NotTraced("a tap shows it to the fine-tune")
        if plan is None or plan.op != "linear" or reading.node in reading.user.args[1:]:
            raise NotTraced(f"{name} reads it, and only a linear's columns can be scaled")
        if plan.quantize is None or plan.quantize.smooth is None:
            raise NotTraced(f"{name} reads it too, and does not ask for smoothing")
        source = weight_source(reading.user)
        if source is None:
            raise NotTraced(f"the weight of {name} is computed in the graph")
        stored.own(source)
        alphas.add(plan.quantize.smooth)
        readers.append(Reader(reading.user, plan, channels_of(reading.value[0])))
    if len(alphas) > 1:
        raise NotTraced(f"the layers that read it ask for different values: {sorted(alphas)}")
    return Site(node, scale, shift, tuple(readers), alphas.pop())


def output_ranges(compilation: Compilation, sites: list[Site]) -> dict[torch.fx.Node, torch.Tensor]:
    """The largest magnitude [channels] of each LayerNorm's output over the calibration data.

    Raises:
        InputError: there is no data, or an activation is not finite.
    """
    source, limit = compilation.source, compilation.rules.calibration.batches
    calls = calibration_calls(source, compilation.network, compilation.device, limit)
    nodes = {site.node for site in sites}
    ordered = [node for node in compilation.ir.graph.nodes if node in nodes]
    ranges: dict[torch.fx.Node, torch.Tensor] = {}
    with compilation.console.progress("smooth", len(calls)) as advance:
        # One batch after the other: as no layer changes in between, only one's values are held.
        for call in calls:
            walk = Walk(compilation.ir, [call])
            for node in ordered:
                walk.run_past(node)
                [value] = walk.values_of(node)
                largest = value.abs().flatten(0, -2).amax(dim=0).float()
                if not bool(largest.isfinite().all()):
                    raise InputError(
                        "activation-not-finite",
                        f"calibration met NaN or infinite values at {node.name}",
                    )
                ranges[node] = torch.maximum(ranges.get(node, largest), largest)
            advance()
    return ranges


def smooth(
    graph_module: torch.fx.GraphModule, site: Site, ranges: torch.Tensor, result: PassResult
) -> None:
    """Scale one LayerNorm down and its readers' columns up."""
    columns = weight_ranges(graph_module, site, len(ranges))
    scale = smoothing_scale(ranges, columns, site.alpha)
    stored = [tensor_attribute(graph_module, reader.plan.weight) for reader in site.readers]
    for tensor in (site.weight, site.bias):
        if tensor is not None:
            tensor.div_(scale.to(tensor))
    for reader, weight in zip(site.readers, stored, strict=True):
        weight.detach().mul_(scale[reader.columns.to(scale.device)].to(weight))
    before, after = spread(ranges), spread(ranges / scale)
    text = f"largest channel over the median one: {before:.1f} before, {after:.1f} after"
    for reader in site.readers:
        result.changed += 1
        result.remarks.append(passed("smoothed", text, reader.plan.name))


def weight_ranges(graph_module: torch.fx.GraphModule, site: Site, channels: int) -> torch.Tensor:
    """The largest weight [channels], masks applied, that meets each of a LayerNorm's channels."""
    found = site.weight.new_zeros(channels, dtype=torch.float32)
    for reader in site.readers:
        weight = tensor_attribute(graph_module, reader.plan.weight).detach()
        masked = reader.node.args[1]
        assert isinstance(masked, torch.fx.Node)
        if masked.op == "call_module":
            weight = graph_module.get_submodule(str(masked.target))(weight)
        largest = weight.abs().amax(dim=0).float()
        found.scatter_reduce_(0, reader.columns.to(found.device), largest, "amax")
    return found


def smoothing_scale(activations: torch.Tensor, weights: torch.Tensor, alpha: float) -> torch.Tensor:
    """What to divide each channel of the activations by: float32 [channels].

    A common factor of all channels changes no quantized value, so the geometric mean is brought to
    1. A channel that is always zero on either side keeps 1.

    Args:
        activations, weights: the largest magnitude per channel, [channels].
        alpha: 0 leaves all of the spread to the activations, 1 all of it to the weights.
    """
    alive = (activations > 0) & (weights > 0)
    if not bool(alive.any()):
        return torch.ones_like(activations)
    one = torch.ones_like(activations)
    logs = alpha * torch.where(alive, activations, one).log()
    logs = logs - (1 - alpha) * torch.where(alive, weights, one).log()
    logs = torch.where(alive, logs - logs[alive].mean(), 0.0)
    return logs.exp().clamp(1 / LARGEST_SCALE, LARGEST_SCALE)


def spread(ranges: torch.Tensor) -> float:
    """The largest range over the median one; 1 where all are zero."""
    middle = ranges[ranges > 0].median() if bool((ranges > 0).any()) else ranges.new_ones(())
    return float(ranges.max() / middle) or 1.0


PASS = Pass(
    name="smooth",
    summary="move the spread between channels from LayerNorms into the linears behind",
    run=run,
    requires=("marked",),
    ensures=("smoothed",),
    forbids={
        "quantized": "the scales that are there were calibrated for the activations as it "
        "found them"
    },
    preserves=1e-4,
)
