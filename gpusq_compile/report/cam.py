"""Class activation maps: where an image's features speak for its class, dense and compressed.

The maps are Grad-CAM: "Grad-CAM: Visual Explanations from Deep Networks via Gradient-based
Localization" (Selvaraju et al., ICCV 2017), equations 1 and 2. A channel's weight is the mean over
all positions of the gradient of the class score with respect to it; the map is the weighted sum of
the channels, negative values cut off. The class is the dense model's first one, for both models.

Where there is no class score, or it does not depend on the positions (behind the last block of a
model that reads its class token alone), the map is the mean of |activation| over the channels:
F_sum of "Paying More Attention to Attention" (Zagoruyko and Komodakis, ICLR 2017), section 3.1.

The places are those of GPUSQ-ViT (CVPR 2023), appendix 3.2: patch embedding, the end of each stage,
and the final norm.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F

GRAD_CAM = "grad-cam"
ACTIVATION = "activation"
MOST_PREFIX_TOKENS = 16
"""Most class, distillation and register tokens that are looked for in front of the patches."""
MOST_POSITIONS = 64
"""Larger maps are averaged down to this many positions a side."""


@dataclass(frozen=True)
class Map:
    """A map float32 [height, width], not negative, and the method that it was made by."""

    values: torch.Tensor
    method: str


def activation_map(
    feature: torch.Tensor, gradient: torch.Tensor | None, image: tuple[int, int], method: str | None
) -> Map | None:
    """The map of one sample's feature, None where its positions form no grid over the image.

    Args:
        feature: [1, tokens, channels], [1, height, width, channels] or [1, channels, height,
            width].
        gradient: of the class score, in the shape of `feature`; None where there is no score.
        image: height and width of the input, in pixels.
        method: what the other model's map was made by; None to choose.
    """
    grid = as_grid(feature, image)
    if grid is None:
        return None
    by_class = None if gradient is None else as_grid(gradient, image)
    if method is None:
        speaks = by_class is not None and bool(by_class.abs().max() > 0)
        method = GRAD_CAM if speaks else ACTIVATION
    if method == GRAD_CAM:
        assert by_class is not None
        values = (grid * by_class.mean(dim=(0, 1))).sum(dim=-1).relu()
    else:
        values = grid.abs().mean(dim=-1)
    return Map(thinned(values), method)


def as_grid(feature: torch.Tensor, image: tuple[int, int]) -> torch.Tensor | None:
    """One sample's feature as float32 [height, width, channels], None where it has no such form.

    Tokens in front of the patches (class, distillation, registers) are left out.
    """
    if feature.shape[:1] != (1,):
        return None
    value = feature[0].float()
    if value.ndim == 3:
        if covers(value.shape[0], value.shape[1], image):
            return value
        return value.movedim(0, -1) if covers(value.shape[1], value.shape[2], image) else None
    if value.ndim != 2:
        return None
    for prefix in range(min(MOST_PREFIX_TOKENS + 1, value.shape[0])):
        tokens = value.shape[0] - prefix
        height = round(math.sqrt(tokens * image[0] / image[1]))
        if height < 1 or tokens % height or not covers(height, tokens // height, image):
            continue
        # Nearly any number is some tokens and a square: patches then have to be whole.
        whole = image[0] % height == image[1] % (tokens // height) == 0
        if prefix == 0 or (whole and tokens > prefix):
            return value[prefix:].reshape(height, tokens // height, -1)
    return None


def covers(height: int, width: int, image: tuple[int, int]) -> bool:
    """Whether a grid has the image's proportions, up to the rounding of a last cut patch."""
    if not (1 < height <= image[0] and 1 < width <= image[1]):
        return False
    patch = image[0] / height
    return abs(image[1] / width - patch) <= patch * max(1 / width, 1 / height) / 2


def thinned(values: torch.Tensor) -> torch.Tensor:
    height, width = values.shape
    factor = max(height, width) / MOST_POSITIONS
    if factor <= 1:
        return values
    size = (max(1, round(height / factor)), max(1, round(width / factor)))
    return F.interpolate(values[None, None], size=size, mode="area")[0, 0]


def as_levels(values: torch.Tensor) -> torch.Tensor:
    """A map as uint8, its least value at 0 and its greatest at 255; all zero where it is flat."""
    low, high = values.min(), values.max()
    return (255 * (values - low) / (high - low).clamp_min(1e-30)).round().to(torch.uint8)


def correlation(one: torch.Tensor, other: torch.Tensor) -> float | None:
    """Pearson's correlation of two maps, None where one is constant or not finite."""
    pair = torch.stack([one.flatten().double(), other.flatten().double()])
    pair = pair - pair.mean(dim=1, keepdim=True)
    norms = pair.norm(dim=1)
    if not bool(torch.isfinite(pair).all()) or float(norms.min()) < 1e-12:
        return None
    return round(float((pair[0] @ pair[1]) / norms.prod()), 4)


def as_pixels(image: torch.Tensor, most: int) -> torch.Tensor:
    """An input [channels, height, width] as uint8 [height, width, 1 or 3], stretched to 0..255.

    The normalization of the data is not known, so black and white are the image's own ends.
    Sides are at most `most` pixels.
    """
    value = image.detach().float().cpu()
    if value.shape[0] not in (1, 3):
        value = value.mean(dim=0, keepdim=True)
    factor = max(value.shape[1:]) / most
    if factor > 1:
        size = (max(1, round(value.shape[1] / factor)), max(1, round(value.shape[2] / factor)))
        value = F.interpolate(value[None], size=size, mode="area")[0]
    low, high = value.min(), value.max()
    scaled = 255 * (value - low) / (high - low).clamp_min(1e-12)
    return scaled.round().to(torch.uint8).movedim(0, -1)
