"""Per layer: sparsity requested -> mask verified -> eligible -> picked, and where the chain breaks.

Works on the entries of report.json, so that a log that was written elsewhere can be added to a
report long after the run.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, cast

from gpusq_compile.engine.report import Answer, GemmInEngine, MarkedAttention, MarkedGemm
from gpusq_compile.engine.sparse_causes import Cause, SparseLayer, sparse_causes

Layer = Mapping[str, Any]


def sparse_chain(
    layer: Layer,
    gemm: GemmInEngine | None,
    *,
    precision: str,
    targets: Sequence[str] = (),
    sparse_flag: bool | None = None,
) -> dict[str, Any] | None:
    """The chain of one layer of the report, None where no sparsity was requested.

    `gemm` is what the engine made of it, None without one; `sparse_flag` says whether the builder
    was allowed sparse kernels. `causes` are the codes of what broke the chain, `reason` says it in
    words; both are empty as long as nothing is known to have broken it.
    """
    requested = layer["requested"]["sparsity"]
    if requested is None:
        return None
    eligible: Answer = gemm.eligible if gemm else "unknown"
    picked: Answer = gemm.picked if gemm else "unknown"
    if gemm is not None and sparse_flag is False:
        eligible = picked = "no"
    if picked == "yes":
        eligible = "yes"
    causes: Sequence[Cause] = ()
    if layer["applied"]["sparsity"] is None:
        causes = [Cause("refused", reason) for reason in layer["reasons"]]
    elif layer["mask_ok"] is False:
        causes = [Cause("mask-broken", f"the stored weight breaks {requested}")]
    elif picked != "yes" and "no" in (eligible, picked):
        causes = sparse_causes(
            _sparse_layer(layer, gemm, precision, eligible), targets, sparse_flag=sparse_flag
        )
    return {
        "requested": requested,
        "mask_ok": layer["mask_ok"],
        "eligible": eligible,
        "picked": picked,
        "causes": [cause.code for cause in causes],
        "reason": "; ".join(cause.text for cause in causes) or None,
    }


def _sparse_layer(
    layer: Layer, gemm: GemmInEngine | None, precision: str, eligible: Answer
) -> SparseLayer:
    applied = layer["applied"]
    return SparseLayer(
        pattern=applied["sparsity"],
        op=layer["op"],
        role=layer["role"],
        shape=tuple(layer["shape"]),
        weight=applied["weight"],
        activation=applied["activation"],
        output=applied["output"],
        precision=precision,
        eligible=eligible,
        engine_type=gemm.actual if gemm else "unknown",
        type_reason=gemm.reason if gemm else None,
    )


def gemms_of(layers: Sequence[Layer], precision: str) -> list[MarkedGemm]:
    """In which type the engine should multiply each compressed linear and convolution, and read
    its weight."""
    gemms = []
    for layer in layers:
        applied = layer["applied"]
        if layer["op"] not in ("linear", "conv2d") or not any(applied.values()):
            continue
        integer = applied["weight"] is not None and applied["activation"] is not None
        expected = cast(Literal["int8", "fp16", "fp32"], "int8" if integer else precision)
        # Without blocks 4-bit values are stored, and read, as INT8.
        in_blocks = layer.get("execution", {}).get("kind") == "weight-only int4"
        sparse = applied["sparsity"] is not None
        gemms.append(
            MarkedGemm(layer["name"], expected, sparse, weight="int4" if in_blocks else None)
        )
    return gemms


def attentions_of(attentions: Sequence[Mapping[str, Any]]) -> list[MarkedAttention]:
    """The attentions of the report that should be one INT8 kernel each."""
    return [MarkedAttention(a["name"]) for a in attentions if a["applied"]["activation"]]
