"""Two real photographs with the outlines of what is on them: data for detection and segmentation.

scikit-learn ships both. The outlines were drawn by hand, in pixels of the photographs. A sample is
a random window, flipped half of the time and a little brighter or darker, so that no two are the
same and there is something to learn.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import torch
from PIL import Image, ImageDraw
from sklearn.datasets import load_sample_image
from torch import Tensor
from torch.nn import functional as F
from torchvision.ops import box_convert, box_iou

CLASSES = ("tower", "flower", "tree")
MEAN = torch.tensor([0.485, 0.456, 0.406])[:, None, None]
STD = torch.tensor([0.229, 0.224, 0.225])[:, None, None]
SMALLEST_SHARE = 0.3
"""An object counts where at least this share of it lies in the window."""

Target = dict[str, Tensor]
"""`boxes` float32 [n, 4] as x1, y1, x2, y2 in pixels, `labels` int64 [n], indices into `CLASSES`,
`masks` uint8 [n, size, size]."""

Outline = tuple[tuple[int, int], ...]


def size_named(variable: str, sizes: Sequence[str]) -> str:
    """The size of an example that an environment variable names; the first one by default."""
    name = os.environ.get(variable, sizes[0])
    if name not in sizes:
        raise ValueError(f"{variable}={name}: the sizes are {', '.join(dict.fromkeys(sizes))}")
    return name


# fmt: off
TOWER: Outline = (
    (197, 30), (213, 30), (214, 55), (225, 75), (262, 98), (320, 120), (318, 133), (296, 136),
    (297, 162), (329, 172), (327, 184), (318, 186), (319, 226), (328, 230), (326, 245), (351, 252),
    (348, 264), (340, 268), (342, 300), (350, 308), (346, 322), (371, 333), (366, 345), (340, 365),
    (318, 380), (318, 400), (250, 395), (205, 385), (205, 365), (150, 345), (76, 338), (76, 320),
    (82, 290), (64, 276), (66, 262), (98, 250), (95, 236), (102, 228), (98, 188), (85, 185),
    (85, 170), (122, 160), (120, 136), (97, 131), (97, 118), (160, 92), (190, 65),
)
TREE: Outline = (
    (600, 137), (640, 160), (640, 427), (560, 427), (565, 300), (548, 270), (552, 240), (546, 225),
    (560, 205), (575, 180),
)
DAHLIA: Outline = (
    (318, 85), (350, 92), (385, 105), (410, 120), (430, 150), (443, 190), (445, 225), (430, 265),
    (428, 290), (408, 315), (400, 330), (370, 345), (340, 358), (305, 360), (265, 350), (230, 340),
    (205, 322), (188, 295), (172, 260), (168, 220), (175, 180), (187, 160), (200, 125), (240, 103),
    (290, 97),
)
LOWER_FLOWER: Outline = (
    (290, 405), (320, 395), (338, 376), (360, 380), (400, 380), (432, 382), (442, 405), (468, 427),
    (292, 427),
)
# fmt: on

PHOTOGRAPHS: dict[str, tuple[tuple[int, Outline], ...]] = {
    "china.jpg": ((0, TOWER), (2, TREE)),
    "flower.jpg": ((1, DAHLIA), (1, LOWER_FLOWER)),
}


@lru_cache(maxsize=1)
def photographs() -> list[tuple[Tensor, Tensor, Tensor]]:
    """Of each photograph: pixels in [0, 1] [3, 427, 640], masks [n, 427, 640], labels [n]."""
    found = []
    for name, objects in PHOTOGRAPHS.items():
        pixels = load_sample_image(name)
        masks = []
        for _, outline in objects:
            picture = Image.new("L", (pixels.shape[1], pixels.shape[0]))
            ImageDraw.Draw(picture).polygon(outline, fill=1)
            masks.append(torch.from_numpy(np.array(picture)))
        labels = torch.tensor([label for label, _ in objects])
        image = torch.from_numpy(pixels.copy()).permute(2, 0, 1).float() / 255
        found.append((image, torch.stack(masks).float(), labels))
    return found


def sample(size: int, generator: torch.Generator) -> tuple[Tensor, Target]:
    """A window of a photograph with at least one object: pixels in [0, 1] [3, size, size]."""
    while True:
        which = int(torch.randint(len(PHOTOGRAPHS), (), generator=generator))
        image, masks, labels = photographs()[which]
        height, width = image.shape[1:]
        side = int(torch.randint(height // 2, height + 1, (), generator=generator))
        top = int(torch.randint(height - side + 1, (), generator=generator))
        left = int(torch.randint(width - side + 1, (), generator=generator))
        window = (slice(None), slice(top, top + side), slice(left, left + side))
        inside = masks[window].sum(dim=(1, 2)) >= SMALLEST_SHARE * masks.sum(dim=(1, 2))
        if not bool(inside.any()):
            continue
        both = torch.cat([image[window], masks[window][inside]])[None]
        both = F.interpolate(both, size=(size, size), mode="bilinear", antialias=True)[0]
        if float(torch.rand((), generator=generator)) < 0.5:
            both = both.flip(-1)
        gain = 0.8 + 0.4 * float(torch.rand((), generator=generator))
        shapes = both[3:] > 0.5
        target = {
            "boxes": torch.stack([enclosing_box(shape) for shape in shapes]),
            "labels": labels[inside],
            "masks": shapes.to(torch.uint8),
        }
        return (both[:3] * gain).clamp(0, 1), target


def enclosing_box(shape: Tensor) -> Tensor:
    """The box [4] around the True pixels of a shape [H, W]."""
    rows, columns = shape.any(dim=1).nonzero(), shape.any(dim=0).nonzero()
    return torch.stack([columns[0, 0], rows[0, 0], columns[-1, 0] + 1, rows[-1, 0] + 1]).float()


def samples(count: int, size: int, seed: int) -> list[tuple[Tensor, Target]]:
    """`count` samples that are a function of `seed`."""
    generator = torch.Generator().manual_seed(seed)
    return [sample(size, generator) for _ in range(count)]


def batches_of(batch: int, count: int, size: int, seed: int) -> list[list[tuple[Tensor, Target]]]:
    """`count` samples in batches of `batch`."""
    found = samples(count, size, seed)
    return [found[start : start + batch] for start in range(0, count, batch)]


def normalized(images: list[Tensor]) -> Tensor:
    """Images in [0, 1] -> one batch [B, 3, H, W] with ImageNet's mean 0 and deviation 1."""
    return (torch.stack(images) - MEAN) / STD


def classes_per_pixel(target: Target) -> Tensor:
    """int64 [size, size]: 0 where nothing was outlined, else one more than the object's label."""
    found = torch.zeros(target["masks"].shape[1:], dtype=torch.long)
    for mask, label in zip(target["masks"], target["labels"], strict=True):
        found[mask.bool()] = label + 1
    return found


def relative_boxes(target: Target) -> Tensor:
    """The boxes [n, 4] as centre x, centre y, width, height, in shares of the image."""
    size = target["masks"].shape[-1]
    found: Tensor = box_convert(target["boxes"], "xyxy", "cxcywh") / size
    return found


def best_overlap(boxes: Tensor, target: Target) -> float:
    """Mean over the objects of the IoU with the best of some boxes x1, y1, x2, y2 [m, 4]."""
    if not len(boxes):
        return 0.0
    return float(box_iou(target["boxes"].to(boxes), boxes).max(dim=1).values.mean())
