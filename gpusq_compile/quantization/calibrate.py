"""Initial scales: the range of a tensor from data, by maximum, percentile or squared error."""

from __future__ import annotations

import math

import torch

BINS = 2048
SAMPLES = 1 << 17
"""Most values of one tensor that go into the histogram; the maximum is taken over all of them."""
CANDIDATES = 60
"""Clipping thresholds tried by the squared-error search, from the maximum down to a third."""


class Observer:
    """A histogram of |x| over the values shown to it, whose range doubles when exceeded.

    Doubling merges pairs of bins, so one pass over the data is enough.
    """

    def __init__(self) -> None:
        self.counts = torch.zeros(BINS, dtype=torch.float64)
        self.limit = 0.0
        self.maximum = 0.0
        self.finite = True

    def observe(self, value: torch.Tensor) -> None:
        if value.numel() == 0:
            return
        low, high = torch.aminmax(value.detach())
        largest = max(-float(low), float(high))
        if not math.isfinite(largest):
            self.finite = False
            return
        self.maximum = max(self.maximum, largest)
        if largest == 0.0:
            return
        if self.limit == 0.0:
            self.limit = largest
        while largest > self.limit:
            merged = self.counts.reshape(BINS // 2, 2).sum(dim=1)
            self.counts = torch.cat([merged, torch.zeros_like(merged)])
            self.limit *= 2.0
        # A stride that shares no factor with any axis visits every channel alike.
        stride = max(1, value.numel() // SAMPLES)
        while math.gcd(stride, value.numel()) > 1:
            stride += 1
        sample = value.detach().flatten()[::stride].float().abs()
        histogram = torch.histc(sample, bins=BINS, min=0.0, max=self.limit)
        self.counts += histogram.double().cpu()

    def threshold(self, method: str, percentile: float, qmax: int) -> float:
        """The clipping threshold in the units of the tensor; 0 when all values were zero.

        Args:
            method: `max`, `percentile` or `mse` (least squared quantization error).
            percentile: share of values kept inside the range, in percent.
            qmax: largest level, which the threshold is mapped to.
        """
        if method == "max" or self.limit == 0.0:
            return self.maximum
        if method == "percentile" and percentile >= 100.0:
            return self.maximum
        if method == "percentile":
            cumulative = self.counts.cumsum(0) / self.counts.sum()
            index = int(torch.searchsorted(cumulative, percentile / 100.0))
            edge = (min(index, BINS - 1) + 1) * self.limit / BINS
            return min(edge, self.maximum)
        return self._least_squares(qmax)

    def _least_squares(self, qmax: int) -> float:
        centers = (torch.arange(BINS, dtype=torch.float64) + 0.5) * self.limit / BINS
        ratios = torch.linspace(1.0 / 3.0, 1.0, CANDIDATES, dtype=torch.float64)
        scales = (ratios * self.maximum / qmax).unsqueeze(1)
        restored = (centers / scales).round().clamp(max=qmax) * scales
        errors = ((restored - centers) ** 2 * self.counts).sum(dim=1)
        return float(ratios[int(errors.argmin())] * self.maximum)


def weight_scale(
    weight: torch.Tensor, method: str, qmax: int, blocks: int | None = None
) -> torch.Tensor:
    """Scales [out] of a weight [out, ...] (masked entries zero), from its non-zero values.

    `max` maps the largest magnitude of a channel to `qmax`; `mse` searches the clipping threshold
    of least squared error per channel. A channel of zeros gets scale 0: clamp before use.
    With `blocks` the weight is [out, in], and each of that many blocks of input channels has a
    scale of its own: [out, blocks].
    """
    if blocks is not None:
        out = len(weight)
        return weight_scale(weight.reshape(out * blocks, -1), method, qmax).reshape(out, blocks)
    rows = weight.detach().float().flatten(1)
    largest = rows.abs().amax(dim=1)
    if method == "max":
        return largest / qmax
    best_scale = largest / qmax
    best_error = torch.full_like(largest, float("inf"))
    for ratio in torch.linspace(1.0, 1.0 / 3.0, CANDIDATES // 3).tolist():
        scale = (largest * ratio / qmax).clamp_min(torch.finfo(torch.float32).tiny)
        restored = (rows / scale.unsqueeze(1)).round().clamp(-qmax, qmax) * scale.unsqueeze(1)
        error = (restored - rows).square().sum(dim=1)
        better = error < best_error
        best_scale = torch.where(better, scale, best_scale)
        best_error = torch.where(better, error, best_error)
    return best_scale
