"""Deformable DETR with a ResNet-50 ("Deformable DETR: Deformable Transformers for End-to-End Object
Detection", ICLR 2021).

    gpusq-compile examples/deformable_detr_r50.py --rules int8 -o out/deformable_detr

transformers builds it from its configuration, with random weights and without a download. To
compile a trained one, replace the model in `Detector` by
`DeformableDetrForObjectDetection.from_pretrained("SenseTime/deformable-detr")`, what `config`
returns by `DeformableDetrConfig.from_pretrained` of the same name, and the data by yours.
`DEFORMABLE_DETR=tiny` is a small one for trying things out; `IMAGE_SIZE` sets the side of the
images.

The transformer's linears are compressed, those that place the sampling points among them, and of
the backbone the convolutions of one pixel. Larger ones stay dense FP16 under the shipped rules.
"""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.ops import box_convert
from transformers import DeformableDetrConfig, DeformableDetrForObjectDetection, ResNetConfig
from transformers.loss.loss_deformable_detr import DeformableDetrForObjectDetectionLoss

from photos import CLASSES, Target, batches_of, best_overlap, normalized, relative_boxes, size_named

Batch = tuple[Tensor, list[Target]]

TINY = size_named("DEFORMABLE_DETR", ("r50", "tiny")) == "tiny"
IMAGE_SIZE = int(os.environ.get("IMAGE_SIZE", "128" if TINY else "256"))


def config() -> DeformableDetrConfig:
    if not TINY:
        return DeformableDetrConfig(num_labels=len(CLASSES))
    backbone = ResNetConfig(
        embedding_size=16,
        hidden_sizes=[16, 32, 64, 128],
        depths=[1, 1, 1, 1],
        layer_type="basic",
        out_features=["stage2", "stage3", "stage4"],
    )
    return DeformableDetrConfig(
        use_timm_backbone=False,
        backbone_config=backbone,
        num_labels=len(CLASSES),
        num_queries=12,
        d_model=64,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=128,
        decoder_ffn_dim=128,
        num_feature_levels=3,
        encoder_n_points=2,
        decoder_n_points=2,
    )


class Detector(nn.Module):
    """Images [B, 3, H, W] -> `logits` [B, queries, classes] and `boxes` [B, queries, 4].

    Boxes are centre x, centre y, width and height in shares of the image; a query that
    found nothing has no class with a large logit.
    """

    def __init__(self) -> None:
        super().__init__()
        self.detr = DeformableDetrForObjectDetection(config())

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        found = self.detr(images)
        return {"logits": found.logits, "boxes": found.pred_boxes}


def model() -> nn.Module:
    torch.manual_seed(0)
    return Detector().eval()


def example_inputs() -> tuple[Tensor, ...]:
    return (batches(2, seed=1)[0][0],)


def batches(count: int, seed: int, batch: int = 2) -> list[Batch]:
    """Batches of normalized images [batch, 3, size, size] and what is on each."""
    return [
        (normalized([image for image, _ in part]), [t for _, t in part])
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
    """Deformable DETR's loss: focal, L1 and GIoU after bipartite matching, of the last layer."""
    images, targets = batch
    found = model(images)
    labels = [{"class_labels": t["labels"], "boxes": relative_boxes(t)} for t in targets]
    total, _, _ = DeformableDetrForObjectDetectionLoss(
        found["logits"], labels, images.device, found["boxes"], config()
    )
    return torch.as_tensor(total)


def metrics(outputs: dict[str, Tensor], batch: Any) -> dict[str, float]:
    """The mean IoU of the true boxes with the best of the boxes that were found."""
    boxes = box_convert(outputs["boxes"], "cxcywh", "xyxy") * IMAGE_SIZE
    targets = batch[1]
    pairs = zip(boxes, targets, strict=True)
    overlaps = [best_overlap(found, target) for found, target in pairs]
    return {"overlap": sum(overlaps) / len(overlaps)}
