"""Fake quantization with a learned step size (LSQ).

"Learned Step Size Quantization" (Esser et al., ICLR 2020): the scale receives the gradient of the
rounding, itself scaled by 1 / sqrt(n * qmax). Algorithm 1 of GPUSQ-ViT trains weights and scale
factors together (line 34).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from gpusq_compile.quantization.calibrate import Observer

MIN_SCALE = 2.0**-18
"""Smallest scale: representable in FP16, and positive as TensorRT's parser demands."""


@dataclass(frozen=True)
class IntegerRange:
    """An integer grid [qmin, qmax] of a quantized type, zero-point 0."""

    name: str
    qmin: int
    qmax: int


WEIGHT_RANGES = {"int8": IntegerRange("int8", -127, 127)}
ACTIVATION_RANGES = {"int8": IntegerRange("int8", -128, 127)}


class FakeQuantize(nn.Module):
    """`clamp(round(x / scale), qmin, qmax) * scale`, with the scale's logarithm as a parameter.

    Scales span orders of magnitude, and an optimizer that normalizes gradients (Adam) takes steps
    of one absolute size: on the logarithm that is one relative size for all of them, and no step
    can make a scale negative.

    Args:
        grid: the integer range.
        channels: number of scales along axis 0 (weights), None for one scale (activations).
        scale_dtype: the type that the scale will have in the exported graph. The forward pass
            uses the scale rounded to it, so that what trains is what is exported.

    Until `calibrated` it passes values through; with an `observer` attached it shows them to it.
    """

    log_scale: nn.Parameter

    def __init__(
        self, grid: IntegerRange, *, channels: int | None, scale_dtype: torch.dtype
    ) -> None:
        super().__init__()
        self.grid = grid
        self.channels = channels
        self.scale_dtype = scale_dtype
        self.log_scale = nn.Parameter(torch.zeros(() if channels is None else (channels,)))
        self.calibrated = False
        self.observer: Observer | None = None

    @property
    def scale(self) -> torch.Tensor:
        """The scale, float32: a scalar, or [channels]."""
        return self.log_scale.exp()

    def set_scale(self, scale: torch.Tensor) -> None:
        """Set the scale (of the shape of `self.scale`) and switch quantization on."""
        with torch.no_grad():
            self.log_scale.copy_(scale.clamp_min(MIN_SCALE).log())
        self.calibrated = True

    def exported_scale(self) -> torch.Tensor:
        """The scale as the graph will hold it: positive, rounded to `scale_dtype`, as float32."""
        positive = self.scale.clamp_min(MIN_SCALE)
        rounded = positive.detach().to(self.scale_dtype).to(positive.dtype)
        return positive + (rounded - positive).detach()

    def forward(self, value: torch.Tensor) -> torch.Tensor:
        if self.observer is not None:
            self.observer.observe(value.detach())
        if not self.calibrated:
            return value
        result: torch.Tensor = _LearnedStepQuantize.apply(
            value,
            self.exported_scale(),
            self.grid.qmin,
            self.grid.qmax,
        )
        return result

    def extra_repr(self) -> str:
        axis = "per tensor" if self.channels is None else f"per channel ({self.channels}, axis 0)"
        return f"{self.grid.name} [{self.grid.qmin}, {self.grid.qmax}], {axis}"


def broadcastable(scale: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """A per-channel scale [out] shaped to divide a weight [out, ...]; a scalar as it is."""
    return scale.reshape(-1, *([1] * (value.ndim - 1))) if scale.ndim else scale


def quantize_values(value: torch.Tensor, scale: torch.Tensor, grid: IntegerRange) -> torch.Tensor:
    """Integers of `value` as int8, rounded half to even as ONNX `QuantizeLinear` does."""
    scaled = value / broadcastable(scale, value)
    return scaled.round().clamp(grid.qmin, grid.qmax).to(torch.int8)


class _LearnedStepQuantize(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, value: torch.Tensor, scale: torch.Tensor, qmin: int, qmax: int
    ) -> torch.Tensor:
        divisor = broadcastable(scale, value)
        scaled = value / divisor
        levels = scaled.round().clamp_(qmin, qmax)
        ctx.save_for_backward(scaled, levels, scale)
        ctx.range = (qmin, qmax)
        return levels * divisor

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (grad,) = grads
        scaled, levels, scale = ctx.saved_tensors
        qmin, qmax = ctx.range
        inside = (scaled >= qmin) & (scaled <= qmax)
        grad_value = grad * inside
        grad_scale = None
        if ctx.needs_input_grad[1]:
            # Inside the range d(out)/d(scale) = round(x/s) - x/s; outside it is the clipped level.
            slope = torch.where(inside, levels - scaled, levels)
            per_scale = (grad * slope).reshape(max(scale.numel(), 1), -1).sum(dim=1)
            elements = scaled.numel() / (scale.numel() if scale.ndim else max(scaled.shape[0], 1))
            grad_scale = per_scale.reshape(scale.shape) / (elements * qmax) ** 0.5
        return grad_value, grad_scale, None, None
