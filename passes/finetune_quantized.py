"""finetune_quantized: sparse-distillation-aware QAT (Algorithm 1, lines 19-35).

Needs `quantized` and `sparse_tuned`. The teacher is the graph without its fake-quantizers (M_SF);
weights and scale factors train together, masks stay frozen, and each tap's loss is weighted by
W_j. Guarantees `quantized_tuned`.
"""

from __future__ import annotations

from gpusq_compile.compilation import Compilation
from gpusq_compile.finetune.loop import skip_reason, skipped, train
from gpusq_compile.finetune.taps import taps_of
from gpusq_compile.language.training import QuantizePhase
from gpusq_compile.pass_base import Pass, PassResult
from gpusq_compile.quantization.fake_quantize import FakeQuantize
from gpusq_compile.remarks import analysis, passed


def run(compilation: Compilation) -> PassResult:
    result = PassResult(matched=1)
    graph_module = compilation.ir
    phase = compilation.rules.finetune.quantize
    reason = skip_reason(compilation, "quantize", FakeQuantize)
    if reason is not None:
        result.skipped = 1
        result.remarks.append(analysis("finetune-skipped", reason))
        compilation.finetune["quantize"] = {**skipped(reason), "tap_weights": {}}
        return result
    assert isinstance(phase, QuantizePhase)
    weights = compilation.tap_weights or []
    teacher = compilation.sparse_teacher
    assert teacher is not None
    report = train(compilation, teacher, phase, name="quantize", tap_weights=weights)
    names = [tap.name for tap in taps_of(graph_module)]
    compilation.finetune["quantize"] = {
        **report.as_dict(),
        "tap_weights": dict(zip(names, weights, strict=True)),
    }
    compilation.sparse_teacher = None
    result.changed = 1
    result.remarks += report.remarks
    result.remarks.append(
        passed("finetuned", f"{report.steps} steps, stopped by {report.stopped_by}")
    )
    return result


PASS = Pass(
    name="finetune_quantized",
    summary="distil the sparse model into the sparse quantized one, scales learned",
    run=run,
    requires=("quantized", "sparse_tuned"),
    ensures=("quantized_tuned",),
)
