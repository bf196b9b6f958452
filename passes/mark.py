"""mark: decide by the rules what happens to each operator, and write it into the graph.

Needs `graph` and `canonical`. Finds roles, offers every linear, convolution, normalization,
residual add and attention to the rules, and checks whether the shapes allow what they ask. Changes
no operator: it writes a `LayerPlan` on weighted operators, an `AttentionPlan` on attentions and a
`TapPlan` on nodes to distill at.
Guarantees `marked`: every later pass reads plans and never the rules.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
import torch.fx

from gpusq_compile.attention_plan import ATTENTION_PLAN, plan_attention, planned_attentions
from gpusq_compile.compilation import Compilation
from gpusq_compile.data import require_calibration_data, require_train_data
from gpusq_compile.engine.sparse_causes import sparse_int8_writes_floats
from gpusq_compile.execution import (
    Precision,
    execution,
    intended,
    misses_int4_hardware,
    takes_sparse_kernels,
    treatment,
)
from gpusq_compile.graph.query import (
    WEIGHTED_OPS,
    is_weighted,
    static_shape,
)
from gpusq_compile.language.matching import (
    Decision,
    decide,
    matches,
    why_unmatched,
)
from gpusq_compile.language.schema import BLOCK_SIZES, Distill, Quantize, Sparsity
from gpusq_compile.offers import Offer, collect
from gpusq_compile.pass_base import Pass, PassResult
from gpusq_compile.plan import TAP_PLAN, LayerPlan, TapPlan, Treatment, planned, update_plan
from gpusq_compile.remarks import Kind, Remark, analysis, missed, passed
from gpusq_compile.second_moments import looks_at_inputs
from gpusq_compile.sparsity import PATTERNS, REDUCTION_AXIS

STAGE_END = "stage_end"


def run(compilation: Compilation) -> PassResult:
    offers = collect(compilation.ir, compilation.rules, compilation.parameters.tied)
    decisions = decide(compilation.rules, [offer.candidate for offer in offers])
    result = PassResult()
    for warning in decisions.warnings:
        compilation.console.warn(str(warning))
        result.remarks.append(analysis(warning.code, str(warning)))
    tapped: list[tuple[Offer, Decision, Distill]] = []
    for offer, decision in zip(offers, decisions.decisions, strict=True):
        if decision.distill is not None:
            tapped.append((offer, decision, decision.distill))
        if offer.weight is None and not is_weighted(offer.node):
            continue
        update_plan(offer.node, make_plan(offer, decision, compilation.targets))
    result.remarks += agree_on_shared_weights(compilation.ir.graph)
    for _, plan in planned(compilation.ir.graph):
        if plan.requested == Treatment():
            continue
        result.matched += 1
        wanted = plan.sparsity or plan.quantize
        result.changed += bool(wanted)
        result.skipped += not wanted
        for reason in plan.reasons:
            result.remarks.append(missed("refused", reason, plan.name))
    mark_attentions(offers, decisions.decisions, result)
    for remark in (unweighted := weightless(offers, decisions.decisions)):
        if remark.kind is Kind.MISSED:
            compilation.console.warn(remark.reason)
    result.remarks += unweighted
    if not result.changed:
        text = "the rules change no layer of this model" + unmatched_rules(compilation, offers)
        compilation.console.warn(text)
        result.remarks.append(missed("nothing-marked", text))
    plans = [plan for _, plan in planned(compilation.ir.graph)]
    result.remarks += block_remarks(plans)
    precision = compilation.rules.target.precision
    result.remarks += pattern_remarks(plans, precision, compilation.targets)
    for offer, decision, distill in thin_out(tapped):
        role = offer.roles[0] if offer.roles else offer.candidate.op
        rules = tuple(str(hit) for hit in decision.chain)
        offer.node.meta[TAP_PLAN] = TapPlan(offer.candidate.name, role, distill, rules)
        result.matched += 1
        result.changed += 1
        text = f"distill at {tap_place(offer, offers)}"
        result.remarks.append(passed("tap-marked", text, offer.candidate.name))
    if not compilation.options.dry_run:
        require_data(compilation)
    return result


def unmatched_rules(compilation: Compilation, offers: Sequence[Offer]) -> str:
    """Why the rules that would change layers match none, as the end of a sentence."""
    candidates = [offer.candidate for offer in offers]
    found = [
        why_unmatched(located.rule, candidates)[0]
        for located in compilation.rules.rules
        if {located.rule.sparsity, located.rule.quantize} - {None, "none"}
        and not any(matches(located.rule.match, candidate) for candidate in candidates)
    ]
    return f": {found[0]}" if found else ""


def tap_place(offer: Offer, offers: Sequence[Offer]) -> str:
    """What a tap sees: its role, of a stage's end also which stage, and the feature map."""
    role = offer.roles[0] if offer.roles else offer.candidate.op
    if role == STAGE_END:
        ends = [other.node for other in offers if STAGE_END in other.roles]
        role = f"end of stage {ends.index(offer.node) + 1} of {len(ends)}"
    shape = list(static_shape(offer.node) or ())
    # The batch is the first size that is not fixed: sequences may come first.
    batch = shape.index(None) if None in shape else 0
    del shape[batch : batch + 1]
    sizes = ["any" if size is None else str(size) for size in shape]
    if len(sizes) == 2:
        return f"{role}: {sizes[0]} tokens of {sizes[1]}"
    return f"{role}: {'x'.join(sizes)}" if sizes else role


def mark_attentions(
    offers: Sequence[Offer], decisions: Sequence[Decision], result: PassResult
) -> None:
    """Plan the attentions, once it is known how what reads them is quantized."""
    for offer, decision in zip(offers, decisions, strict=True):
        if offer.attention is None:
            continue
        plan = plan_attention(offer.candidate.name, offer.attention, decision)
        offer.node.meta[ATTENTION_PLAN] = plan
        if plan.requested == Treatment() and not plan.reasons:
            continue
        result.matched += 1
        result.changed += plan.quantize is not None
        result.skipped += plan.quantize is None
        result.remarks += [missed("refused", reason, plan.name) for reason in plan.reasons]


def weightless(offers: Sequence[Offer], decisions: Sequence[Decision]) -> list[Remark]:
    """A remark for each rule and kind of operator that it asks to compress and that has no weight.

    Of a rule that also reaches operators with weights it is a note: a broad match means those. An
    attention has no weight either, but factors that can be quantized.
    """
    reached: dict[str, set[str]] = {}
    names: dict[tuple[str, str, str], list[str]] = {}
    for offer, decision in zip(offers, decisions, strict=True):
        for hit in decision.chain:
            reached.setdefault(hit.rule, set()).add(offer.candidate.op)
            for action in set(hit.actions) - set(hit.overridden) - {"distill"}:
                if not is_weighted(offer.node) and asks_for_weight(offer, decision, action):
                    key = (hit.rule, action, offer.candidate.op)
                    names.setdefault(key, []).append(offer.candidate.name)
    remarks = []
    for (rule, action, op), found in sorted(names.items()):
        factors = op == "attention" and action == "quantize"
        text = (
            f"rule '{rule}' asks for {action} on {len(found)} {op} operator"
            f"{'s, which have' if len(found) > 1 else ', which has'} no weight"
            + (": only activations are quantized there" if factors else ": nothing is done there")
        )
        kind = analysis if reached[rule] & WEIGHTED_OPS else missed
        remarks.append(kind("no-weight", text, found[0] if len(found) == 1 else None))
    return remarks


def asks_for_weight(offer: Offer, decision: Decision, action: str) -> bool:
    """Whether an action that a rule gives an operator says something about its weight."""
    quantize = decision.quantize
    if offer.attention is None or action != "quantize" or quantize is None:
        return getattr(decision, action) is not None
    return quantize.weight != "none" or quantize.split or quantize.smooth is not None


def require_data(compilation: Compilation) -> None:
    """Raise InputError now, not after minutes of work, for data that the plans need."""
    plans = [plan for _, plan in planned(compilation.ir.graph)]
    wanted = [plan.quantize for plan in plans]
    wanted += [plan.quantize for _, plan in planned_attentions(compilation.ir.graph)]
    blocks = [block for block in wanted if block is not None]
    settings = compilation.rules.finetune
    if compilation.options.finetune:
        if settings.sparse != "none" and any(plan.sparsity for plan in plans):
            require_train_data(compilation.source, "sparse")
        if settings.quantize != "none" and blocks:
            require_train_data(compilation.source, "quantize")
    if any(block.activation != "none" or block.output != "none" for block in blocks):
        require_calibration_data(compilation.source)
    for what in sorted(looking_at_inputs(plans)):
        require_calibration_data(compilation.source, looks_at_inputs(what))


def looking_at_inputs(plans: Sequence[LayerPlan]) -> set[str]:
    """What the rules ask for that is computed from the layers' inputs, activation scales apart."""
    methods = {plan.sparsity.method for plan in plans if plan.sparsity} - {"magnitude"}
    found = {f"sparsity method {method}" for method in methods}
    blocks = [plan.quantize for plan in plans if plan.quantize]
    found |= {"rounding gptq" for block in blocks if block.rounding == "gptq"}
    return found | {"smooth" for block in blocks if block.smooth is not None}


def agree_on_shared_weights(graph: torch.fx.Graph) -> list[Remark]:
    """Leave a weight as it is that its readers are to have in different forms, and say why.

    Of one that they agree on, the remark says who they are.
    """
    readers: dict[str, list[tuple[torch.fx.Node, LayerPlan]]] = {}
    for node, plan in planned(graph):
        readers.setdefault(plan.weight, []).append((node, plan))
    remarks = []
    for weight, plans in readers.items():
        asked = any(plan.sparsity or plan.quantize for _, plan in plans)
        if not weight or len(plans) == 1 or not asked:
            continue
        names = ", ".join(plan.name for _, plan in plans)
        if len({weight_form(plan) for _, plan in plans}) == 1:
            text = f"{names} read one weight: it has one mask, one scale and one place in the files"
            remarks.append(analysis("shared-weight", text, plans[0][1].name))
            continue
        for node, plan in plans:
            text = f"{names} read the weight {weight}, and the rules ask for different forms of it"
            if plan.sparsity or plan.quantize:
                update_plan(node, replace(plan.refuse(text), sparsity=None, quantize=None))
    return remarks


def weight_form(plan: LayerPlan) -> tuple[object, ...]:
    """What a plan does to the weight, as opposed to what goes in and comes out."""
    quantize = plan.quantize
    stored = None
    if quantize is not None and quantize.weight != "none":
        stored = (quantize.weight, quantize.block, quantize.rounding)
    return plan.sparsity, stored


def make_plan(offer: Offer, decision: Decision, compute: Sequence[str]) -> LayerPlan:
    """The plan of a weighted operator, with what its shape does not allow refused."""
    sparsity = decision.sparsity
    misfit = pattern_refusal(offer, sparsity) if offer.refusal is None else offer.refusal
    quantize = settled_output(decision.quantize, None if misfit else sparsity, compute)
    plan = LayerPlan(
        name=offer.candidate.name,
        op=offer.candidate.op,
        roles=offer.roles,
        weight=offer.weight or "",
        shape=offer.shape,
        sparsity=sparsity,
        quantize=quantize,
        requested=treatment(sparsity, quantize),
        rules=tuple(str(hit) for hit in decision.chain),
        module=offer.candidate.module_class,
    )
    if plan.requested == Treatment():
        return plan
    if offer.refusal is not None:
        return replace(plan.refuse(offer.refusal), sparsity=None, quantize=None)
    if misfit is not None:
        plan = replace(plan.refuse(misfit), sparsity=None)
    if quantize is not None and (unfit := block_refusal(offer, quantize)) is not None:
        plan = replace(plan.refuse(unfit), quantize=None)
    return plan


def pattern_refusal(offer: Offer, sparsity: Sparsity | None) -> str | None:
    """Why a weight cannot have a pattern."""
    if sparsity is None:
        return None
    group = PATTERNS[sparsity.pattern].group
    size = offer.shape[REDUCTION_AXIS]
    if size % group == 0:
        return None
    return f"{sparsity.pattern} needs a reduction axis that is a multiple of {group}, found {size}"


def block_refusal(offer: Offer, quantize: Quantize) -> str | None:
    """Why a weight cannot have one scale for each block of its input channels."""
    if quantize.block is None:
        return None
    if offer.candidate.op != "linear":
        return (
            f"blocks of {quantize.block}: TensorRT's kernels with INT4 weights are GEMMs, and none "
            "is a convolution"
        )
    size = offer.shape[REDUCTION_AXIS]
    if size % quantize.block == 0:
        return None
    others = [block for block in BLOCK_SIZES if block != quantize.block]
    fitting = " or ".join(str(block) for block in others if size % block == 0)
    advice = f"blocks of {fitting} do" if fitting else f"nor do blocks of {others[0]}"
    return f"blocks of {quantize.block} do not divide its {size} input channels; {advice}"


def settled_output(
    quantize: Quantize | None, sparsity: Sparsity | None, compute: Sequence[str]
) -> Quantize | None:
    """The block with `output: auto` replaced by the type that sparse INT8 kernels need.

    Of TensorRT's kernels, those of compute capability 9.0 also write FP16 from sparse INT8
    operands; for all others a float output means a dense kernel.
    """
    if quantize is None or quantize.output != "auto":
        return quantize
    integer = "none" not in (quantize.weight, quantize.activation)
    sparse = integer and sparsity is not None and takes_sparse_kernels(sparsity.pattern)
    needed = sparse and not sparse_int8_writes_floats(compute)
    return quantize.model_copy(update={"output": "int8" if needed else "none"})


def block_remarks(plans: Sequence[LayerPlan]) -> list[Remark]:
    """A remark for each weight that is one block, which gains nothing in an engine."""
    text = (
        "one block is the whole of its input channels: TensorRT makes such a weight float ahead of "
        "the GEMM, and reads 4 bits in the GEMM's own kernel only from two blocks on"
    )
    return [
        analysis("single-block", text, plan.name)
        for plan in plans
        if plan.quantize is not None and plan.quantize.block == plan.shape[REDUCTION_AXIS]
    ]


def pattern_remarks(
    plans: Sequence[LayerPlan], precision: Precision, targets: Sequence[str]
) -> list[Remark]:
    """A remark for each layer whose pattern serves less hardware than its types might have.

    What was refused of a request does not count.
    """
    remarks = []
    for plan in plans:
        if plan.sparsity is None:
            continue
        planned_layer = intended(plan)
        kind, why = execution(planned_layer, precision, targets)
        if not kind.startswith("sparse"):
            text = f"no sparse kernel runs its {plan.sparsity.pattern} mask ({kind}): {why}"
            remarks.append(analysis("no-sparse-kernel", text, plan.name))
        elif misses_int4_hardware(planned_layer.applied):
            remarks.append(analysis("no-sparse-int4", why, plan.name))
    return remarks


def thin_out(
    tapped: list[tuple[Offer, Decision, Distill]],
) -> list[tuple[Offer, Decision, Distill]]:
    """Apply `every: n`: of the nodes with one distill block keep each n-th, and always the last."""
    kept = []
    for offer, decision, distill in tapped:
        group = [item for item in tapped if item[2] == distill]
        position = next(i for i, item in enumerate(group) if item[0] is offer)
        if (position + 1) % distill.every == 0 or position == len(group) - 1:
            kept.append((offer, decision, distill))
    return kept


PASS = Pass(
    name="mark",
    summary="match the rules and write each operator's plan",
    run=run,
    requires=("graph", "canonical"),
    ensures=("marked",),
    preserves=1e-6,
)
