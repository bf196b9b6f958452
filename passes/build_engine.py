"""build_engine: build TensorRT engines and read from the builder's log what each layer became.

Needs `verified`. Guarantees `engine` when an engine was asked for and could be built; with
`--engine auto` a machine without a builder gets a remark, never a silent skip.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from gpusq_compile.attention_plan import planned_attentions
from gpusq_compile.compilation import Compilation
from gpusq_compile.engine import (
    AttentionInEngine,
    MarkedAttention,
    MarkedGemm,
    build_engines,
)
from gpusq_compile.execution import Precision, execution
from gpusq_compile.lowering.runtime import at_its_line
from gpusq_compile.pass_base import Pass, PassResult
from gpusq_compile.passes.verify_onnx import MODEL_FILE
from gpusq_compile.plan import LayerPlan, Treatment, planned
from gpusq_compile.remarks import Remark, analysis, missed, passed

WAY_OUT = (
    "--scope PATH compiles a submodule without it; or write that line with operators that the "
    "engine has; --engine none stops at the verified ONNX file"
)


def run(compilation: Compilation) -> PassResult:
    gemms = marked_gemms(
        [plan for _, plan in planned(compilation.ir.graph)],
        compilation.rules.target.precision,
        compilation.targets,
    )
    attentions = [
        MarkedAttention(plan.name)
        for _, plan in planned_attentions(compilation.ir.graph)
        if plan.applied.activation is not None
    ]
    with (
        compilation.console.progress("engine (percent)", 100) as advance,
        at_its_line(compilation.onnx_places, WAY_OUT),
    ):
        report = build_engines(
            compilation.workdir / MODEL_FILE,
            compilation.workdir,
            backend=compilation.options.engine,
            targets=compilation.targets,
            gemms=gemms,
            attentions=attentions,
            batch=compilation.engine_batch,
            progress=lambda target, phase, done: advance(f"{target}: {phase}", to=100 * done),
        )
    compilation.engine = report
    marked = len(gemms) + len(attentions)
    result = PassResult(matched=marked, changed=len(report.targets))
    result.remarks += [analysis("engine", text) for text in report.remarks]
    if compilation.options.engine == "none":
        result.remarks.append(analysis("no-engine", "no engine was asked for (--engine none)"))
    for target, engine in report.targets.items():
        right = sum(gemm.status == "passed" for gemm in engine.gemms)
        result.remarks.append(
            passed("engine-built", f"{target}: {right} of {len(gemms)} GEMMs in the planned type")
        )
        result.remarks += attention_remarks(target, engine.attentions)
        for gemm in engine.gemms:
            if gemm.status == "missed":
                types = f"{gemm.actual} instead of {gemm.expected}: "
                text = f"{target}: {types if gemm.actual != gemm.expected else ''}{gemm.reason}"
                result.remarks.append(missed("engine-type", text, gemm.name))
            elif gemm.status == "unknown":
                text = f"{target}: the builder's log does not tell its type: {gemm.reason}"
                result.remarks.append(missed("engine-type-unknown", text, gemm.name))
    if not report.targets:
        result.skipped = marked
    return result


def attention_remarks(target: str, attentions: Sequence[AttentionInEngine]) -> list[Remark]:
    """How many attentions are fused in INT8, and why the others are not."""
    if not attentions:
        return []
    fused = sum(attention.status == "passed" for attention in attentions)
    text = f"{target}: {fused} of {len(attentions)} attentions fused in INT8"
    remarks = [passed("engine-attention", text)]
    for attention in attentions:
        if attention.status != "passed":
            code = {"missed": "engine-type", "unknown": "engine-type-unknown"}[attention.status]
            text = f"{target}: {attention.actual} instead of {attention.expected}"
            remarks.append(missed(code, f"{text}: {attention.reason}", attention.name))
    return remarks


def marked_gemms(
    plans: Sequence[LayerPlan], precision: Precision, targets: Sequence[str]
) -> list[MarkedGemm]:
    """What the engine should do with each layer that was changed.

    A layer counts as sparse where one of the targets has sparse kernels for it. INT4 weights in
    blocks under float activations reach the GEMM's kernel in 4 bits, and only there become the
    target's float type.
    """
    gemms = []
    for plan in plans:
        if plan.applied == Treatment():
            continue
        kinds = [execution(plan, precision, [target]).kind for target in targets]
        kind = next((kind for kind in kinds if kind.startswith("sparse")), kinds[0])
        integer = kind in ("sparse int8", "dense int8")
        expected: Literal["int8", "fp16", "fp32"] = "int8" if integer else precision
        weight: Literal["int4"] | None = "int4" if kind == "weight-only int4" else None
        gemms.append(MarkedGemm(plan.name, expected, kind.startswith("sparse"), weight))
    return gemms


PASS = Pass(
    name="build_engine",
    summary="build TensorRT engines and read back each layer's type",
    run=run,
    requires=("verified",),
    ensures=("engine",),
)
