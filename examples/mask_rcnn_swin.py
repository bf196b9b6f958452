"""Mask R-CNN on a Swin transformer (ICCV 2017; "Swin Transformer", ICCV 2021).

    SWIN=tiny gpusq-compile examples/mask_rcnn_swin.py --rules examples/swin_backbone_int8.yaml

The rules file compiles the `backbone` alone, Swin and feature pyramid, and so does
`--rules int8 --scope backbone`. It trains within torchvision's detector, by its own five losses;
`swin_fpn.py` has the sizes to choose from. Weights are random: load yours in `model()`.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torchvision.models.detection import MaskRCNN
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor

from swin_fpn import (
    ANCHORS,
    IMAGE_SIZE,
    NUM_CLASSES,
    SIZE,
    Batch,
    SwinFPN,
    batches,
    detector_loss,
    overlap,
)


def model() -> nn.Module:
    """torchvision's Mask R-CNN; it resizes each image to the one size that was compiled."""
    torch.manual_seed(0)
    return MaskRCNN(
        SwinFPN(),
        min_size=IMAGE_SIZE,
        max_size=IMAGE_SIZE,
        fixed_size=(IMAGE_SIZE, IMAGE_SIZE),
        rpn_anchor_generator=AnchorGenerator(ANCHORS, ((0.5, 1.0, 2.0),) * len(ANCHORS)),
        rpn_pre_nms_top_n_train=SIZE.proposals,
        rpn_pre_nms_top_n_test=SIZE.proposals,
        rpn_post_nms_top_n_train=SIZE.proposals,
        rpn_post_nms_top_n_test=SIZE.proposals,
        rpn_batch_size_per_image=SIZE.rois,
        box_head=TwoMLPHead(SIZE.channels * 7 * 7, SIZE.hidden),
        box_predictor=FastRCNNPredictor(SIZE.hidden, NUM_CLASSES),
        box_batch_size_per_image=SIZE.rois,
        mask_head=MaskRCNNHeads(SIZE.channels, [SIZE.channels] * 4, 1),
        mask_predictor=MaskRCNNPredictor(SIZE.channels, SIZE.channels, NUM_CLASSES),
    ).eval()


def example_inputs() -> tuple[list[Tensor]]:
    return (batches(2, seed=1)[0][0],)


def train_data() -> list[Batch]:
    return batches(16, seed=2)


def calibration_data() -> list[Batch]:
    """Few images, as each is hundreds of tokens or more, and one at a time, as what is computed of
    them takes more memory than the weights."""
    return batches(4, seed=4, batch=1)


def eval_data() -> list[Batch]:
    return batches(4, seed=3, batch=1)


def loss(model: nn.Module, batch: Batch) -> Tensor:
    return detector_loss(model, batch)


def metrics(outputs: list[dict[str, Tensor]], batch: Batch) -> dict[str, float]:
    return overlap(outputs, batch)
