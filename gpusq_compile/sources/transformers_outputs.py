"""A transformers model that takes `pixel_values` alone and gives what a graph can say."""

from __future__ import annotations

from collections.abc import Mapping
from types import MethodType
from typing import Any

import torch

from gpusq_compile.sources.model import Task

KEPT: Mapping[Task, tuple[str, ...]] = {
    "classification": ("logits",),
    "segmentation": ("logits",),
    "detection": ("logits", "pred_boxes"),
}
"""The outputs that a task is about; of other models all tensors are kept."""


def take_pixels_alone(module: Any, task: Task) -> None:
    """Let `module.forward(pixel_values)` return a tensor, or a dictionary of tensors by name.

    Masks and other optional inputs are those of images that fill their whole tensor. The module
    stays what it is, so that its tensors keep their names.
    """
    original = type(module).forward

    def forward(self: Any, pixel_values: torch.Tensor) -> Any:
        return plain(original(self, pixel_values), task)

    module.forward = MethodType(forward, module)


def plain(found: Any, task: Task) -> Any:
    """The outputs of a task: the one tensor, or those by name in a dictionary."""
    if isinstance(found, torch.Tensor):
        return found
    names = KEPT.get(task)
    if names is not None:
        kept = {name: found[name] for name in names}
        return kept if len(kept) > 1 else kept[names[0]]
    kept = _tensors(found)
    # Where there are predictions, the rest are features on their way.
    predictions = {
        name: value for name, value in kept.items() if "logits" in name or "predicted" in name
    }
    return predictions or kept


def _tensors(found: Any) -> dict[str, torch.Tensor]:
    """Every tensor of an output once; those of a tuple are numbered."""
    kept: dict[str, torch.Tensor] = {}
    for name, value in found.items():
        items = [(name, value)]
        if isinstance(value, (tuple, list)):
            items = [(f"{name}_{index}", item) for index, item in enumerate(value)]
        for key, item in items:
            known = any(item is other for other in kept.values())
            if isinstance(item, torch.Tensor) and not known:
                kept[key] = item
    return kept
