"""quantize: insert fake-quantizers at marked operators and calibrate their scales.

Needs `sparse` (sparsity first, then quantization). Weights: symmetric, one scale per output
channel, or one per block of its input channels where the rules say so, from their non-zero values;
with `rounding: gptq` the stored weights are put onto their grid, where fake quantization leaves
them as they are. Activations and outputs: symmetric, one scale per tensor, from batches of real
data. All scales are parameters that the fine-tune learns. Operators that read one tensor in one
type share its quantizer. Marked attentions get one on each factor of their two products. Guarantees
`quantized`.
"""

from __future__ import annotations

import torch
import torch.fx

from gpusq_compile.compilation import Compilation
from gpusq_compile.data import batches, require_calibration_data
from gpusq_compile.errors import InputError
from gpusq_compile.finetune.teacher import frozen_copy, quantized_phase_follows
from gpusq_compile.graph.edit import finish, insert_behind, insert_module_call, inserted_path
from gpusq_compile.graph.query import tensor_attribute
from gpusq_compile.language.training import Calibration
from gpusq_compile.obs import Grid, sweep
from gpusq_compile.pass_base import Pass, PassResult
from gpusq_compile.plan import LayerPlan, first_readers, planned, update_plan
from gpusq_compile.quantization.attention import quantize_attentions
from gpusq_compile.quantization.calibrate import Observer, weight_scale
from gpusq_compile.quantization.fake_quantize import (
    ACTIVATION_RANGES,
    MIN_SCALE,
    WEIGHT_RANGES,
    FakeQuantize,
    IntegerRange,
)
from gpusq_compile.remarks import Remark, analysis, missed, passed
from gpusq_compile.second_moments import LayerInputs, as_matrix, as_weight
from gpusq_compile.sparsity import REDUCTION_AXIS, Mask

SCALE_TYPES = {"fp16": torch.float16, "fp32": torch.float32}
ROUNDED_WITH = "rounded_with"
"""Where a node's metadata keeps the scales that its weight was rounded with when pruned."""


def run(compilation: Compilation) -> PassResult:
    graph_module = compilation.ir
    if quantized_phase_follows(compilation):
        # Rounding and reconstruction may change the stored weights before that phase begins.
        compilation.sparse_teacher = frozen_copy(graph_module)
    calibration = compilation.rules.calibration
    scale_dtype = SCALE_TYPES[compilation.rules.target.precision]
    result = PassResult()
    activations: dict[str, FakeQuantize] = {}
    shared: dict[tuple[torch.fx.Node, str], torch.fx.Node] = {}
    first = first_readers(graph_module.graph)
    for node, plan in list(planned(graph_module.graph)):
        quantize = plan.quantize
        if quantize is None:
            continue
        result.matched += 1
        if quantize.weight != "none":
            if first[plan.weight] is node:
                module = weight_quantizer(compilation, plan)
                insert_weight_quantizer(graph_module, node, plan, module)
            else:
                read_as_first(node, first[plan.weight])
            plan = plan.apply(weight=quantize.weight)
        if quantize.activation != "none":
            source = node.args[0]
            assert isinstance(source, torch.fx.Node)
            key = (source, quantize.activation)
            if is_quantizer(graph_module, source, ACTIVATION_RANGES[quantize.activation]):
                shared[key] = source  # The output of the layer before is on this grid already.
            elif key not in shared:
                path = inserted_path("activation", plan.name)
                module = _activation_quantizer(quantize.activation, scale_dtype)
                shared[key] = insert_module_call(graph_module, path, module, source)
                activations[plan.name] = module
            if shared[key] is not source:
                node.replace_input_with(source, shared[key])
            plan = plan.apply(activation=quantize.activation)
        if quantize.output != "none":
            path = inserted_path("output", plan.name)
            module = _activation_quantizer(quantize.output, scale_dtype)
            insert_behind(graph_module, path, module, node)
            activations[f"{plan.name} (output)"] = module
            plan = plan.apply(output=quantize.output)
        update_plan(node, plan)
        result.changed += 1
        result.remarks.append(passed("quantized", _describe(plan), plan.name))
    activations |= quantize_attentions(graph_module, scale_dtype, result)
    finish(graph_module)
    if activations:
        calibrate(compilation, activations, result)
    # Activations are calibrated on the sparse float model; weights are quantized from here on.
    unrounded = []
    for node, plan in planned(graph_module.graph):
        if plan.applied.weight is not None and first[plan.weight] is node:
            rounded_already = ROUNDED_WITH in node.meta
            set_weight_scale(graph_module, node, plan, calibration.weight)
            result.remarks += dead_weights(graph_module, node, plan)
            if plan.quantize and plan.quantize.rounding == "gptq" and not rounded_already:
                unrounded.append((node, plan))
    if unrounded:
        round_by_inputs(compilation, unrounded, result)
    return result


def read_as_first(node: torch.fx.Node, first: torch.fx.Node) -> None:
    """Let an operator read its weight as the first one that reads it does."""
    own, shared = node.args[1], first.args[1]
    assert isinstance(own, torch.fx.Node)
    assert isinstance(shared, torch.fx.Node)
    node.replace_input_with(own, shared)


def is_quantizer(
    graph_module: torch.fx.GraphModule, node: torch.fx.Node, grid: IntegerRange
) -> bool:
    """Whether a node is a fake-quantizer on the same grid."""
    if node.op != "call_module":
        return False
    module = graph_module.get_submodule(str(node.target))
    return isinstance(module, FakeQuantize) and module.grid == grid


def insert_weight_quantizer(
    graph_module: torch.fx.GraphModule, node: torch.fx.Node, plan: LayerPlan, module: FakeQuantize
) -> None:
    """Put the fake-quantizer between a (masked) weight and its operator."""
    value = node.args[1]
    assert isinstance(value, torch.fx.Node)
    path = inserted_path("weight", plan.name)
    after = insert_module_call(graph_module, path, module, value, before=node)
    node.replace_input_with(value, after)


def weight_quantizer(compilation: Compilation, plan: LayerPlan) -> FakeQuantize:
    """The fake-quantizer that a layer's plan asks for its weight, not calibrated yet."""
    assert plan.quantize is not None
    block = plan.quantize.block
    return FakeQuantize(
        WEIGHT_RANGES[plan.quantize.weight],
        channels=plan.shape[0],
        blocks=None if block is None else plan.shape[REDUCTION_AXIS] // block,
        scale_dtype=SCALE_TYPES[compilation.rules.target.precision],
    )


def set_weight_scale(
    graph_module: torch.fx.GraphModule, node: torch.fx.Node, plan: LayerPlan, method: str
) -> None:
    """Set a weight's scales from the values that reach its fake-quantizer, i.e. after the mask.

    A weight that was rounded while it was pruned keeps the scales that it was rounded with.
    """
    module, weight = weight_at_quantizer(graph_module, node, plan)
    scale = node.meta.pop(ROUNDED_WITH, None)
    if scale is None:
        scale = weight_scale(weight, method, module.grid.qmax, module.blocks)
    module.to(weight.device).set_scale(scale)


def dead_weights(
    graph_module: torch.fx.GraphModule, node: torch.fx.Node, plan: LayerPlan
) -> list[Remark]:
    """Remarks on the scales of a weight that had to be raised to the smallest there is.

    Where all weights under a scale are zero nothing is lost by it; where they are not, levels are.
    """
    module, weight = weight_at_quantizer(graph_module, node, plan)
    needed = weight_scale(weight, "max", module.grid.qmax, module.blocks)
    unit = "blocks" if module.blocks else "output channels"
    dead, tiny = int(needed.eq(0).sum()), int((needed.gt(0) & needed.lt(MIN_SCALE)).sum())
    remarks = []
    if dead:
        text = f"all weights of {dead} of {needed.numel()} {unit} are zero: any scale does"
        remarks.append(analysis("dead-weights", text, plan.name))
    if tiny:
        text = (
            f"the weights of {tiny} of {needed.numel()} {unit} are too small for the smallest "
            f"scale ({MIN_SCALE:.2g}), which they got: they lose levels, or become zero"
        )
        remarks.append(missed("tiny-weights", text, plan.name))
    return remarks


def weight_at_quantizer(
    graph_module: torch.fx.GraphModule, node: torch.fx.Node, plan: LayerPlan
) -> tuple[FakeQuantize, torch.Tensor]:
    """A layer's weight quantizer, and the weight, masked, as it gets there."""
    quantizer = node.args[1]
    assert isinstance(quantizer, torch.fx.Node)
    module = graph_module.get_submodule(str(quantizer.target))
    assert isinstance(module, FakeQuantize)
    weight = tensor_attribute(graph_module, plan.weight).detach()
    if (mask := mask_of(graph_module, quantizer)) is not None:
        weight = weight * mask
    return module, weight


def mask_of(graph_module: torch.fx.GraphModule, quantizer: torch.fx.Node) -> torch.Tensor | None:
    """The mask in front of a weight's quantizer."""
    source = quantizer.args[0]
    assert isinstance(source, torch.fx.Node)
    if source.op != "call_module":
        return None
    module = graph_module.get_submodule(str(source.target))
    assert isinstance(module, Mask)
    return module.mask


def round_by_inputs(
    compilation: Compilation,
    layers: list[tuple[torch.fx.Node, LayerPlan]],
    result: PassResult,
) -> None:
    """`rounding: gptq`: replace stored weights by values on their grid, layer by layer.

    Scales and masks stay as they are. Each layer's inputs are those of the deployed model: its
    activations are quantized, and the layers before are rounded.

    Raises:
        InputError: there is no data, or a layer's input is not finite.
    """
    graph_module = compilation.ir
    damping = compilation.rules.calibration.damping
    inputs = LayerInputs(compilation, "rounding gptq")
    if compilation.source.synthetic:
        text = "no data was given, so gptq rounded for generated noise, not for real images"
        result.remarks.append(missed("synthetic-calibration", text))
    with torch.no_grad(), compilation.console.progress("round", len(layers)) as advance:
        for node, plan in layers:
            module, weight = weight_at_quantizer(graph_module, node, plan)
            quantizer = node.args[1]
            assert isinstance(quantizer, torch.fx.Node)
            mask = mask_of(graph_module, quantizer)
            moments = inputs.moments(node, plan.name)
            before = as_matrix(weight)
            after, _ = sweep(
                before,
                moments.inverse_factor(damping),
                mask=None if mask is None else as_matrix(mask),
                grid=Grid(module.exported_scale(), module.grid),
            )
            to_nearest = as_matrix(module(weight))
            error, nearest = moments.output_errors(before, (after, to_nearest))
            graph_module.get_parameter(plan.weight).copy_(as_weight(after, weight.shape))
            inputs.settle(node, module(as_weight(after, weight.shape)))
            text = f"gptq: output error {error:.2%} (to the nearest: {nearest:.2%})"
            result.remarks.append(analysis("rounded", text, plan.name))
            advance()
    result.remarks += inputs.remarks()


def _activation_quantizer(name: str, scale_dtype: torch.dtype) -> FakeQuantize:
    return FakeQuantize(ACTIVATION_RANGES[name], channels=None, scale_dtype=scale_dtype)


def _describe(plan: LayerPlan) -> str:
    parts = [
        f"{what} {name}"
        for what, name in (
            ("weight", plan.applied.weight),
            ("activation", plan.applied.activation),
            ("output", plan.applied.output),
        )
        if name
    ]
    if plan.quantize is not None and plan.quantize.block is not None:
        parts[0] += f" in blocks of {plan.quantize.block}"
    return ", ".join(parts)


def calibrate(
    compilation: Compilation, quantizers: dict[str, FakeQuantize], result: PassResult
) -> None:
    """Show the quantizers real activations and set their scales.

    Raises:
        InputError: there is no data, or an activation is not finite.
    """
    settings = compilation.rules.calibration
    name, factory = require_calibration_data(compilation.source)
    for module in quantizers.values():
        module.to(compilation.device)
        module.observer = Observer()
    images = 0
    with torch.no_grad(), compilation.console.progress("calibrate", settings.batches) as advance:
        for batch in batches(factory, name, compilation.device, settings.batches):
            compilation.network.run(compilation.ir, batch.inputs)
            images += batch.size
            advance()
    for layer, module in quantizers.items():
        assert module.observer is not None
        scale = _activation_scale(layer, module, settings)
        if scale < MIN_SCALE:
            result.remarks.append(
                missed(
                    "dead-activation",
                    "calibration met next to nothing but zeros; the scale is the smallest there is",
                    layer,
                )
            )
        module.set_scale(torch.tensor(scale, device=compilation.device))
        module.observer = None
    if compilation.source.synthetic:
        text = (
            "no data was given, so activation scales come from generated noise and fit no real "
            f"image; --data {compilation.source.data_forms} gives real ones"
        )
        compilation.console.warn(text)
        result.remarks.append(missed("synthetic-calibration", text))
    result.remarks.append(
        analysis("calibrated", f"{len(quantizers)} tensors from {images} images of {name}")
    )


def _activation_scale(layer: str, module: FakeQuantize, settings: Calibration) -> float:
    observer = module.observer
    assert observer is not None
    if not observer.finite:
        raise InputError(
            "activation-not-finite", f"calibration met NaN or infinite values at {layer}"
        )
    qmax = module.grid.qmax
    scale = observer.threshold(settings.activation, settings.percentile, qmax) / qmax
    if scale > torch.finfo(module.scale_dtype).max:
        raise InputError(
            "activation-too-large",
            f"{layer} reaches {observer.maximum:.3g}, beyond what an FP16 scale can say",
            hint="target: {precision: fp32} in the rules keeps such a model in float32",
        )
    return scale


PASS = Pass(
    name="quantize",
    summary="insert fake-quantizers and calibrate their scales",
    run=run,
    requires=("sparse", "attention_split"),
    ensures=("quantized",),
)
