"""The smallest model that the shipped rules match as a whole: a patch embedding, one block's
worth of linears, a classifier. Noise stands for images, so accuracy means nothing here.

Tests append lines to this file to break one thing at a time: the last definition wins.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

CLASSES = 4


class TinyNet(nn.Module):
    """Images (B, 1, 8, 8) to logits (B, 4)."""

    def __init__(self) -> None:
        super().__init__()
        self.patch_embed = nn.Conv2d(1, 32, kernel_size=4, stride=4)
        self.norm1 = nn.LayerNorm(32)
        self.fc1 = nn.Linear(32, 64)
        self.act = nn.GELU()
        self.fc2 = nn.Linear(64, 32)
        self.norm = nn.LayerNorm(32)
        self.head = nn.Linear(32, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch_embed(x).flatten(2).transpose(1, 2)
        x = x + self.fc2(self.act(self.fc1(self.norm1(x))))
        return self.head(self.norm(x).mean(dim=1))


def model() -> nn.Module:
    torch.manual_seed(0)
    return TinyNet().eval()


def example_inputs() -> tuple[Tensor, ...]:
    return (torch.zeros(1, 1, 8, 8),)


def labelled(seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    for _ in range(3):
        images = torch.randn((16, 1, 8, 8), generator=generator)
        yield images, torch.randint(0, CLASSES, (16,), generator=generator)


def train_data() -> list[tuple[Tensor, Tensor]]:
    return list(labelled(1))


def calibration_data() -> list[tuple[Tensor, Tensor]]:
    return list(labelled(2))


def eval_data() -> list[tuple[Tensor, Tensor]]:
    return list(labelled(3))
