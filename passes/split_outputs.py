"""split_outputs: one GEMM per part where a layer's output is cut into equal parts.

Needs `folded`. TensorRT computes an INT8 GEMM whose float output is cut (a fused QKV) in FP16,
without a word. Where the rules say `split: true`, such a layer becomes one linear per part on the
same quantized input, and TensorRT fuses these into one INT8 GEMM. Rows of weight, scales and bias
go to their part as they are; what lies between the GEMM and the cut is done on each part. A layer
that cannot be split stays whole, with the reason.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import torch
import torch.fx

from gpusq_compile.compilation import Compilation
from gpusq_compile.graph.cuts import NotCut, find_cut, repeat_steps
from gpusq_compile.graph.edit import (
    finish,
    insert_call,
    insert_get_attr,
    inserted_path,
    remove_tensor,
    store_buffer,
)
from gpusq_compile.graph.query import aten, op_of, tensor_attribute
from gpusq_compile.pass_base import Pass, PassResult
from gpusq_compile.plan import LayerPlan, Part, planned, update_plan
from gpusq_compile.quantization.operators import DEQUANTIZE, QUANTIZE
from gpusq_compile.remarks import missed, passed


def run(compilation: Compilation) -> PassResult:
    graph_module = compilation.ir
    result = PassResult()
    weights = Counter(plan.weight for _, plan in planned(graph_module.graph))
    for node, plan in list(planned(graph_module.graph)):
        if plan.quantize is None or not plan.quantize.split:
            continue
        result.matched += 1
        try:
            if weights[plan.weight] > 1:
                raise NotCut("other layers read its weight too")
            parts = split(graph_module, node, plan)
        except NotCut as reason:
            text = f"not split: {reason}"
            update_plan(node, plan.refuse(text))
            result.skipped += 1
            result.remarks.append(missed("not-split", text, plan.name))
            continue
        result.changed += 1
        result.remarks.append(passed("split", f"one GEMM for each of {parts} parts", plan.name))
    finish(graph_module)
    return result


def split(graph_module: torch.fx.GraphModule, node: torch.fx.Node, plan: LayerPlan) -> int:
    """Replace a linear by one per part of its output; the number of parts.

    Raises:
        NotCut: its output is not cut into equal parts.
    """
    if op_of(node) != "linear":
        raise NotCut("only the output of a linear is cut into parts")
    bias = node.args[2] if len(node.args) > 2 else None
    if isinstance(bias, torch.fx.Node) and bias.op != "get_attr":
        raise NotCut("its bias is computed in the graph")
    tail = output_quantizer(node)
    cut = find_cut(tail[-1] if tail else node)
    graph = graph_module.graph
    whole = stored_inputs(node)
    for index, rows in enumerate(cut.rows):
        with graph.inserting_before(node):
            part = linear_of_rows(graph_module, node, plan, rows, index)
        value = part
        with graph.inserting_before(cut.place):
            for link in tail:
                value = insert_call(graph, link.target, (value, *link.args[1:]), provenance=link)
            repeat_steps(graph, cut, index, value)
        if not part.users:
            graph.erase_node(part)
    graph.eliminate_dead_code()
    read = {str(other.target) for other in graph.nodes if other.op == "get_attr"}
    for path in whole - read:
        remove_tensor(graph_module, path)
    return len(cut.rows)


def output_quantizer(node: torch.fx.Node) -> list[torch.fx.Node]:
    """The operators of a folded output quantizer behind a GEMM, in order; none without one."""
    found = []
    while len(node.users) == 1:
        node = next(iter(node.users))
        if node.target not in (aten.clamp.default, QUANTIZE, DEQUANTIZE):
            break
        found.append(node)
    quantized = found and found[-1].target is DEQUANTIZE
    return found if quantized else []


def stored_inputs(node: torch.fx.Node) -> set[str]:
    """The paths of weight, scales and bias that a linear reads."""
    sources = list(node.all_input_nodes[1:])
    sources += [inner for source in sources for inner in source.all_input_nodes]
    return {str(source.target) for source in sources if source.op == "get_attr"}


def linear_of_rows(
    graph_module: torch.fx.GraphModule,
    node: torch.fx.Node,
    plan: LayerPlan,
    rows: torch.Tensor,
    index: int,
) -> torch.fx.Node:
    """The linear that computes some of a layer's output channels, with its own plan."""
    name = f"{plan.name}.part{index}"

    def stored(source: torch.fx.Node, kind: str) -> torch.fx.Node:
        values = tensor_attribute(graph_module, str(source.target)).detach()
        path = inserted_path(kind, name)
        store_buffer(graph_module, path, values[rows.to(values.device)].clone())
        return insert_get_attr(graph_module, path, provenance=source)

    source, weight, *bias = node.args
    assert isinstance(weight, torch.fx.Node)
    if weight.target is DEQUANTIZE:
        levels, scale = weight.args
        assert isinstance(levels, torch.fx.Node)
        assert isinstance(scale, torch.fx.Node)
        own = stored(levels, "weight")
        inputs = (own, stored(scale, "weight_scale"))
        factor = insert_call(node.graph, DEQUANTIZE, inputs, provenance=weight)
    else:
        own = factor = stored(weight, "weight")
    biases = [stored(b, "bias") if isinstance(b, torch.fx.Node) else b for b in bias]
    part = insert_call(node.graph, node.target, (source, factor, *biases), provenance=node)
    part_of = Part(
        rows=tuple(rows.tolist()),
        weight=plan.weight,
        bias=str(bias[0].target) if bias and isinstance(bias[0], torch.fx.Node) else None,
    )
    shape = (len(rows), *plan.shape[1:])
    update_plan(part, replace(plan, name=name, weight=str(own.target), shape=shape, part=part_of))
    return part


PASS = Pass(
    name="split_outputs",
    summary="one GEMM per part of an output that is cut, where the rules ask for it",
    run=run,
    requires=("folded",),
    ensures=("split",),
    preserves=1e-5,
)
