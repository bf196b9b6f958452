"""The model file that both compilers read: one timm model, one set of calibration images.

`COMPILE_TIME_MODEL` names the timm model, `COMPILE_TIME_IMAGES` and `COMPILE_TIME_BATCH` the
calibration set. Weights and images are random under a fixed seed: what is measured here is time
and memory, which do not depend on the values.
"""

from __future__ import annotations

import os

import timm
import torch
from torch import Tensor, nn

NAME = os.environ.get("COMPILE_TIME_MODEL", "deit_tiny_patch16_224")
IMAGES = int(os.environ.get("COMPILE_TIME_IMAGES", "32"))
BATCH = int(os.environ.get("COMPILE_TIME_BATCH", "8"))
IMAGE_SHAPE: tuple[int, ...] = timm.get_pretrained_cfg(NAME).input_size


def model() -> nn.Module:
    torch.manual_seed(0)
    vit: nn.Module = timm.create_model(NAME, pretrained=False)
    return vit.eval()


def example_inputs() -> tuple[Tensor, ...]:
    """Float32, shape (2, 3, height, width)."""
    return (torch.randn(2, *IMAGE_SHAPE, generator=torch.Generator().manual_seed(1)),)


def calibration_data() -> list[Tensor]:
    """Batches of float32 images, shape (batch, 3, height, width)."""
    images = torch.randn(IMAGES, *IMAGE_SHAPE, generator=torch.Generator().manual_seed(2))
    return list(images.split(BATCH))
