"""UperNet on a Swin transformer: semantic segmentation ("Unified Perceptual Parsing for Scene
Understanding", ECCV 2018; "Swin Transformer", ICCV 2021).

    UPERNET=tiny gpusq-compile examples/upernet_swin.py --rules int8 -o out/upernet

`UPERNET` is `tiny`, `small` or `base`, or `mini` for a small one to try things out; `IMAGE_SIZE`
sets the side of the images. transformers builds it from its configuration, with random weights and
without a download. To compile a trained one, replace the model in `Segmenter` by
`UperNetForSemanticSegmentation.from_pretrained("openmmlab/upernet-swin-tiny")`, and the data by
yours.

The Swin's linears are compressed, and of the head the convolutions of one pixel; larger ones stay
dense FP16 under the shipped rules. The auxiliary head of the training is left out, as in
deployment.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import SwinConfig, UperNetConfig, UperNetForSemanticSegmentation

from photos import CLASSES, batches_of, classes_per_pixel, normalized, size_named

Batch = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Size:
    """Widths and depths, as in the Swin paper; `channels` are those of the head."""

    embed_dim: int
    depths: tuple[int, ...]
    heads: tuple[int, ...]
    window: int = 7
    channels: int = 512
    image: int = 512


SIZES = {
    "mini": Size(32, (1, 1, 2, 1), (1, 2, 4, 8), window=4, channels=32, image=128),
    "tiny": Size(96, (2, 2, 6, 2), (3, 6, 12, 24)),
    "small": Size(96, (2, 2, 18, 2), (3, 6, 12, 24)),
    "base": Size(128, (2, 2, 18, 2), (4, 8, 16, 32), window=12),
}
SIZE = SIZES[size_named("UPERNET", ("tiny", *SIZES))]
IMAGE_SIZE = int(os.environ.get("IMAGE_SIZE", SIZE.image))


class Segmenter(nn.Module):
    """Images [B, 3, H, W] -> logits [B, classes + 1, H, W]; class 0 is "nothing"."""

    def __init__(self) -> None:
        super().__init__()
        backbone = SwinConfig(
            image_size=IMAGE_SIZE,
            embed_dim=SIZE.embed_dim,
            depths=list(SIZE.depths),
            num_heads=list(SIZE.heads),
            window_size=SIZE.window,
            out_features=["stage1", "stage2", "stage3", "stage4"],
        )
        config = UperNetConfig(
            backbone_config=backbone,
            hidden_size=SIZE.channels,
            use_auxiliary_head=False,
            num_labels=len(CLASSES) + 1,
        )
        self.upernet = UperNetForSemanticSegmentation(config)

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.upernet(images).logits
        return logits


def model() -> nn.Module:
    torch.manual_seed(0)
    return Segmenter().eval()


def example_inputs() -> tuple[Tensor, ...]:
    return (batches(2, seed=1)[0][0],)


def batches(count: int, seed: int, batch: int = 2) -> list[Batch]:
    """Batches of normalized images [batch, 3, size, size] and classes int64 [batch, size, size]."""
    return [
        (
            normalized([image for image, _ in part]),
            torch.stack([classes_per_pixel(target) for _, target in part]),
        )
        for part in batches_of(batch, count, IMAGE_SIZE, seed)
    ]


def train_data() -> list[Batch]:
    return batches(16, seed=2)


def calibration_data() -> list[Batch]:
    """Few images, as each is hundreds of tokens or more, and one at a time, as what is computed of
    them takes more memory than the weights."""
    return batches(4, seed=4, batch=1)


def eval_data() -> list[Batch]:
    return batches(4, seed=3, batch=1)


def loss(model: nn.Module, batch: Batch) -> Tensor:
    images, classes = batch
    return F.cross_entropy(model(images), classes)


def metrics(outputs: Tensor, batch: Batch) -> dict[str, Tensor]:
    """The share of pixels whose class is right, and the mean IoU of the classes that occur."""
    found, classes = outputs.argmax(dim=1), batch[1].to(outputs.device)
    overlaps = [
        ((found == index) & (classes == index)).sum()
        / ((found == index) | (classes == index)).sum()
        for index in classes.unique()
    ]
    return {
        "miou": torch.stack(overlaps).mean(),
        "pixel_accuracy": (found == classes).float().mean(),
    }
