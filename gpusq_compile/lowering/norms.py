"""Normalizations that ONNX has no form of up to our opset, in terms that it has."""

from __future__ import annotations

from collections.abc import Sequence

import torch


def rms_norm(
    x: torch.Tensor,
    normalized_shape: Sequence[int],
    weight: torch.Tensor | None = None,
    eps: float | None = None,
) -> torch.Tensor:
    """`x * rsqrt(mean(x * x) + eps) * weight`, the mean over the last axes, of `normalized_shape`.

    PyTorch's own decomposition writes in place, which no translation can follow.
    Source: torch.nn.RMSNorm; ONNX has RMSNormalization from opset 23 on.
    """
    axes = [-axis for axis in range(len(normalized_shape), 0, -1)]
    mean = (x * x).mean(axes, keepdim=True)
    result = x * torch.rsqrt(mean + (torch.finfo(x.dtype).eps if eps is None else eps))
    return result if weight is None else result * weight
