"""finetune_sparse: train the sparse graph towards the dense one (Algorithm 1, lines 2-17).

Needs `sparse` and `tapped`. The dense teacher is the graph without its masks. Afterwards both are
frozen, so the tap weights W_j of the next phase (line 22) are computed here, before the dense
teacher is dropped. Guarantees `sparse_tuned`: masked weights are zero in storage too.
"""

from __future__ import annotations

from gpusq_compile.compilation import Compilation
from gpusq_compile.finetune.loop import skip_reason, skipped, tap_shares, train
from gpusq_compile.finetune.taps import taps_of
from gpusq_compile.finetune.teacher import (
    quantized_phase_follows,
    reconstruction_follows,
    zero_masked_weights,
)
from gpusq_compile.language.training import Phase
from gpusq_compile.pass_base import Pass, PassResult
from gpusq_compile.remarks import analysis, passed
from gpusq_compile.sparsity import Mask


def run(compilation: Compilation) -> PassResult:
    result = PassResult(matched=1)
    settings = compilation.rules.finetune
    phase = settings.sparse
    graph_module = compilation.ir
    next_phase = quantized_phase_follows(compilation)
    reason = skip_reason(compilation, "sparse", Mask)
    dense = compilation.dense_teacher
    zero_masked_weights(graph_module)
    if reason is not None:
        result.skipped = 1
        result.remarks.append(analysis("finetune-skipped", reason))
        compilation.finetune["sparse"] = skipped(reason)
    else:
        assert dense is not None
        assert isinstance(phase, Phase)
        thetas = [tap.theta for tap in taps_of(graph_module)]
        report = train(compilation, dense, phase, name="sparse", tap_weights=thetas)
        compilation.finetune["sparse"] = report.as_dict()
        result.changed = 1
        result.remarks += report.remarks
        result.remarks.append(
            passed("finetuned", f"{report.steps} steps, stopped by {report.stopped_by}")
        )
    if next_phase:
        assert dense is not None
        names = [tap.name for tap in taps_of(graph_module)]
        if settings.tap_weights == "uniform":
            compilation.tap_weights = [1.0 / len(names) for _ in names]
        else:
            compilation.tap_weights = tap_shares(compilation, dense, graph_module)
        shares = ", ".join(
            f"{name} {weight:.3f}"
            for name, weight in zip(names, compilation.tap_weights, strict=True)
        )
        result.remarks.append(analysis("tap-weights", shares or "no taps"))
    if not reconstruction_follows(compilation):
        compilation.dense_teacher = None
    return result


PASS = Pass(
    name="finetune_sparse",
    summary="distil the dense model into the sparse one, masks frozen",
    run=run,
    requires=("sparse", "tapped"),
    ensures=("sparse_tuned",),
    forbids={"quantized": "the sparse model is the float teacher of the quantized one"},
)
