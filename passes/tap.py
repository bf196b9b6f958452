"""tap: attach a distillation tap at each critical layer that the rules named.

Needs `marked`. Inserts an identity `Tap` module behind the node, through which the fine-tune
reads the feature maps of Algorithm 1, lines 4 and 21. Guarantees `tapped`.
"""

from __future__ import annotations

from gpusq_compile.compilation import Compilation
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
