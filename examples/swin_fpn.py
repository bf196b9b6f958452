"""The backbone of the two Mask R-CNN examples: a Swin transformer with a feature pyramid.

`SWIN` is `tiny`, `small` or `base`, or `mini` for a small one to try things out; `IMAGE_SIZE` sets
the side of the images. Widths and depths are those of "Swin Transformer" (ICCV 2021), as timm has
them; as there, each stage's output is normalized before the pyramid reads it.
"""

from __future__ import annotations

import os
from collections import OrderedDict
from dataclasses import dataclass
from typing import Any

import timm
import torch
from torch import Tensor, nn
from torchvision.ops.feature_pyramid_network import FeaturePyramidNetwork, LastLevelMaxPool

from photos import CLASSES, Target, batches_of, best_overlap, size_named

Batch = tuple[list[Tensor], list[Target]]


@dataclass(frozen=True)
class Size:
    """A model of timm's, what is different from it, and sizes of the detector around it."""

    name: str
    options: dict[str, Any]
    image: int = 448
    channels: int = 256
    hidden: int = 1024
    proposals: int = 1000
    rois: int = 256


SIZES = {
    "mini": Size(
        "swin_tiny_patch4_window7_224",
        {"embed_dim": 32, "depths": (1, 1, 2, 1), "num_heads": (1, 2, 4, 8), "window_size": 4},
        image=128,
        channels=32,
        hidden=64,
        proposals=32,
        rois=16,
    ),
    "tiny": Size("swin_tiny_patch4_window7_224", {}),
    "small": Size("swin_small_patch4_window7_224", {}),
    "base": Size("swin_base_patch4_window7_224", {}),
}
SIZE = SIZES[size_named("SWIN", ("tiny", *SIZES))]
IMAGE_SIZE = int(os.environ.get("IMAGE_SIZE", SIZE.image))
ANCHORS = tuple((IMAGE_SIZE // share,) for share in (32, 16, 8, 4, 2))
"""The side of the square anchors of each level: the largest covers half of the image's side."""


class SwinFPN(nn.Module):
    """Images [B, 3, H, W] -> feature maps `0` to `3` at strides 4 to 32, and `pool` at 64."""

    def __init__(self) -> None:
        super().__init__()
        self.body = timm.create_model(
            SIZE.name, features_only=True, img_size=IMAGE_SIZE, **SIZE.options
        )
        widths = self.body.feature_info.channels()
        self.norms = nn.ModuleList(nn.LayerNorm(width) for width in widths)
        self.fpn = FeaturePyramidNetwork(widths, SIZE.channels, LastLevelMaxPool())
        self.out_channels = SIZE.channels

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        maps = [
            norm(stage).permute(0, 3, 1, 2)
            for norm, stage in zip(self.norms, self.body(images), strict=True)
        ]
        pyramid: dict[str, Tensor] = self.fpn(OrderedDict(zip("0123", maps, strict=True)))
        return pyramid


def batches(count: int, seed: int, batch: int = 2) -> list[Batch]:
    """Batches of images [3, size, size] in [0, 1], and what is on them; 0 is no class."""
    found = []
    for part in batches_of(batch, count, IMAGE_SIZE, seed):
        targets = [{**target, "labels": target["labels"] + 1} for _, target in part]
        found.append(([image for image, _ in part], targets))
    return found


def detector_loss(model: nn.Module, batch: Batch) -> Tensor:
    """The sum of the detector's own losses, as a training script of torchvision takes it."""
    model.train()
    losses: dict[str, Tensor] = model(*batch)
    return torch.stack(list(losses.values())).sum()


def overlap(outputs: list[Target], batch: Batch) -> dict[str, float]:
    """The mean IoU of the true boxes with the best of the boxes that were found."""
    pairs = zip(outputs, batch[1], strict=True)
    overlaps = [best_overlap(found["boxes"].detach(), target) for found, target in pairs]
    return {"overlap": sum(overlaps) / len(overlaps)}


NUM_CLASSES = len(CLASSES) + 1
"""The photographs' classes, and "nothing"."""
