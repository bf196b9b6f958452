"""The two integer operators of the folded graph, `gpusq::quantize` and `gpusq::dequantize`.

They compute what ONNX `QuantizeLinear` and `DequantizeLinear` (opset 21) compute with zero-point
0, and the export pass translates them one to one, so the folded graph is the exported one.
"""

from __future__ import annotations

import torch

from gpusq_compile.quantization.fake_quantize import broadcastable


@torch.library.custom_op("gpusq::quantize", mutates_args=())
def quantize(value: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """float [...] and a scalar scale -> int8 [...], rounded half to even, saturated."""
    return (value / scale).round().clamp(-128, 127).to(torch.int8)


@quantize.register_fake
def _(value: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(value, dtype=torch.int8)


@torch.library.custom_op("gpusq::dequantize", mutates_args=())
def dequantize(levels: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """int8 [...] and a scale -> values in the scale's dtype.

    The scale is a scalar, [out] along axis 0, or [out, blocks] for equal blocks along axis 1.
    """
    return levels.to(scale.dtype) * broadcastable(scale, levels)


@dequantize.register_fake
def _(levels: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(levels, dtype=scale.dtype)


QUANTIZE = torch.ops.gpusq.quantize.default
DEQUANTIZE = torch.ops.gpusq.dequantize.default
