"""sparsify: put a fixed mask between each marked weight and its operator.

Needs `marked` and `tapped`. Keeps a copy of the dense graph where a later pass learns from it,
chooses the mask from the dense weight (`method: magnitude` keeps the largest of
each group), inserts a `Mask` module, and leaves the stored weight dense: it is the teacher's.
Guarantees `sparse`: every plan with a sparsity has its mask in the graph.
"""

from __future__ import annotations

from gpusq_compile.compilation import Compilation
from gpusq_compile.finetune.teacher import frozen_copy, needs_dense_teacher
from gpusq_compile.graph.edit import finish, insert_module_call, inserted_path
from gpusq_compile.graph.query import tensor_attribute, weight_source
from gpusq_compile.pass_base import Pass, PassResult
from gpusq_compile.plan import planned, update_plan
from gpusq_compile.remarks import passed
from gpusq_compile.sparsity import PATTERNS, Mask, magnitude_mask


def run(compilation: Compilation) -> PassResult:
    graph_module = compilation.ir
    result = PassResult()
    if needs_dense_teacher(compilation):
        compilation.dense_teacher = frozen_copy(graph_module)
    for node, plan in list(planned(graph_module.graph)):
        if plan.sparsity is None:
            continue
        result.matched += 1
        source = weight_source(node)
        assert source is not None
        weight = tensor_attribute(graph_module, plan.weight).detach()
        mask = magnitude_mask(weight, PATTERNS[plan.sparsity.pattern])
        masked = insert_module_call(
            graph_module, inserted_path("mask", plan.name), Mask(mask), source, before=node
        )
        node.replace_input_with(source, masked)
        update_plan(node, plan.apply(sparsity=plan.sparsity.pattern))
        energy = float((weight * mask).square().sum() / weight.square().sum().clamp_min(1e-30))
        result.changed += 1
        result.remarks.append(
            passed(
                "sparsified", f"{plan.sparsity.pattern} keeps {energy:.1%} of the energy", plan.name
            )
        )
    finish(graph_module)
    return result


PASS = Pass(
    name="sparsify",
    summary="mask marked weights in their pattern along the reduction axis",
    run=run,
    requires=("marked", "tapped"),
    ensures=("sparse",),
    forbids={"quantized": "scales come from the weights that are left, so pruning comes first"},
)
