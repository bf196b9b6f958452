"""Fake-quantizers on what the two products of an attention multiply."""

from __future__ import annotations

import torch
import torch.fx

from gpusq_compile.attention_plan import ATTENTION_PLAN, planned_attentions
from gpusq_compile.graph.attention import attention_at, operands, unmoved
from gpusq_compile.graph.edit import insert_behind, insert_module_call, inserted_path
from gpusq_compile.pass_base import PassResult
from gpusq_compile.quantization.fake_quantize import ACTIVATION_RANGES, FakeQuantize
from gpusq_compile.remarks import passed


def quantize_attentions(
    graph_module: torch.fx.GraphModule, scale_dtype: torch.dtype, result: PassResult
) -> dict[str, FakeQuantize]:
    """Insert what the attentions' plans ask for; the new quantizers by what a person calls them.

    One scale per tensor. A factor whose elements are quantized to INT8 already, as those behind a
    QKV layer with an INT8 output are, gets no second quantizer: rounding again would only lose.
    """
    graph = graph_module.graph
    inserted: dict[str, FakeQuantize] = {}
    for node, plan in list(planned_attentions(graph)):
        if plan.quantize is None:
            continue
        result.matched += 1
        grid = ACTIVATION_RANGES[plan.quantize.activation]
        shared = []
        for what, product, index in operands(attention_at(node)):
            source = product.args[index]
            assert isinstance(source, torch.fx.Node)
            if is_quantized(graph_module, source):
                shared.append(what)
                continue
            module = FakeQuantize(grid, channels=None, scale_dtype=scale_dtype)
            path = inserted_path("attention", f"{plan.name}.{what}")
            quantized = insert_module_call(graph_module, path, module, source, before=product)
            arguments = list(product.args)
            arguments[index] = quantized
            product.args = tuple(arguments)
            inserted[f"{plan.name} ({what})"] = module
        plan = plan.apply(activation=plan.quantize.activation)
        if plan.quantize is not None and plan.quantize.output != "none":
            output = ACTIVATION_RANGES[plan.quantize.output]
            module = FakeQuantize(output, channels=None, scale_dtype=scale_dtype)
            path = inserted_path("attention", f"{plan.name}.output")
            insert_behind(graph_module, path, module, node)
            inserted[f"{plan.name} (output)"] = module
            plan = plan.apply(output=plan.quantize.output)
        node.meta[ATTENTION_PLAN] = plan
        result.changed += 1
        text = f"attention {plan.applied.activation}"
        if shared:
            text += f"; {', '.join(shared)} with the quantizer of the layer before"
        result.remarks.append(passed("quantized", text, plan.name))
    return inserted


def is_quantized(graph_module: torch.fx.GraphModule, node: torch.fx.Node) -> bool:
    """Whether a node's elements are those of an INT8 fake-quantizer, moved."""
    source = unmoved(node)
    if source.op != "call_module":
        return False
    module = graph_module.get_submodule(str(source.target))
    return isinstance(module, FakeQuantize) and module.grid == ACTIVATION_RANGES["int8"]
