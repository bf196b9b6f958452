"""Small folders of real photos: crops of the two that scikit-learn ships, a temple and a flower."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from sklearn.datasets import load_sample_images

NAMES = ("temple", "flower")
WIDTH, HEIGHT = 160, 120
CATEGORIES = {7: "temple", 9: "flower"}
"""Ids as COCO's are: neither from zero nor without gaps."""


def crops(kind: int, count: int) -> list[Image.Image]:
    """Different parts of one photo, 160 x 120."""
    photo = Image.fromarray(load_sample_images().images[kind])
    return [photo.crop((30 * i, 20 * i, 30 * i + WIDTH, 20 * i + HEIGHT)) for i in range(count)]


def make_image_folder(root: Path, counts: dict[str, int] | None = None) -> Path:
    """A folder of photos for each class: by default six of each."""
    for index, (name, count) in enumerate((counts or dict.fromkeys(NAMES, 6)).items()):
        (root / name).mkdir(parents=True)
        for number, image in enumerate(crops(index % 2, count)):
            image.save(root / name / f"{number}.jpg")
    return root


def make_coco(root: Path, splits: tuple[str, ...] = ("train2017", "val2017")) -> Path:
    """Annotated photos in COCO's own layout; without splits in the simple one."""
    for split in splits or ("",):
        images = root / (split or "images")
        images.mkdir(parents=True)
        file = root / (f"annotations/instances_{split}.json" if split else "annotations.json")
        file.parent.mkdir(exist_ok=True)
        file.write_text(json.dumps(annotate(images)))
    return root


def annotate(folder: Path, count: int = 4) -> dict[str, Any]:
    """Save photos, and say where in them objects are: none in the first, one in the second, ..."""
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for number in range(count):
        crops(number % 2, number + 1)[-1].save(folder / f"{number}.jpg")
        images.append(
            {"id": number + 1, "file_name": f"{number}.jpg", "width": WIDTH, "height": HEIGHT}
        )
        for index in range(number):
            x, y, w, h = 10 + 30 * index, 20 + 10 * index, 40, 30
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": number + 1,
                    "category_id": list(CATEGORIES)[index % 2],
                    "bbox": [x, y, w, h],
                    "area": w * h,
                    "iscrowd": 0,
                    "segmentation": [[x, y, x + w, y, x + w, y + h, x, y + h]],
                }
            )
    categories = [{"id": number, "name": name} for number, name in CATEGORIES.items()]
    return {"images": images, "annotations": annotations, "categories": categories}


def save_16_bit(path: Path) -> None:
    """A grey photo with 16 bits a pixel."""
    grey = np.asarray(crops(0, 1)[0].convert("L"))
    Image.fromarray(grey.astype(np.uint16) * 257).save(path)
