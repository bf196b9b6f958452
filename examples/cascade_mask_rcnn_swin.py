"""Cascade Mask R-CNN on a Swin transformer ("Cascade R-CNN: Delving into High Quality Object
Detection", CVPR 2018).

    SWIN=tiny gpusq-compile examples/cascade_mask_rcnn_swin.py \\
        --rules examples/swin_backbone_int8.yaml

Three box heads follow each other. Each is trained on the boxes that the one before it has refined,
with a stricter IoU between what counts as an object and what does not, and with finer regression
targets. A box's score is the mean of the three. torchvision has no such model; its heads, matchers
and box coders are the parts that this one is built of. The backbone and its sizes are in
`swin_fpn.py`; as there, it is what is compiled, and weights are random.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torchvision.models.detection.faster_rcnn import TwoMLPHead
from torchvision.models.detection.roi_heads import (
    RoIHeads,
    fastrcnn_loss,
    maskrcnn_inference,
    maskrcnn_loss,
)
from torchvision.ops import clip_boxes_to_image

import mask_rcnn_swin as plain
from swin_fpn import NUM_CLASSES, SIZE, Target

example_inputs = plain.example_inputs
train_data = plain.train_data
calibration_data = plain.calibration_data
eval_data = plain.eval_data
loss = plain.loss
metrics = plain.metrics

IOU_THRESHOLDS = (0.5, 0.6, 0.7)
BOX_WEIGHTS = ((10.0, 10.0, 5.0, 5.0), (20.0, 20.0, 10.0, 10.0), (30.0, 30.0, 15.0, 15.0))
"""One over the standard deviations of each stage's regression targets: later ones are finer."""

Size = tuple[int, int]


class BoxPredictor(nn.Module):
    """Features [N, hidden] -> logits [N, classes] and box deltas [N, 4 * classes].

    One regression serves all classes, as in the paper; it is repeated for each of them, which is
    what torchvision's loss and box coder read.
    """

    def __init__(self) -> None:
        super().__init__()
        self.classes = nn.Linear(SIZE.hidden, NUM_CLASSES)
        self.deltas = nn.Linear(SIZE.hidden, 4)

    def forward(self, features: Tensor) -> tuple[Tensor, Tensor]:
        return self.classes(features), self.deltas(features).repeat(1, NUM_CLASSES)


class CascadeRoIHeads(nn.Module):
    """Takes the place of torchvision's `RoIHeads`, made of three of them and its mask branch."""

    def __init__(self, heads: RoIHeads) -> None:
        super().__init__()
        self.stages = nn.ModuleList(
            RoIHeads(
                heads.box_roi_pool,
                TwoMLPHead(SIZE.channels * 7 * 7, SIZE.hidden),
                BoxPredictor(),
                fg_iou_thresh=threshold,
                bg_iou_thresh=threshold,
                batch_size_per_image=SIZE.rois,
                positive_fraction=0.25,
                bbox_reg_weights=weights,
                score_thresh=heads.score_thresh,
                nms_thresh=heads.nms_thresh,
                detections_per_img=heads.detections_per_img,
            )
            for threshold, weights in zip(IOU_THRESHOLDS, BOX_WEIGHTS, strict=True)
        )
        self.mask_roi_pool = heads.mask_roi_pool
        self.mask_head = heads.mask_head
        self.mask_predictor = heads.mask_predictor

    def forward(
        self,
        features: dict[str, Tensor],
        proposals: list[Tensor],
        image_shapes: list[Size],
        targets: list[Target] | None = None,
    ) -> tuple[list[Target], dict[str, Tensor]]:
        if self.training:
            assert targets is not None
            return [], self.losses(features, proposals, image_shapes, targets)
        return self.detections(features, proposals, image_shapes), {}

    def losses(
        self,
        features: dict[str, Tensor],
        proposals: list[Tensor],
        image_shapes: list[Size],
        targets: list[Target],
    ) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}
        for index, stage in enumerate(self.stages):
            boxes, matched, labels, wanted = stage.select_training_samples(proposals, targets)
            logits, deltas = predict(stage, features, boxes, image_shapes)
            classes, shifts = fastrcnn_loss(logits, deltas, labels, wanted)
            found |= {f"loss_classifier_{index}": classes, f"loss_box_reg_{index}": shifts}
            proposals = refined(stage, deltas, boxes, image_shapes)
        # Masks are learned on the boxes of the last stage that hold an object.
        inside = [kinds > 0 for kinds in labels]
        objects = [kept[chosen] for kept, chosen in zip(boxes, inside, strict=True)]
        found["loss_mask"] = maskrcnn_loss(
            self.masks(features, objects, image_shapes),
            objects,
            [target["masks"] for target in targets],
            [target["labels"] for target in targets],
            [indices[chosen] for indices, chosen in zip(matched, inside, strict=True)],
        )
        return found

    def detections(
        self, features: dict[str, Tensor], proposals: list[Tensor], image_shapes: list[Size]
    ) -> list[Target]:
        scores = []
        for stage in self.stages:
            boxes = proposals
            logits, deltas = predict(stage, features, boxes, image_shapes)
            scores.append(logits.softmax(dim=1))
            proposals = refined(stage, deltas, boxes, image_shapes)
        # The logarithm of probabilities is logits of them, which is what the last stage reads.
        logits = torch.stack(scores).mean(dim=0).log()
        columns = stage.postprocess_detections(logits, deltas, boxes, image_shapes)
        names = ("boxes", "scores", "labels")
        found = [dict(zip(names, row, strict=True)) for row in zip(*columns, strict=True)]
        masks = self.masks(features, [image["boxes"] for image in found], image_shapes)
        per_image = maskrcnn_inference(masks, [image["labels"] for image in found])
        return [{**image, "masks": own} for image, own in zip(found, per_image, strict=True)]

    def masks(
        self, features: dict[str, Tensor], boxes: list[Tensor], image_shapes: list[Size]
    ) -> Tensor:
        """Mask logits [N, classes, 28, 28] of all images' boxes, one after the other."""
        pooled = self.mask_roi_pool(features, boxes, image_shapes)
        logits: Tensor = self.mask_predictor(self.mask_head(pooled))
        return logits


def predict(
    stage: RoIHeads, features: dict[str, Tensor], boxes: list[Tensor], image_shapes: list[Size]
) -> tuple[Tensor, Tensor]:
    """Logits [N, classes] and deltas [N, 4 * classes] of all images' boxes."""
    pooled = stage.box_roi_pool(features, boxes, image_shapes)
    found: tuple[Tensor, Tensor] = stage.box_predictor(stage.box_head(pooled))
    return found


def refined(
    stage: RoIHeads, deltas: Tensor, boxes: list[Tensor], image_shapes: list[Size]
) -> list[Tensor]:
    """The boxes moved by a stage's regression: what the next stage starts from."""
    moved = stage.box_coder.decode(deltas[:, :4].detach(), boxes)[:, 0]
    per_image = moved.split([len(own) for own in boxes])
    return [
        clip_boxes_to_image(own, size) for own, size in zip(per_image, image_shapes, strict=True)
    ]


def model() -> nn.Module:
    """torchvision's Mask R-CNN with the cascade in place of its one box head."""
    detector = plain.model()
    detector.roi_heads = CascadeRoIHeads(detector.roi_heads)
    return detector.eval()
