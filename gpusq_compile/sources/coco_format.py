"""Whether annotations are in COCO's format; what is not, with its place in the file.

Source: https://cocodataset.org/#format-data.
"""

from __future__ import annotations

import math
import reprlib
from collections.abc import Iterator, Mapping
from typing import Any

Keys = tuple[str | int, ...]
"""The way to a value: the key or index at each depth."""

KINDS = {"images": "image", "annotations": "annotation", "categories": "category"}


def faults(content: Mapping[str, Any]) -> Iterator[tuple[Keys, str]]:
    """What keeps the content of a file from being COCO's, in the order of the checks."""
    for kind in KINDS:
        entries = content.get(kind)
        if not isinstance(entries, list) or not entries:
            yield (kind,), f"has no {kind}"
            return
        yield from _bad_ids(kind, entries)
    yield from _bad_images(content["images"])
    yield from _bad_annotations(content)


def _bad_ids(kind: str, entries: list[Any]) -> Iterator[tuple[Keys, str]]:
    first: dict[int, int] = {}
    for index, entry in enumerate(entries):
        if not isinstance(entry, dict):
            found = reprlib.repr(entry)
            yield (kind, index), f"has {found} among the {kind}, which is no object"
            return
        number = entry.get("id")
        if not isinstance(number, int) or isinstance(number, bool):
            found = "no id" if "id" not in entry else f"the id {reprlib.repr(number)}"
            keys: Keys = (kind, index, "id") if "id" in entry else (kind, index)
            yield keys, f"has {found} in {kind}[{index}], expected a whole number"
            return
        if first.setdefault(number, index) != index:
            text = f"has the id {number} in {kind}[{first[number]}] and in {kind}[{index}]"
            yield (kind, index, "id"), f"{text}; each {KINDS[kind]} needs one of its own"


def _bad_images(images: list[dict[str, Any]]) -> Iterator[tuple[Keys, str]]:
    for index, image in enumerate(images):
        place: Keys = ("images", index)
        name = image.get("file_name")
        if not isinstance(name, str) or not name:
            found = "no file_name" if "file_name" not in image else f"the file_name {name!r}"
            keys = (*place, "file_name") if "file_name" in image else place
            yield keys, f"has {found} for image {image['id']}, expected the name of its file"
        for key in ("width", "height"):
            if key in image and not (_is_number(image[key]) and image[key] > 0):
                found = reprlib.repr(image[key])
                text = f"has the {key} {found} for image {image['id']}, expected its pixels"
                yield (*place, key), text


def _bad_annotations(content: Mapping[str, Any]) -> Iterator[tuple[Keys, str]]:
    images = {image["id"]: image for image in content["images"]}
    categories = {category["id"] for category in content["categories"]}
    for index, annotation in enumerate(content["annotations"]):
        place: Keys = ("annotations", index)
        name = f"has annotation {annotation['id']}"
        for key, known in (("category_id", categories), ("image_id", images.keys())):
            number = annotation.get(key)
            # A list, say, is no key at all.
            if not isinstance(number, int) or number not in known:
                keys = (*place, key) if key in annotation else place
                yield keys, f"{name} of {key} {reprlib.repr(number)}, which is not there"
                return
        box = annotation.get("bbox")
        if not isinstance(box, list) or len(box) != 4 or not all(map(_is_number, box)):
            keys = (*place, "bbox") if "bbox" in annotation else place
            yield keys, f"{name} with the bbox {reprlib.repr(box)}, not [x, y, width, height]"
            return
        if min(box[2:]) < 0:
            yield (*place, "bbox"), f"{name} with the bbox {box}, of a negative size"
        image = images[annotation["image_id"]]
        if is_outside(box, image):
            size = f"{image['width']} x {image['height']}"
            yield (*place, "bbox"), f"{name} with the bbox {box}, outside of its image of {size}"


def is_outside(box: list[float], image: Mapping[str, Any]) -> bool:
    """Whether a box with an area has none of it in the image, as far as that says its size."""
    x, y, width, height = box
    if not (width and height and "width" in image and "height" in image):
        return False
    return x >= image["width"] or y >= image["height"] or x + width <= 0 or y + height <= 0


def is_cut(box: list[float], image: Mapping[str, Any]) -> bool:
    """Whether a box reaches beyond its image by more than what rounding explains: one pixel."""
    if "width" not in image or "height" not in image:
        return False
    x, y, width, height = box
    return min(x, y) < -1 or x + width > image["width"] + 1 or y + height > image["height"] + 1


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
