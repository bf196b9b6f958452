"""tap: attach a distillation tap at each critical layer that the rules named, and find decisions.

Needs `marked`. Inserts an identity `Tap` module behind the node, through which the fine-tune
reads the feature maps of Algorithm 1, lines 4 and 21. Behind each discrete decision of the model it
inserts a `Decision`, through which the student takes it over from the teacher. Guarantees `tapped`.
"""

from __future__ import annotations

from gpusq_compile.compilation import Compilation
from gpusq_compile.finetune.decisions import Decision, find_decisions
from gpusq_compile.finetune.taps import Tap
from gpusq_compile.graph.edit import finish, insert_behind, inserted_path
from gpusq_compile.pass_base import Pass, PassResult
from gpusq_compile.plan import TAP_PLAN, TapPlan
from gpusq_compile.remarks import analysis, missed, passed


def run(compilation: Compilation) -> PassResult:
    graph_module = compilation.ir
    result = PassResult()
    for node in list(graph_module.graph.nodes):
        plan = node.meta.get(TAP_PLAN)
        if not isinstance(plan, TapPlan):
            continue
        result.matched += 1
        module = Tap(plan.name, plan.role, plan.distill.theta)
        insert_behind(graph_module, inserted_path("tap", plan.name), module, node)
        result.changed += 1
        result.remarks.append(
            passed("tapped", f"{plan.role}, theta {plan.distill.theta}", plan.name)
        )
    if result.matched == 0:
        # Without a fine-tune nobody misses them.
        note = missed if compilation.options.finetune else analysis
        result.remarks.append(note("no-taps", "no rule names a layer to distill at"))
    settings = compilation.rules.finetune
    trains = compilation.options.finetune and {settings.sparse, settings.quantize} != {"none"}
    if trains and settings.decisions == "teacher":
        for name, node in find_decisions(graph_module.graph):
            insert_behind(graph_module, inserted_path("decision", name), Decision(name), node)
            result.matched += 1
            result.changed += 1
            text = "in the fine-tune the student computes with the teacher's decision"
            result.remarks.append(passed("decision-shared", text, name))
    finish(graph_module)
    return result


PASS = Pass(
    name="tap",
    summary="attach distillation taps at the critical layers",
    run=run,
    requires=("marked",),
    ensures=("tapped",),
    forbids={"sparse": "the dense teacher is copied before pruning, and has to carry the taps too"},
    preserves=1e-6,
)
