"""sparsify: put a fixed mask between each marked weight and its operator.

Needs `marked` and `tapped`. Keeps a copy of the dense graph where a later pass learns from it.
Inserts a `Mask` module, chosen by the method that the rules name: `magnitude` and `wanda` leave
the stored weight dense, `obs` writes the compensated weight into it. The latter two look at the
layer's inputs: layers are taken in graph order, so that each sees what the pruned ones before it
put out. Guarantees `sparse`: every plan with a sparsity has its mask in the graph.
"""

from __future__ import annotations

import torch
import torch.fx

from gpusq_compile.compilation import Compilation
from gpusq_compile.finetune.teacher import frozen_copy, needs_dense_teacher, quantized_phase_follows
from gpusq_compile.graph.edit import finish, insert_module_call, inserted_path
from gpusq_compile.graph.query import tensor_attribute, weight_source
from gpusq_compile.obs import Grid, sweep
from gpusq_compile.pass_base import Pass, PassResult
from gpusq_compile.passes.quantize import ROUNDED_WITH, read_as_first, weight_quantizer
from gpusq_compile.plan import PLAN, LayerPlan, first_readers, planned, update_plan
from gpusq_compile.quantization.calibrate import weight_scale
from gpusq_compile.remarks import missed, passed
from gpusq_compile.second_moments import LayerInputs, as_matrix, as_weight
from gpusq_compile.sparsity import PATTERNS, Mask, magnitude_mask, wanda_mask


def run(compilation: Compilation) -> PassResult:
    graph_module = compilation.ir
    result = PassResult()
    if needs_dense_teacher(compilation):
        compilation.dense_teacher = frozen_copy(graph_module)
    masks: dict[torch.fx.Node, Mask] = {}
    first = first_readers(graph_module.graph)
    for node, plan in list(planned(graph_module.graph)):
        if plan.sparsity is None:
            continue
        if first[plan.weight] is node:
            masks[node] = insert_mask(graph_module, node, plan, plan.sparsity.pattern)
        else:
            read_as_first(node, first[plan.weight])
            update_plan(node, plan.apply(sparsity=plan.sparsity.pattern))
    finish(graph_module)
    result.matched = result.changed = len(masks)
    methods = {plan.sparsity.method for _, plan in planned(graph_module.graph) if plan.sparsity}
    inputs = None
    if by_inputs := sorted(methods - {"magnitude"}):
        inputs = LayerInputs(compilation, f"sparsity method {' and '.join(by_inputs)}")
        if compilation.source.synthetic:
            text = "no data was given, so masks were chosen from generated noise, not real images"
            result.remarks.append(missed("synthetic-calibration", text))
    with torch.no_grad(), compilation.console.progress("sparsify", len(masks)) as advance:
        for node, mask in masks.items():
            text = prune(compilation, node, mask, inputs)
            result.remarks.append(passed("sparsified", text, node.meta[PLAN].name))
            advance()
    if inputs is not None:
        result.remarks += inputs.remarks()
    return result


def insert_mask(
    graph_module: torch.fx.GraphModule, node: torch.fx.Node, plan: LayerPlan, pattern: str
) -> Mask:
    """Put the mask by magnitude between a weight and its operator."""
    source = weight_source(node)
    assert source is not None
    weight = tensor_attribute(graph_module, plan.weight).detach()
    mask = Mask(magnitude_mask(weight, PATTERNS[pattern]))
    path = inserted_path("mask", plan.name)
    masked = insert_module_call(graph_module, path, mask, source, before=node)
    node.replace_input_with(source, masked)
    update_plan(node, plan.apply(sparsity=pattern))
    return mask


def prune(
    compilation: Compilation, node: torch.fx.Node, module: Mask, inputs: LayerInputs | None
) -> str:
    """Choose a layer's mask by its method, in place of the one by magnitude.

    Returns:
        What was done and what it cost.
    """
    plan: LayerPlan = node.meta[PLAN]
    assert plan.sparsity is not None
    weight = compilation.ir.get_parameter(plan.weight)
    pattern = PATTERNS[plan.sparsity.pattern]
    dense = as_matrix(weight.detach()).clone()
    found = as_matrix(module.mask)
    cost = ""
    if plan.sparsity.method == "wanda":
        assert inputs is not None
        found = wanda_mask(dense, inputs.mean_squares(node, plan.name), pattern)
    elif plan.sparsity.method == "obs":
        assert inputs is not None
        moments = inputs.moments(node, plan.name)
        damping = compilation.rules.calibration.damping
        plain, way, grid = dense * found, "magnitude", None
        if rounds_too(compilation, plan):
            grid = joint_grid(compilation, node, plan, weight * module.mask)
            plain, way = grid.nearest(plain), "magnitude, to the nearest"
        result, found = sweep(dense, moments.inverse_factor(damping), pattern=pattern, grid=grid)
        weight.copy_(as_weight(result, weight.shape))
        error, other = moments.output_errors(dense, (result, plain))
        cost = f", output error {error:.1%} ({way}: {other:.1%})"
        if grid is not None:
            cost += f", rounded to {grid.levels.name} in the same sweep"
    module.mask.copy_(as_weight(found, weight.shape))
    if inputs is not None:
        inputs.settle(node, module(weight))
    energy = float((dense * found).square().sum() / dense.square().sum().clamp_min(1e-30))
    return f"{plan.sparsity.pattern} keeps {energy:.1%} of the energy{cost}"


def rounds_too(compilation: Compilation, plan: LayerPlan) -> bool:
    """Whether `method: obs` and `rounding: gptq` of a layer are done in one sweep.

    Only where nothing in between changes the weight or needs it in float: no fine-tune of the
    sparse model, which would leave the grid; no quantized phase, whose teacher is the sparse float
    model; no migration of scales into the weight.
    """
    quantize, rules = plan.quantize, compilation.rules
    if quantize is None or quantize.rounding != "gptq" or quantize.weight == "none":
        return False
    if compilation.options.finetune and rules.finetune.sparse != "none":
        return False
    if quantized_phase_follows(compilation):
        return False
    order = rules.file.passes
    migrates = any(
        other.quantize is not None and other.quantize.smooth is not None
        for _, other in planned(compilation.ir.graph)
    )
    return not (migrates and "smooth" in order[order.index("sparsify") :])


def joint_grid(
    compilation: Compilation, node: torch.fx.Node, plan: LayerPlan, weight: torch.Tensor
) -> Grid:
    """The grid to round onto while pruning, with scales from `weight`, masked by magnitude.

    The scales stay with the node for the quantize pass.
    """
    quantizer = weight_quantizer(compilation, plan).to(weight.device)
    method = compilation.rules.calibration.weight
    scale = weight_scale(weight, method, quantizer.grid.qmax, quantizer.blocks)
    node.meta[ROUNDED_WITH] = scale
    quantizer.set_scale(scale)
    return Grid(quantizer.exported_scale().detach(), quantizer.grid)


PASS = Pass(
    name="sparsify",
    summary="mask marked weights in their pattern along the reduction axis",
    run=run,
    requires=("marked", "tapped"),
    ensures=("sparse",),
    forbids={"quantized": "scales come from the weights that are left, so pruning comes first"},
)
