"""Fashion-MNIST, and the two small vision transformers that the accuracy benchmarks compress.

60,000 + 10,000 grey images of 28x28 in ten balanced classes (Xiao et al., 2017; MIT licence), from
Debian's package `dataset-fashion-mnist`. Images are padded to 32x32, which gives the transformers
patches of even size.
"""

from __future__ import annotations

import gzip
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file
from timm.models.swin_transformer import SwinTransformer
from timm.models.vision_transformer import VisionTransformer
from torch import nn

FOLDER = Path(os.environ.get("FASHION_MNIST", "/usr/share/datasets/fashion-mnist"))
WEIGHTS = Path(__file__).parent / "teachers"

IMAGE_SIZE = 32
CLASSES = 10
# Of the 60,000 padded training images, pixels scaled to [0, 1].
PIXEL_MEAN, PIXEL_STD = 0.2190, 0.3318


@dataclass(frozen=True)
class Images:
    """Images float32 [n, 1, 32, 32], normalized, and their classes int64 [n]."""

    pixels: torch.Tensor
    labels: torch.Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def batches(self, size: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
        return list(zip(self.pixels.split(size), self.labels.split(size), strict=True))


def load(split: str) -> Images:
    """The `train` or `test` images.

    Raises:
        SystemExit: the data is not there; the message says how to get it.
    """
    prefix = {"train": "train", "test": "t10k"}[split]
    try:
        raw = _idx(FOLDER / f"{prefix}-images-idx3-ubyte.gz", offset=16)
        labels = _idx(FOLDER / f"{prefix}-labels-idx1-ubyte.gz", offset=8)
    except FileNotFoundError as error:
        raise SystemExit(
            f"{error.filename} is missing. On Debian or Ubuntu: apt-get install -y "
            "dataset-fashion-mnist. Elsewhere set FASHION_MNIST to a folder with the four .gz files"
        ) from None
    pixels = torch.from_numpy(raw.reshape(-1, 1, 28, 28)).float().div_(255)
    pixels = nn.functional.pad(pixels, (2, 2, 2, 2))
    return Images((pixels - PIXEL_MEAN) / PIXEL_STD, torch.from_numpy(labels).long())


def _idx(path: Path, offset: int) -> np.ndarray:
    """The bytes behind an idx file's header."""
    with gzip.open(path) as file:
        return np.frombuffer(file.read(), dtype=np.uint8, offset=offset).copy()


def augmented(
    images: Images, size: int, generator: torch.Generator
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """One epoch of shuffled batches, each image flipped half of the time and shifted by up to 2."""
    order = torch.randperm(len(images), generator=generator)
    for picked in order.split(size):
        if len(picked) == size:
            yield augment(images.pixels[picked], generator), images.labels[picked]


def augment(pixels: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Flip half of the images [n, 1, 32, 32] and shift each by up to 2 pixels."""
    count = len(pixels)
    flip = torch.rand(count, 1, 1, 1, generator=generator) < 0.5
    pixels = torch.where(flip, pixels.flip(3), pixels)
    padded = nn.functional.pad(pixels, (2, 2, 2, 2), mode="replicate")
    across, down = torch.randint(0, 5, (2, count, 1), generator=generator)
    steps = torch.arange(IMAGE_SIZE)
    rows, columns = (down + steps).unsqueeze(2), (across + steps).unsqueeze(1)
    return padded[torch.arange(count)[:, None, None], 0, rows, columns].unsqueeze(1)


def deit() -> nn.Module:
    """DeiT-style: one resolution, a class token, 16 patches of 8x8 (1.0 M parameters)."""
    return VisionTransformer(
        img_size=IMAGE_SIZE,
        patch_size=8,
        in_chans=1,
        num_classes=CLASSES,
        embed_dim=128,
        depth=5,
        num_heads=4,
    )


def swin() -> nn.Module:
    """Swin-style: 8x8 tokens in shifted 4x4 windows, merged to 4x4 tokens (0.9 M parameters)."""
    return SwinTransformer(
        img_size=IMAGE_SIZE,
        patch_size=4,
        in_chans=1,
        num_classes=CLASSES,
        embed_dim=64,
        depths=(2, 4),
        num_heads=(2, 4),
        window_size=4,
        drop_path_rate=0.0,
    )


TEACHERS = {"deit": deit, "swin": swin}


def load_teacher(name: str) -> nn.Module:
    """A trained teacher in eval mode."""
    model = TEACHERS[name]()
    weights = load_file(WEIGHTS / f"{name}.safetensors")
    model.load_state_dict({key: value.float() for key, value in weights.items()})
    return model.eval()


@torch.no_grad()
def predictions(model: nn.Module, images: Images, size: int = 500) -> torch.Tensor:
    """The predicted class of each image, int64 [n]."""
    return torch.cat([model(pixels).argmax(1) for pixels, _ in images.batches(size)])
