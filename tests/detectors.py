"""Real models for other tasks than classification, small enough to train for a few steps."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.detection import FasterRCNN
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.ops import MultiScaleRoIAlign, box_iou

from tests.models import Block, seeded

DIM = 32
SIZE = 64
PATCH = 8
Target = dict[str, Tensor]


class ViTBody(nn.Module):
    """Images [B, 3, 64, 64] -> a feature map [B, 32, 8, 8] under the name `0`."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, DIM, kernel_size=PATCH, stride=PATCH)
        self.place = nn.Parameter(0.02 * torch.randn(1, (SIZE // PATCH) ** 2, DIM))
        self.layers = nn.ModuleList(Block(DIM, 2, "fused", "gelu") for _ in range(2))
        self.last_norm = nn.LayerNorm(DIM)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        x = self.stem(x)
        tokens = x.flatten(2).transpose(1, 2) + self.place
        for layer in self.layers:
            tokens = layer(tokens)
        return {"0": self.last_norm(tokens).transpose(1, 2).view_as(x)}


class Backbone(nn.Module):
    """The body and a neck with batch norm, whose running statistics are buffers."""

    def __init__(self) -> None:
        super().__init__()
        self.body = ViTBody()
        self.neck = nn.Conv2d(DIM, DIM, kernel_size=1)
        self.norm = nn.BatchNorm2d(DIM)
        self.out_channels = DIM

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return OrderedDict({"0": F.relu(self.norm(self.neck(self.body(x)["0"])))})


def tiny_detector() -> FasterRCNN:
    """torchvision's Faster R-CNN on a small vision transformer; random weights, two classes."""

    def build() -> FasterRCNN:
        return FasterRCNN(
            Backbone(),
            min_size=SIZE,
            max_size=SIZE,
            rpn_anchor_generator=AnchorGenerator(((16, 32),), ((1.0,),)),
            box_roi_pool=MultiScaleRoIAlign(["0"], output_size=3, sampling_ratio=1),
            box_head=nn.Sequential(nn.Flatten(), nn.Linear(DIM * 9, 64), nn.ReLU()),
            box_predictor=BoxPredictor(),
            rpn_post_nms_top_n_train=32,
            rpn_post_nms_top_n_test=8,
            box_batch_size_per_image=16,
        )

    detector: FasterRCNN = seeded(build)
    return detector


class BoxPredictor(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.classes = nn.Linear(64, 3)
        self.boxes = nn.Linear(64, 12)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.classes(x), self.boxes(x)


def squares(batches: int, size: int = 2, seed: int = 0) -> list[tuple[list[Tensor], list[Target]]]:
    """Images of different sizes with one bright square each, and where it is."""
    generator = torch.Generator().manual_seed(seed)
    found = []
    for index in range(batches):
        pictures, targets = [], []
        for _ in range(size):
            # Of one shape, so that the model resizes them all to 64 x 64.
            side = SIZE if index % 2 else 48
            picture = 0.1 * torch.rand(3, side, side, generator=generator)
            x, y = torch.randint(0, side // 2, (2,), generator=generator).tolist()
            edge = side // 3
            kind = int(torch.randint(1, 3, (1,), generator=generator))
            picture[kind - 1, y : y + edge, x : x + edge] += 0.8
            box = torch.tensor([[x, y, x + edge, y + edge]], dtype=torch.float32)
            pictures.append(picture)
            targets.append({"boxes": box, "labels": torch.tensor([kind])})
        found.append((pictures, targets))
    return found


def detector_loss(model: nn.Module, batch: Any) -> Tensor:
    """The sum of the detector's own losses, as a training script of torchvision takes it."""
    model.train()
    pictures, targets = batch
    losses: dict[str, Tensor] = model(pictures, targets)
    return torch.stack(list(losses.values())).sum()


def best_overlap(outputs: Any, batch: Any) -> dict[str, float]:
    """Mean IoU of the true box with the best of the boxes that were found."""
    overlaps = [
        float(box_iou(found["boxes"].detach(), target["boxes"]).max())
        if len(found["boxes"])
        else 0.0
        for found, target in zip(outputs, batch[1], strict=True)
    ]
    return {"overlap": sum(overlaps) / len(overlaps)}


class TinySegmenter(nn.Module):
    """Images [B, 3, 64, 64] -> one of two classes per pixel, as logits [B, 2, 64, 64]."""

    def __init__(self) -> None:
        super().__init__()
        self.body = ViTBody()
        self.decode = nn.Linear(DIM, 2 * PATCH * PATCH)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.body(x)["0"].flatten(2).transpose(1, 2)
        side = SIZE // PATCH
        y = self.decode(tokens).view(-1, side, side, PATCH, PATCH, 2)
        return y.permute(0, 5, 1, 3, 2, 4).reshape(-1, 2, SIZE, SIZE)


def masks(batches: int, size: int = 4, seed: int = 0) -> list[tuple[Tensor, Tensor]]:
    """Images [size, 3, 64, 64], and int64 [size, 64, 64]: which pixels are bright."""
    generator = torch.Generator().manual_seed(seed)
    found = []
    for _ in range(batches):
        coarse = torch.rand(size, 1, 8, 8, generator=generator)
        mask = F.interpolate((coarse > 0.6).float(), scale_factor=PATCH)
        noise = 0.1 * torch.randn(size, 3, SIZE, SIZE, generator=generator)
        found.append((mask + noise, mask[:, 0].long()))
    return found


def pixel_loss(model: nn.Module, batch: Any) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])


def pixel_accuracy(outputs: Any, batch: Any) -> dict[str, Tensor]:
    return {"pixel_accuracy": (outputs.argmax(dim=1) == batch[1]).float().mean()}
