"""What every library's model is described by, before it gets weights and data."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import nn

from gpusq_compile.model_source import LossFunction, MetricsFunction

Task = Literal["classification", "detection", "segmentation", "features"]
"""What a model's outputs are; `features` is everything that no known loss can be computed from."""

PRETRAINED = "pretrained"
"""The value of `--weights` that has the library load its own."""
PIXELS = 224 * 224
"""Of the images that the batch sizes are meant for; larger images come in smaller batches."""


@dataclass(frozen=True)
class Images:
    """How an image becomes the model's input, float32 [channels, height, width].

    `size` is (height, width). `edge` is the length to which an image's shorter side is resized
    before `size` is cut out of its middle; None squeezes the whole image into `size`. `own` is the
    library's own preprocessing of one PIL image and goes before all of these; it serves images
    that are classified whole, where nothing has a place in them. `blue_first`: the channels
    are in the order blue, green, red.
    """

    size: tuple[int, int]
    mean: tuple[float, ...] = (0.485, 0.456, 0.406)
    std: tuple[float, ...] = (0.229, 0.224, 0.225)
    channels: int = 3
    edge: int | None = None
    interpolation: str = "bilinear"
    own: Callable[[Any], torch.Tensor] | None = None
    blue_first: bool = False

    def batch_size(self, full: int) -> int:
        """`full` images of 224 x 224, or as many pixels of larger ones; two at least."""
        return max(2, min(full, full * PIXELS // (self.size[0] * self.size[1])))


@dataclass(frozen=True)
class Classes:
    """The classes that a model's outputs stand for.

    `count` is the number of outputs and `first` the first that stands for a class: in front of it
    is the background. `names` are the known names of each class, best first.
    """

    count: int
    names: Mapping[int, tuple[str, ...]] = field(default_factory=dict)
    first: int = 0


@dataclass
class LibraryModel:
    """A library's model, and what has to be known to feed and train it.

    `listed` says that the model takes a list of images [3, height, width] in [0, 1] and gives a
    list of detections, as torchvision's detectors do. `masks` says that its targets need the
    objects' masks. `loss` and `metrics` read batches of the model's task; None where the
    cross-entropy and top-1 serve. `random` says that the weights are random, `notes` are warnings
    and `facts` what a person should know, as (code, text).
    """

    origin: str
    module: nn.Module
    task: Task
    images: Images
    classes: Classes | None = None
    random: bool = True
    listed: bool = False
    masks: bool = False
    ignored_label: int = 255
    loss: LossFunction | None = None
    metrics: MetricsFunction | None = None
    scopes: tuple[str, ...] = ()
    notes: list[tuple[str, str]] = field(default_factory=list)
    facts: list[tuple[str, str]] = field(default_factory=list)
