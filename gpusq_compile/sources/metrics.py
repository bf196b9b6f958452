"""Metrics of models that are no classifiers: cheap ones, which show what compression costs.

They are no substitute for a benchmark's own evaluation, such as the mean average precision.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch.nn.functional as F

from gpusq_compile.model_source import MetricsFunction

MOST_BOXES = 100
"""Detections of an image that count, as in COCO's recall."""
OVERLAP = 0.5


def pixel_accuracy(output: str | None = None, ignored: int = 255) -> MetricsFunction:
    """The share of the labelled pixels whose class is right."""

    def metrics(outputs: Any, batch: Any) -> Mapping[str, float]:
        labels = batch[1]
        logits = outputs if output is None else outputs[output]
        logits = F.interpolate(logits, labels.shape[-2:], mode="bilinear", align_corners=False)
        counted = labels != ignored
        right = (logits.argmax(dim=1) == labels) & counted
        return {"pixel_accuracy": float(right.sum()) / max(1, int(counted.sum()))}

    return metrics


def found_boxes(outputs: Any, batch: Any) -> Mapping[str, float]:
    """The recall of a torchvision detector's boxes, corners in pixels."""
    return _recall(
        [(found["boxes"], found["labels"], found["scores"]) for found in outputs],
        [(target["boxes"], target["labels"]) for target in batch[1]],
    )


def found_queries(outputs: Any, batch: Any) -> Mapping[str, float]:
    """The recall of a transformers detector's boxes, centres and sizes relative to the image."""
    from torchvision.ops import box_convert

    targets = batch[1]
    found = []
    for logits, boxes in zip(outputs["logits"], outputs["pred_boxes"], strict=True):
        scores, labels = logits.softmax(dim=-1).max(dim=-1)
        found.append((box_convert(boxes, "cxcywh", "xyxy"), labels, scores))
    true = [(box_convert(t["boxes"], "cxcywh", "xyxy"), t["class_labels"]) for t in targets]
    return _recall(found, true)


def _recall(found: Any, true: Any) -> Mapping[str, float]:
    """The share of the true boxes that one of the best detections of their class overlaps."""
    from torchvision.ops import box_iou

    hits = boxes = 0
    for (places, labels, scores), (where, what) in zip(found, true, strict=True):
        boxes += len(where)
        best = scores.argsort(descending=True)[:MOST_BOXES]
        if len(where) == 0 or len(best) == 0:
            continue
        overlaps = box_iou(where, places[best]) >= OVERLAP
        same = what[:, None] == labels[best][None]
        hits += int((overlaps & same).any(dim=1).sum())
    return {"recall_50": hits / boxes if boxes else 1.0}
