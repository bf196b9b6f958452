"""`report.json`: what was done to each layer, why, and what it cost."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

from gpusq_compile import __version__
from gpusq_compile.attention_plan import AttentionPlan, planned_attentions
from gpusq_compile.compilation import Compilation, PassRecord
from gpusq_compile.compute import compute_figures
from gpusq_compile.engine import AttentionInEngine, BuiltEngine, GemmInEngine
from gpusq_compile.errors import GpusqError
from gpusq_compile.execution import execution, intended
from gpusq_compile.plan import TAP_PLAN, LayerPlan, Treatment, planned
from gpusq_compile.report.packed import packed_storage
from gpusq_compile.report.rule_entries import rule_entries
from gpusq_compile.report.sparse_chain import sparse_chain

InEngine = TypeVar("InEngine", GemmInEngine, AttentionInEngine)

SCHEMA_VERSION = 1
FP32_BYTES = 4
PROGRESS = {"no": 0, "unknown": 1, "yes": 2}
"""How far an answer lets a layer's sparsity get."""


def make_report(
    compilation: Compilation, error: GpusqError | None, model_file: Path
) -> dict[str, Any]:
    """The report of a compilation, finished or stopped by `error`.

    Sizes are in bytes, times in seconds, accuracies in [0, 1]; `metrics` by stage, then by
    the name that the user gave.
    """
    plans = [plan for _, plan in planned(compilation.graph.graph)] if compilation.graph else []
    report: dict[str, Any] = _finite(
        {
            "schema_version": SCHEMA_VERSION,
            "tool": {"name": "gpusq-compile", "version": __version__},
            **outcome(error),
            "model": compilation.source.origin,
            "scope": compilation.network.scope,
            "rules": [str(source) for source in compilation.rules.sources],
            "rule_list": rule_entries(compilation.rules),
            "target": target_entry(compilation),
            "seed": compilation.options.seed,
            "device": compilation.options.device,
            "seconds": round(time.monotonic() - compilation.started, 3),
            "passes": [pass_entry(record) for record in compilation.records],
            "layers": [layer_entry(compilation, plan) for plan in plans],
            "attentions": [
                attention_entry(compilation, plan)
                for _, plan in (
                    planned_attentions(compilation.ir.graph) if compilation.graph else ()
                )
            ],
            "taps": tap_entries(compilation),
            "finetune": compilation.finetune,
            "accuracy": {
                name: compilation.accuracy.get(name)
                for name in ("dense", "sparse", "quantized", "onnx")
            },
            "metrics": compilation.metrics,
            "verify": compilation.verify,
            "storage": storage(compilation, plans, model_file),
            "compute": compute_entry(compilation),
            "engine": compilation.engine.as_dict() if compilation.engine else None,
        }
    )
    return report


def outcome(error: GpusqError | None) -> dict[str, Any]:
    """The entries of the report that say whether the compile succeeded."""
    if error is None:
        return {"status": "ok", "error": None}
    return {"status": "failed", "error": {"code": error.code, "message": error.message}}


def pass_entry(record: PassRecord) -> dict[str, Any]:
    return {
        "name": record.name,
        "matched": record.matched,
        "changed": record.changed,
        "skipped": record.skipped,
        "seconds": round(record.seconds, 4),
        "change": record.change,
        "remarks": [remark.as_dict() for remark in record.remarks],
    }


def layer_entry(compilation: Compilation, plan: LayerPlan) -> dict[str, Any]:
    stored = compilation.stored.get(plan.name)
    settled = plan if "quantized" in compilation.facts else intended(plan)
    kind, why = execution(settled, compilation.rules.target.precision, compilation.targets)
    packed = compilation.packed.layers.get(plan.name) if compilation.packed else None
    entry = {
        "name": plan.name,
        "role": plan.role,
        "roles": list(plan.roles),
        "op": plan.op,
        "module": plan.module,
        "shape": list(plan.shape),
        "requested": plan.requested.as_dict(),
        "applied": plan.applied.as_dict(),
        "reasons": list(plan.reasons),
        "rules": list(plan.rules),
        "mask_ok": stored.mask_ok if stored else None,
        "weight_bytes": stored.weight_bytes if stored else None,
        "packed_bytes": packed.total if packed else None,
        "execution": {"kind": kind, "why": why},
        "engine": engine_entry(compilation, plan.name),
    }
    entry["sparse_kernel"] = shortest_chain(compilation, entry)
    return entry


def shortest_chain(compilation: Compilation, entry: dict[str, Any]) -> dict[str, Any] | None:
    """A layer's chain in the engine where it got least far, whose name comes before the reason
    where there are several; without an engine, as far as the run itself saw."""
    precision = compilation.rules.target.precision
    built = gemm_by_target(compilation, entry["name"])
    if not built:
        return sparse_chain(entry, None, precision=precision, targets=compilation.targets)
    chains = []
    for target, gemm in built.items():
        chain = sparse_chain(entry, gemm, precision=precision, targets=[target])
        if chain is None:
            return None
        if chain["reason"] and len(built) > 1 and "refused" not in chain["causes"]:
            chain["reason"] = f"{target}: {chain['reason']}"
        chains.append(chain)
    return min(chains, key=lambda c: (PROGRESS[c["picked"]], PROGRESS[c["eligible"]]))


def attention_entry(compilation: Compilation, plan: AttentionPlan) -> dict[str, Any]:
    """What was asked of an attention and done to it; its type in each engine by target."""
    found = by_target(compilation, plan.name, lambda engine: engine.attentions)
    first = next(iter(found.values()), None)
    return {
        "name": plan.name,
        **asdict(plan.sizes),
        "biased": plan.biased,
        "requested": plan.requested.as_dict(),
        "planned": plan.quantize is not None,
        "applied": plan.applied.as_dict(),
        "reasons": list(plan.reasons),
        "rules": list(plan.rules),
        "engine": {
            "type": first.actual if first else "unknown",
            "reason": first.reason if first else None,
            "targets": {target: attention.actual for target, attention in found.items()},
        },
    }


def tap_entries(compilation: Compilation) -> list[dict[str, Any]]:
    """Where the student follows the teacher, and the rules that say so."""
    nodes = compilation.graph.graph.nodes if compilation.graph else ()
    taps = [node.meta[TAP_PLAN] for node in nodes if TAP_PLAN in node.meta]
    return [
        {"name": tap.name, "role": tap.role, "theta": tap.distill.theta, "rules": list(tap.rules)}
        for tap in taps
    ]


def target_entry(compilation: Compilation) -> dict[str, Any]:
    """The GPUs and the float type that the model was compiled for."""
    target = compilation.rules.target
    return {"compute": list(compilation.targets), "precision": target.precision}


def compute_entry(compilation: Compilation) -> dict[str, Any] | None:
    """What one sample costs to compute, None before there is a graph."""
    if compilation.graph is None:
        return None
    return compute_figures(compilation.graph, compilation.rules.target.precision).as_dict()


def by_target(
    compilation: Compilation, name: str, listed: Callable[[BuiltEngine], Sequence[InEngine]]
) -> dict[str, InEngine]:
    """What each engine made of the layer or attention of this name, by target."""
    targets = compilation.engine.targets if compilation.engine else {}
    return {
        target: item
        for target, engine in targets.items()
        for item in listed(engine)
        if item.name == name
    }


def gemm_by_target(compilation: Compilation, layer: str) -> dict[str, GemmInEngine]:
    return by_target(compilation, layer, lambda engine: engine.gemms)


def engine_entry(compilation: Compilation, layer: str) -> dict[str, Any]:
    """The layer's type in the first engine, and in each of them by target."""
    found = gemm_by_target(compilation, layer)
    first = next(iter(found.values()), None)
    return {
        "type": first.actual if first else "unknown",
        "eligible": first.eligible if first else "unknown",
        "picked": first.picked if first else "unknown",
        "reason": first.reason if first else None,
        "targets": {target: gemm.actual for target, gemm in found.items()},
    }


def storage(
    compilation: Compilation, plans: list[LayerPlan], model_file: Path
) -> dict[str, Any] | None:
    """Bytes of the final file, of its compressed GEMM weights with scales, and of FP32 originals;
    with those of the packed weights. None before the file is written.
    """
    if not model_file.exists() or not compilation.stored:
        return None
    compressed = [plan for plan in plans if plan.applied != Treatment()]
    gemm_bytes = sum(compilation.stored[plan.name].weight_bytes for plan in compressed)
    gemm_fp32 = sum(math.prod(plan.shape) * FP32_BYTES for plan in compressed)
    shapes = compilation.parameters.shapes.values()
    dense = sum(math.prod(shape) * FP32_BYTES for shape in shapes)
    model_bytes = model_file.stat().st_size
    in_packed = compilation.packed.layers if compilation.packed else {}
    packed_fp32 = sum(
        math.prod(plan.shape) * FP32_BYTES for plan in compressed if plan.name in in_packed
    )
    return {
        "gemm_bytes": gemm_bytes,
        "model_bytes": model_bytes,
        "dense_fp32_bytes": dense,
        "gemm_dense_fp32_bytes": gemm_fp32,
        "gemm_ratio": gemm_fp32 / gemm_bytes if gemm_bytes else None,
        "model_ratio": dense / model_bytes if model_bytes else None,
        **packed_storage(compilation.packed, compressed, packed_fp32, dense),
    }


def _finite(value: Any) -> Any:
    """JSON has no NaN or infinity; they become null."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return value
