"""fold: make integers and zeros real.

Needs `quantized_tuned`. Removes taps and decisions, multiplies masks into the stored weights,
replaces each fake-quantized weight by its integers and scales with a `gpusq::dequantize`, and each
fake-quantized activation by `gpusq::quantize` and `gpusq::dequantize`. 4-bit values are kept in
int8, weights as integers of [-7, 7] and activations behind a clip to [-8, 7] steps, so that tensor
cores that know INT8 alone compute exactly what was trained. The function is exactly that of the
fake-quantized graph, whose outputs on real batches are recorded first: the final file is compared
with them. Guarantees `folded`: no inserted module is left.
"""

from __future__ import annotations

import torch
import torch.fx

from gpusq_compile.attention_plan import planned_attentions
from gpusq_compile.compilation import Compilation
from gpusq_compile.data import some_batches
from gpusq_compile.errors import InternalError
from gpusq_compile.finetune.decisions import Decision
from gpusq_compile.finetune.taps import Tap
from gpusq_compile.graph.edit import (
    NAMESPACE,
    bypass,
    finish,
    insert_call,
    insert_get_attr,
    replace,
    set_tensor,
    store_buffer,
)
from gpusq_compile.graph.query import module_calls
from gpusq_compile.lowering.runtime import Expected, record
from gpusq_compile.pass_base import Pass, PassResult
from gpusq_compile.plan import LayerPlan, first_readers, planned, unaccounted
from gpusq_compile.quantization.fake_quantize import (
    ACTIVATION_RANGES,
    FakeQuantize,
    quantize_values,
)
from gpusq_compile.quantization.operators import DEQUANTIZE, QUANTIZE
from gpusq_compile.sparsity import Mask

CLIP = torch.ops.aten.clamp.default

EXPECTED_BATCHES = 2
"""Batches whose outputs the final file must reproduce."""


def run(compilation: Compilation) -> PassResult:
    graph_module = compilation.ir
    result = PassResult()
    for _, plan in planned(graph_module.graph):
        if left := unaccounted(plan):
            raise InternalError("unaccounted", f"{plan.name}: nobody applied {', '.join(left)}")
    for _, attention in planned_attentions(graph_module.graph):
        if attention.quantize is not None and attention.applied != attention.requested:
            raise InternalError("unaccounted", f"{attention.name}: nobody quantized it")
    compilation.expected = record_expected(compilation)
    with torch.no_grad():
        first = first_readers(graph_module.graph)
        folded: dict[str, torch.fx.Node] = {}
        for node, plan in list(planned(graph_module.graph)):
            if plan.applied.sparsity or plan.applied.weight:
                if first[plan.weight] is node:
                    folded[plan.weight] = fold_weight(graph_module, node, plan)
                else:
                    value = node.args[1]
                    assert isinstance(value, torch.fx.Node)
                    node.replace_input_with(value, folded[plan.weight])
                result.matched += 1
                result.changed += 1
        graph_module.graph.eliminate_dead_code()
        for node, module in module_calls(graph_module):
            result.matched += 1
            result.changed += 1
            if isinstance(module, (Tap, Decision)):
                bypass(node)
            else:
                assert isinstance(module, FakeQuantize)
                fold_activation(graph_module, node, module)
    finish(graph_module)
    return result


def record_expected(compilation: Compilation) -> list[Expected]:
    """The fake-quantized graph's outputs on real batches; on the probe where there is no data."""
    found = some_batches(compilation.source, compilation.device, EXPECTED_BATCHES)
    calls = [compilation.network.scoped_inputs(batch.inputs) for batch in found]
    return [record(compilation.cached_ir, *call) for call in calls or [compilation.probe]]


def fold_weight(
    graph_module: torch.fx.GraphModule, node: torch.fx.Node, plan: LayerPlan
) -> torch.fx.Node:
    """get_attr -> [mask] -> [fake-quantize] -> op   becomes   get_attr -> [dequantize] -> op.

    Returns:
        What the operator reads now.
    """
    chain = [node.args[1]]
    while isinstance(chain[-1], torch.fx.Node) and chain[-1].op == "call_module":
        chain.append(chain[-1].args[0])
    source = chain[-1]
    assert isinstance(source, torch.fx.Node)
    values = graph_module.get_parameter(plan.weight).detach()
    quantizer, path = None, ""
    for link in reversed(chain[:-1]):
        assert isinstance(link, torch.fx.Node)
        module = graph_module.get_submodule(str(link.target))
        if isinstance(module, Mask):
            values = values * module.mask
        else:
            assert isinstance(module, FakeQuantize)
            quantizer, path = module, scale_path(link)
    graph = graph_module.graph
    if quantizer is None:
        set_tensor(graph_module, plan.weight, values, trainable=True)
        replacement = source
    else:
        scale = quantizer.exported_scale().detach()
        levels = quantize_values(values, scale, quantizer.grid)
        set_tensor(graph_module, plan.weight, levels, trainable=False)
        store_buffer(graph_module, path, scale)
        with graph.inserting_before(node):
            stored = insert_get_attr(graph_module, plan.weight, provenance=source)
            scales = insert_get_attr(graph_module, path, provenance=source)
            replacement = insert_call(graph, DEQUANTIZE, (stored, scales), provenance=node)
    head = chain[0]
    assert isinstance(head, torch.fx.Node)
    node.replace_input_with(head, replacement)
    return replacement


def fold_activation(
    graph_module: torch.fx.GraphModule, node: torch.fx.Node, module: FakeQuantize
) -> None:
    """fake-quantize   becomes   [clip] -> quantize -> dequantize."""
    graph = graph_module.graph
    path = scale_path(node)
    step = module.exported_scale().detach()
    store_buffer(graph_module, path, step)
    source = node.args[0]
    with graph.inserting_before(node):
        if module.grid != ACTIVATION_RANGES["int8"]:
            # Quantize saturates at the ends of int8. A border within half a step of its own level
            # rounds to that level, so rounding the borders themselves to FP16 changes no integer.
            borders = (module.grid.qmin * float(step), module.grid.qmax * float(step))
            source = insert_call(graph, CLIP, (source, *borders), provenance=node)
        scale = insert_get_attr(graph_module, path, provenance=node)
        levels = insert_call(graph, QUANTIZE, (source, scale), provenance=node)
        values = insert_call(graph, DEQUANTIZE, (levels, scale), provenance=node)
    replace(node, values)


def scale_path(quantizer: torch.fx.Node) -> str:
    """Where the folded graph keeps a fake-quantizer's scale: `gpusq.weight_scale.LAYER`, ..."""
    kind, _, layer = str(quantizer.target).removeprefix(NAMESPACE + ".").partition(".")
    return f"{NAMESPACE}.{kind}_scale.{layer}"


PASS = Pass(
    name="fold",
    summary="fold masks and scales into integer weights and quantize/dequantize operators",
    run=run,
    requires=("quantized_tuned",),
    ensures=("folded",),
    removes=("tapped", "sparse", "quantized"),
    preserves=1e-5,
)
