"""What the packed weights take, from the bytes in weights.safetensors, beside the paper's figures.

Section 2.1 of GPUSQ-ViT (CVPR 2023) counts bits per group against FP32: 20 for four INT8 or eight
INT4 weights, of 128 and 256. That leaves out the scales and every parameter that is not pruned; the
ratios here are given with and without the scales, and for the whole model.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

from gpusq_compile.packed_file import PackedBytes
from gpusq_compile.plan import LayerPlan

PAPER_RATIOS = {
    "int8": {"printed": 6.4, "derived": 6.4},
    "int4": {"printed": 12.7, "derived": 12.8},
}
"""FP32 bytes of a sparse GEMM's weights per packed byte: 128 / 20, and 256 / 20 (printed 12.7)."""


def packed_storage(
    packed: PackedBytes | None, plans: Sequence[LayerPlan], gemm_fp32: int, dense_fp32: int
) -> dict[str, Any]:
    """The packed part of the report's `storage`: bytes, and ratios to FP32.

    `gemm_fp32` and `dense_fp32` are the bytes in FP32 of the packed layers' weights and of all
    parameters. Every entry is None where nothing was packed.
    """
    layers = list(packed.layers.values()) if packed else []
    weights = sum(layer.values + layer.metadata for layer in layers)
    scales = sum(layer.scales for layer in layers)
    return {
        "packed_bytes": packed.file if packed else None,
        "packed_gemm_bytes": weights if packed else None,
        "packed_scale_bytes": scales if packed else None,
        "packed_gemm_ratio": gemm_fp32 / weights if weights else None,
        "packed_gemm_ratio_with_scales": gemm_fp32 / (weights + scales) if weights else None,
        "packed_model_ratio": dense_fp32 / packed.file if packed else None,
        "paper_gemm_ratio": paper_ratio(plans) if packed else None,
    }


def paper_ratio(plans: Sequence[LayerPlan]) -> dict[str, float] | None:
    """The paper's figures for the type that most sparse quantized layers have; None without any."""
    types = Counter(
        plan.applied.weight for plan in plans if plan.applied.sparsity and plan.applied.weight
    )
    return PAPER_RATIOS.get(str(types.most_common(1)[0][0])) if types else None
