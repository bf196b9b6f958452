"""The losses of models that are no classifiers, on the batches that `sources.coco` makes.

Each is a `loss(model, batch)` as a model file may define it. Where a submodule alone is compiled,
`model` is the library's whole model, else the compiled graph, which has outputs alone.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._pytree import tree_leaves

from gpusq_compile.model_source import LossFunction


def torchvision_detection_loss(model: nn.Module, batch: Any) -> torch.Tensor:
    """The sum of a torchvision detector's own losses, which it gives in training mode."""
    model.train()
    images, targets = batch
    losses: dict[str, torch.Tensor] = model(images, targets)
    return torch.stack([value.reshape(()) for value in losses.values()]).sum()


def pixel_loss(output: str | None = None, ignored: int = 255) -> LossFunction:
    """Cross-entropy per pixel, the logits resized to the labels int64 [batch, height, width].

    Args:
        output: the key of the logits in the model's outputs; None where they are the outputs.
        ignored: the label of pixels that do not count.
    """

    def loss(model: nn.Module, batch: Any) -> torch.Tensor:
        images, labels = batch
        found = model(images)
        logits = found if output is None else found[output]
        logits = F.interpolate(logits, labels.shape[-2:], mode="bilinear", align_corners=False)
        if bool((labels == ignored).all()):
            return 0.0 * logits.sum()  # The mean over no pixel would be NaN.
        return F.cross_entropy(logits, labels, ignore_index=ignored)

    return loss


def features_alone(model: nn.Module, batch: Any) -> torch.Tensor:
    """Zero, so that the distances at the distillation taps are the whole loss."""
    images = batch[0] if isinstance(batch, (tuple, list)) else batch
    leaves = [leaf for leaf in tree_leaves(model(images)) if isinstance(leaf, torch.Tensor)]
    return torch.stack([0.0 * leaf.float().mean() for leaf in leaves]).sum()


def transformers_detection_loss(module: Any) -> LossFunction | None:
    """The loss that a transformers detector computes itself, or None where that needs more than
    its logits [batch, queries, classes] and boxes [batch, queries, 4].

    With the whole model compiled it is computed from its two outputs; the losses of the layers
    before the last (`auxiliary_loss`) take part only where a submodule is compiled.
    """
    function = module.loss_function
    config = copy.copy(module.config)
    config.auxiliary_loss = False
    original = type(module).forward

    def from_outputs(found: Any, targets: Any) -> torch.Tensor:
        logits, boxes = found["logits"], found["pred_boxes"]
        loss: torch.Tensor = function(logits, targets, logits.device, boxes, config)[0]
        return loss

    try:
        from_outputs(*_probe(config.num_labels))
    except ImportError:
        pass  # Of a library for training alone, which the loss then names.
    except Exception:
        # Which arguments a model's loss takes is known to its forward() alone.
        return None

    def loss(model: nn.Module, batch: Any) -> torch.Tensor:
        images, targets = batch
        if isinstance(model, torch.fx.GraphModule):
            return from_outputs(model(images), targets)
        found: torch.Tensor = original(model, images, labels=targets).loss
        return found

    return loss


def _probe(classes: int) -> tuple[dict[str, torch.Tensor], list[dict[str, torch.Tensor]]]:
    """Outputs for one image with four queries, and one box in it."""
    outputs = {"logits": torch.zeros(1, 4, classes + 1), "pred_boxes": torch.full((1, 4, 4), 0.5)}
    target = {"class_labels": torch.zeros(1, dtype=torch.int64), "boxes": torch.full((1, 4), 0.5)}
    return outputs, [target]
