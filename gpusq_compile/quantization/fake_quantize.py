"""Fake quantization with a learned step size (LSQ).

"Learned Step Size Quantization" (Esser et al., ICLR 2020): the scale receives the gradient of the
rounding, itself scaled by 1 / sqrt(n * qmax). Algorithm 1 of GPUSQ-ViT trains weights and scale
factors together (line 34).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.autograd.function import once_differentiable

from gpusq_compile.quantization.calibrate import Observer

MIN_SCALE = 2.0**-18
"""Smallest scale: representable in FP16, and positive as TensorRT's parser demands."""


@dataclass(frozen=True)
class IntegerRange:
    """An integer grid [qmin, qmax] of a quantized type, zero-point 0."""

    name: str
    qmin: int
    qmax: int


WEIGHT_RANGES = {
    "int8": IntegerRange("int8", -127, 127),
    "int4": IntegerRange("int4", -7, 7),
}
ACTIVATION_RANGES = {
    "int8": IntegerRange("int8", -128, 127),
    "int4": IntegerRange("int4", -8, 7),
}


class FakeQuantize(nn.Module):
    """`clamp(round(x / scale), qmin, qmax) * scale`, with the scale's logarithm as a parameter.

    Scales span orders of magnitude, and an optimizer that normalizes gradients (Adam) takes steps
    of one absolute size: on the logarithm that is one relative size for all of them, and no step
    can make a scale negative.

    Args:
        grid: the integer range.
        channels: number of scales along axis 0 (weights), None for one scale (activations).
        blocks: with it each channel of a matrix has this many scales, one for each of as many
            equal blocks of columns.
        scale_dtype: the type that the scale will have in the exported graph. The forward pass
            uses the scale rounded to it, so that what trains is what is exported.

    Until `calibrated` it passes values through; with an `observer` attached it shows them to it.
    """

    log_scale: nn.Parameter

    def __init__(
        self,
        grid: IntegerRange,
        *,
        channels: int | None,
        blocks: int | None = None,
        scale_dtype: torch.dtype,
    ) -> None:
        super().__init__()
        self.grid = grid
        self.channels = channels
        self.blocks = blocks
        self.scale_dtype = scale_dtype
        shape = tuple(size for size in (channels, blocks) if size is not None)
        self.log_scale = nn.Parameter(torch.zeros(shape))
        self.level_ends = _open_ends(1.0, grid)
        self.calibrated = False
        self.observer: Observer | None = None

    @property
    def scale(self) -> torch.Tensor:
        """The scale, float32: a scalar, [channels] or [channels, blocks]."""
        return self.log_scale.exp()

    def set_scale(self, scale: torch.Tensor) -> None:
        """Set the scale (of the shape of `self.scale`) and switch quantization on."""
        with torch.no_grad():
            self.log_scale.copy_(scale.clamp_min(MIN_SCALE).log())
        self.calibrated = True

    def exported_scale(self) -> torch.Tensor:
        """The scale as the graph will hold it: positive, rounded to `scale_dtype`, as float32.

        It carries no gradient; `forward` passes that of the scale straight through the rounding.
        """
        scale = self.log_scale.detach().exp().clamp_min_(MIN_SCALE)
        return scale.to(self.scale_dtype).to(scale.dtype)

    def forward(self, value: torch.Tensor) -> torch.Tensor:
        """`value` on the grid, in its own shape and dtype; half types are computed in float32."""
        if self.observer is not None:
            self.observer.observe(value.detach())
        if not self.calibrated:
            return value
        log_scale: torch.Tensor = self.log_scale
        scale, rows = self.exported_scale(), value
        if self.blocks is not None:
            # Each block is a channel of a weight that has one block's columns.
            log_scale, scale = log_scale.flatten(), scale.flatten()
            rows = value.reshape(scale.numel(), -1)
        result: torch.Tensor = _LearnedStepQuantize.apply(
            rows, log_scale, scale, self.grid, self.level_ends
        )
        return result.reshape(value.shape)

    def extra_repr(self) -> str:
        axis = "per tensor" if self.channels is None else f"per channel ({self.channels}, axis 0)"
        if self.blocks is not None:
            axis += f" and block ({self.blocks}, axis 1)"
        return f"{self.grid.name} [{self.grid.qmin}, {self.grid.qmax}], {axis}"


def broadcastable(scale: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """A scale shaped to divide a weight [out, ...]; a scalar as it is.

    A per-channel scale [out] gets the weight's axes, one of blocks [out, blocks] the weight's
    shape: each of its columns is repeated for the columns of its block.
    """
    if scale.ndim == 2:
        return scale.repeat_interleave(value.shape[1] // scale.shape[1], dim=1)
    return scale.reshape(-1, *([1] * (value.ndim - 1))) if scale.ndim else scale


def quantize_values(value: torch.Tensor, scale: torch.Tensor, grid: IntegerRange) -> torch.Tensor:
    """Integers of `value` as int8, rounded half to even as ONNX `QuantizeLinear` does."""
    scaled = value / broadcastable(scale, value)
    return scaled.round().clamp(grid.qmin, grid.qmax).to(torch.int8)


def _wide(value: torch.Tensor) -> torch.Tensor:
    """Half types as float32, wider ones as they are."""
    return value.float() if value.dtype in (torch.float16, torch.bfloat16) else value


def _on_grid(value: torch.Tensor, scale: torch.Tensor, grid: IntegerRange) -> torch.Tensor:
    # PyTorch's own fake-quantization multiplies by 1 / scale, which rounds some values to another
    # level than ONNX's division, and takes several times as long on a CPU.
    return (value / scale).round_().clamp_(grid.qmin, grid.qmax).mul_(scale)


class _LearnedStepQuantize(torch.autograd.Function):
    """The output for (value, log_scale); `scale` is what the forward pass uses for exp(log_scale).

    The time is that of the memory it touches: each full-size temporary is written over in place,
    and nothing is kept but the value and the output, which the operator behind keeps as well.
    """

    @staticmethod
    def forward(
        ctx: Any,
        value: torch.Tensor,
        log_scale: torch.Tensor,
        scale: torch.Tensor,
        grid: IntegerRange,
        level_ends: tuple[float, float],
    ) -> torch.Tensor:
        output = _on_grid(_wide(value), broadcastable(scale, value), grid).to(value.dtype)
        if torch.compiler.is_compiling():
            # PyTorch 2.11 gives the gradient of an output to a temporary in the same memory.
            output = output.clone()
        ctx.save_for_backward(value, output, scale)
        ctx.grid, ctx.level_ends = grid, level_ends
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        saved, output, scale = ctx.saved_tensors
        grid: IntegerRange = ctx.grid
        value, grad = _wide(saved), _wide(grads[0])
        divisor = broadcastable(scale, value)
        place: torch.Tensor
        if _ends_are_cheap(value, scale):
            place, ends = value, _open_ends(scale.item(), grid)
        else:
            place, ends = value / divisor, ctx.level_ends
        grad_log_scale = spare = None
        if ctx.needs_input_grad[1]:
            if saved.dtype != value.dtype:
                output = _on_grid(value, divisor, grid)
            # scale * d(output)/d(scale): inside the range output - value, outside the output.
            slope = _where_inside(value, place, ends)
            torch.sub(output, slope, out=slope)
            if scale.ndim:
                total = slope.mul_(grad).flatten(1).sum(dim=1)
            else:
                total = torch.dot(grad.reshape(-1), slope.reshape(-1))
            elements = value.numel() / max(1, scale.numel() if scale.ndim else value.shape[0])
            grad_log_scale = total / math.sqrt(max(1.0, elements) * grid.qmax)
            spare = slope
        grad_value = None
        if ctx.needs_input_grad[0]:
            grad_value = _where_inside(grad, place, ends, out=spare).to(saved.dtype)
        return grad_value, grad_log_scale, None, None, None


def _ends_are_cheap(value: torch.Tensor, scale: torch.Tensor) -> bool:
    """Whether the ends of a float32 range may be read as numbers, which saves a division.

    On a GPU that would wait for all work before it, and under torch.compile break the graph.
    """
    on_cpu = value.device.type == "cpu" and not torch.compiler.is_compiling()
    return on_cpu and value.dtype == torch.float32 and scale.ndim == 0


def _open_ends(scale: float, grid: IntegerRange) -> tuple[float, float]:
    """The largest float32 whose quotient by `scale` rounds below qmin, the smallest above qmax.

    A quotient of float32 numbers rounds to a level q or less as long as it is within half a unit
    in the last place of q (a tie goes to q, whose last bit is zero). That bound times `scale` has
    fewer bits than a float64.
    """

    def beyond(level: int) -> float:
        half_unit = 2.0 ** (math.frexp(level)[1] - 25)
        bound = scale * (level + half_unit)
        with np.errstate(over="ignore"):
            nearest = np.float32(bound)
            if float(nearest) <= bound:
                nearest = np.nextafter(nearest, np.float32(np.inf))
        return float(nearest)

    return -beyond(-grid.qmin), beyond(grid.qmax)


def _where_inside(
    value: torch.Tensor,
    place: torch.Tensor,
    ends: tuple[float, float],
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """`value` where `place` lies between the ends, else zero; written to `out` where given."""
    # The gradient of a clamp is that selection in one kernel; `where` takes three and a mask.
    out = torch.empty_like(value) if out is None else out
    torch.ops.aten.hardtanh_backward.grad_input(value, place, *ends, grad_input=out)
    return out
