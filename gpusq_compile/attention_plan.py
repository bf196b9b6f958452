"""The plan of one attention: what the rules asked for, what was applied, and why not the rest.

An attention has no weight of its own: what can be quantized are the factors of its two products.
The mark pass writes one `AttentionPlan` into `node.meta` of the node that gives its output.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import torch.fx

from gpusq_compile.graph.attention import Attention, AttentionSizes, moved_readers
from gpusq_compile.graph.channels import name_of
from gpusq_compile.graph.query import input_dependent
from gpusq_compile.language.matching import Decision
from gpusq_compile.language.schema import Quantize
from gpusq_compile.lowering.fused_attention import unfused
from gpusq_compile.plan import PLAN, LayerPlan, Treatment

ATTENTION_PLAN = "attention_plan"
UNTREATED = Treatment()


@dataclass(frozen=True)
class AttentionPlan:
    """The plan of one attention.

    `applied.activation` is the type of queries, keys, values and softmax output, `applied.output`
    that of the quantizer that was put behind it.
    """

    name: str
    sizes: AttentionSizes
    biased: bool
    quantize: Quantize | None = None
    requested: Treatment = UNTREATED
    applied: Treatment = UNTREATED
    reasons: tuple[str, ...] = ()
    rules: tuple[str, ...] = ()

    def refuse(self, reason: str) -> AttentionPlan:
        return replace(self, reasons=(*self.reasons, reason))

    def apply(self, **treatment: str | None) -> AttentionPlan:
        return replace(self, applied=replace(self.applied, **treatment))


def planned_attentions(graph: torch.fx.Graph) -> Iterator[tuple[torch.fx.Node, AttentionPlan]]:
    """Every node that carries an attention's plan, in graph order."""
    for node in graph.nodes:
        plan = node.meta.get(ATTENTION_PLAN)
        if plan is not None:
            yield node, plan


def plan_attention(name: str, attention: Attention, decision: Decision) -> AttentionPlan:
    """The plan of an attention, given the plans of all layers with weights.

    `output: auto` is settled: what reads the attention may quantize it already.
    """
    plan = AttentionPlan(
        name=name,
        sizes=attention.sizes,
        biased=attention.biased,
        rules=tuple(str(hit) for hit in decision.chain),
    )
    quantize = decision.quantize
    if quantize is None:
        return plan
    float_reader = next(iter(_float_readers(attention.node)), None)
    output = quantize.output
    if output == "auto":
        output = "none" if float_reader is None else "int8"
    types = {"activation": quantize.activation, "output": output}
    asked = {what: name for what, name in types.items() if name != "none"}
    plan = replace(plan, requested=Treatment(**asked))
    if not asked:
        return plan
    if (reason := _refusal(attention, types, float_reader)) is not None:
        return plan.refuse(reason)
    settled = quantize.model_copy(update={"output": output})
    return replace(plan, quantize=settled)


def _refusal(
    attention: Attention, types: Mapping[str, str], float_reader: str | None
) -> str | None:
    """Why an attention of which something is asked stays in float; None where it need not."""
    if types["activation"] == "none":
        return "INT8 attention needs INT8 queries, keys and values, and activation is none"
    if "int4" in types.values():
        return "INT4 attention is not known to any engine; activation and output may be int8"
    if attention.obstacle is not None:
        return attention.obstacle
    if attention.node not in input_dependent(attention.node.graph):
        return "its inputs are constants, so it runs once, when the engine is built"
    reason = unfused(attention.sizes)
    if reason is None and types["output"] == "none" and float_reader is not None:
        reason = (
            f"{float_reader} reads its output in float, and TensorRT fuses INT8 attention with an "
            "INT8 output alone: quantize what reads it, or write output: auto"
        )
    return reason


def _float_readers(node: torch.fx.Node) -> list[str]:
    """Those that read the output of a node otherwise than through an INT8 quantizer."""
    return [
        name_of(reader)
        for reader, source in moved_readers(node)
        if not (reader.args[0] is source and _quantizes_input(reader.meta.get(PLAN)))
    ]


def _quantizes_input(plan: LayerPlan | None) -> bool:
    block = None if plan is None else plan.quantize
    return block is not None and block.activation == "int8"
