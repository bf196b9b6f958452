"""The annotations in a file of COCO's format, checked before anything is trained on them.

Neither pycocotools nor torchvision checks them: of equal ids the last one holds, and a box outside
its image fails in the first training step, which does not name it. The format is that of
https://cocodataset.org/#format-data.
"""

from __future__ import annotations

import reprlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gpusq_compile.errors import InputError, Location, nearest, relative_to_cwd
from gpusq_compile.sources.images import open_image
from gpusq_compile.sources.json_files import JsonFile, is_whole, read_json
from gpusq_compile.sources.paths import nearest_path

CODE = "data-not-coco"
FORMAT = "COCO's format has images, annotations (image_id, category_id, bbox) and categories"
SINGULAR = {"images": "image", "annotations": "annotation", "categories": "category"}
LISTS = tuple(SINGULAR)
KEYS = frozenset(
    (
        *("id", "image_id", "category_id", "bbox", "area", "iscrowd", "segmentation"),
        *("file_name", "width", "height", "name", "supercategory"),
    )
)
"""What entries have in COCO's own files; any other key may be a mistyped one."""

BOX = "[x, y, width, height] in pixels"
WHOLE = "a whole number"
LARGEST = 1e9
"""Of a coordinate: NaN and infinity are none, and float32 has to hold its products."""
SMALLEST = 0.01
"""Pixels: of a smaller side float32 coordinates of a large image would leave nothing."""
ROUNDING = 1.0
"""Pixels by which a box may reach over the border where coordinates were rounded."""

Entry = dict[str, Any]


@dataclass(frozen=True)
class Objects:
    """The indices of a file's annotations by what a detector does with them.

    `flat` have no area in their image; `cut` are kept, but reach beyond its border.
    """

    kept: list[int]
    cut: list[int]
    flat: list[int]
    crowds: list[int]


def read_annotations(path: Path, images: Path) -> JsonFile:
    """Read a file of annotations whose every reference, box and image is there.

    An image whose size the file does not say gets its own.

    Raises:
        InputError: it is not of COCO's format, an id is there twice, a box is no box, or an image
            is not in the folder `images`; with the place in the file.
    """
    file = read_json(path, CODE)
    for what in LISTS:
        _check_list(file, what)
    ids = {what: _ids(file, what) for what in LISTS}
    _check_names(file)
    for index in range(len(file.content["images"])):
        _check_image(file, index, images)
    for index, entry in enumerate(file.content["annotations"]):
        for key, what in (("image_id", "images"), ("category_id", "categories")):
            _check_whole(file, "annotations", index, key)
            if entry[key] not in ids[what]:
                raise _wrong(file, "annotations", index, key, f"the id of one of the {what}")
        if not _is_box(entry.get("bbox")):
            raise _wrong(file, "annotations", index, "bbox", BOX)
        if min(entry["bbox"][2:]) < 0:
            raise _wrong(file, "annotations", index, "bbox", f"{BOX}, and no size below 0")
        image = file.content["images"][ids["images"][entry["image_id"]]]
        if _is_outside(entry["bbox"], image):
            size = f"{image['width']}x{image['height']}"
            expected = f"{BOX}, within its image of {size}"
            raise _wrong(file, "annotations", index, "bbox", expected)
        crowd = entry.get("iscrowd", 0)
        if not isinstance(crowd, int) or crowd not in (0, 1):
            raise _wrong(file, "annotations", index, "iscrowd", "0 or 1")
    return file


def count_objects(file: JsonFile) -> Objects:
    """Which objects a detector is trained on.

    Raises:
        InputError: none is left, or every box is smaller than a pixel.
    """
    images = {entry["id"]: entry for entry in file.content["images"]}
    annotations: list[Entry] = file.content["annotations"]
    objects = Objects([], [], [], [])
    for index, entry in enumerate(annotations):
        if entry.get("iscrowd"):
            objects.crowds.append(index)
            continue
        image = images[entry["image_id"]]
        if not has_area(entry["bbox"], image):
            objects.flat.append(index)
            continue
        objects.kept.append(index)
        x, y, width, height = entry["bbox"]
        over = (x + width - image["width"], y + height - image["height"])
        if max(-x, -y, *over) > ROUNDING:
            objects.cut.append(index)
    if not objects.kept:
        raise InputError(
            "no-objects",
            f"{file.shown} has no object to train on or to find: of {len(annotations)} annotations "
            f"{len(objects.crowds)} are crowds, and {len(objects.flat)} have no area",
            location=file.place("annotations", 0),
            hint=f"a bbox is {BOX}; `iscrowd: 1` is for groups that are not told apart",
        )
    if all(max(annotations[index]["bbox"]) <= 1 for index in objects.kept):
        raise _wrong(file, "annotations", objects.kept[0], "bbox", f"{BOX}, not shares of its size")
    return objects


def has_area(box: list[float], image: Entry) -> bool:
    """Whether a part of a box lies within its image."""
    x, y, width, height = box
    wide = min(x + width, image["width"]) - max(x, 0)
    high = min(y + height, image["height"]) - max(y, 0)
    return bool(min(wide, high) >= SMALLEST)


def _is_outside(box: list[float], image: Entry) -> bool:
    """Whether a box with an area has none of it in its image."""
    x, y, width, height = box
    away = x >= image["width"] or y >= image["height"] or x + width <= 0 or y + height <= 0
    return bool(width and height and away)


def described(file: JsonFile, index: int) -> str:
    """An annotation's box and image in words, with its place."""
    entry = file.content["annotations"][index]
    image = next(i for i in file.content["images"] if i["id"] == entry["image_id"])
    return (
        f"{file.place('annotations', index, 'bbox')}: annotation {entry['id']} with the bbox "
        f"{entry['bbox']} in {image['file_name']} of {image['width']}x{image['height']}"
    )


def check_outlines(file: JsonFile, origin: str, *, crowds: bool) -> None:
    """Raise InputError for the first object whose outline is missing or has another form.

    Args:
        origin: the model that is trained on outlines.
        crowds: whether those of crowds are read too.
    """
    images = {entry["id"]: entry for entry in file.content["images"]}
    for index, entry in enumerate(file.content["annotations"]):
        if entry.get("iscrowd") and not crowds:
            continue
        outline = entry.get("segmentation")
        if not outline:
            raise InputError(
                "no-outlines",
                f"{_named('annotations', index, entry)} has a box, but no segmentation",
                location=file.place("annotations", index),
                hint=f"{origin} is trained on objects' outlines",
            )
        if fault := _outline_fault(outline, images[entry["image_id"]]):
            raise InputError(
                CODE,
                f"{_named('annotations', index, entry)} has a segmentation that cannot be read: "
                + fault,
                location=file.place("annotations", index, "segmentation"),
            )


def _outline_fault(outline: Any, image: Entry) -> str | None:
    """Why an outline is none of its image in COCO's format, or None."""
    if isinstance(outline, list):
        for polygon in outline:
            good = isinstance(polygon, list) and all(map(_is_number, polygon))
            if not good or len(polygon) < 6 or len(polygon) % 2:
                return f"{reprlib.repr(polygon)} is no polygon [x, y, x, y, x, y, ...]"
        return _outside(outline, image)
    if not isinstance(outline, dict) or not {"size", "counts"} <= set(outline):
        return f"{reprlib.repr(outline)}, expected a list of polygons, or size and counts"
    size, counts = outline["size"], outline["counts"]
    if not isinstance(size, list) or len(size) != 2 or not all(map(is_whole, size)):
        return f"its size is {reprlib.repr(size)}, expected [height, width]"
    real = [image["height"], image["width"]]
    if size != real:
        return f"it is of an image of {size[1]}x{size[0]}, and its image has {real[1]}x{real[0]}"
    if isinstance(counts, list):
        # The library writes past the end of the mask for longer ones.
        if not all(is_whole(count) and count >= 0 for count in counts):
            return f"its counts are {reprlib.repr(counts)}, expected {WHOLE} for each run"
        if sum(counts) != size[0] * size[1]:
            return f"its counts are of {sum(counts)} pixels, and its image has {size[0] * size[1]}"
    elif not isinstance(counts, str):
        return f"its counts are {reprlib.repr(counts)}, expected a list or a text"
    return None


def _outside(polygons: list[list[float]], image: Entry) -> str | None:
    wide, high = image["width"], image["height"]
    for polygon in polygons:
        x, y = polygon[0::2], polygon[1::2]
        if max(x) > 0 and max(y) > 0 and min(x) < wide and min(y) < high:
            return None
    return f"it lies outside its image of {wide}x{high}"


def place_of_image(path: Path, number: int) -> Location:
    """Where a file of annotations has the image of an id. Reads it again: it may be large."""
    file = read_json(path, CODE)
    index = next(i for i, entry in enumerate(file.content["images"]) if entry["id"] == number)
    return file.place("images", index)


def _check_list(file: JsonFile, what: str) -> None:
    found = file.content.get(what)
    if isinstance(found, list) and found:
        return
    if what not in file.content:
        close = nearest(what, set(file.content) - set(LISTS))
        hint = f"did you mean '{close}' to be '{what}'?" if close else FORMAT
        raise InputError(CODE, f"{file.shown} has no {what}", hint=hint)
    text = f"{file.shown} has no {what}, but {reprlib.repr(found)}"
    raise InputError(CODE, text, location=file.place(what), hint=FORMAT)


def _ids(file: JsonFile, what: str) -> Mapping[int, int]:
    """The index of each id in a list; raises InputError for one that is there twice."""
    found: dict[int, int] = {}
    for index, entry in enumerate(file.content[what]):
        if not isinstance(entry, dict):
            text = f"{what}[{index}] is {reprlib.repr(entry)}, expected an object"
            raise InputError(CODE, text, location=file.place(what, index), hint=FORMAT)
        _check_whole(file, what, index, "id")
        if (other := found.setdefault(entry["id"], index)) != index:
            raise _twice(file, what, index, "id", other)
    return found


def _check_names(file: JsonFile) -> None:
    found: dict[str, int] = {}
    for index, entry in enumerate(file.content["categories"]):
        name = entry.get("name", entry["id"])
        if not isinstance(name, str) and not is_whole(name):
            raise _wrong(file, "categories", index, "name", "a text")
        # The categories of two files are matched by their names.
        if (other := found.setdefault(str(name), index)) != index:
            raise _twice(file, "categories", index, "name", other)


def _check_image(file: JsonFile, index: int, images: Path) -> None:
    entry = file.content["images"][index]
    name = entry.get("file_name")
    if not isinstance(name, str) or not name:
        raise _wrong(file, "images", index, "file_name", "a path within the folder of images")
    for key in ("width", "height"):
        if key in entry and not (is_whole(entry[key]) and entry[key] > 0):
            raise _wrong(file, "images", index, key, f"{WHOLE} of pixels above 0")
    path = images / name
    if path.is_file():
        if not {"width", "height"} <= set(entry):
            wide, high = open_image(path).size
            entry.update({"width": wide, "height": high} | entry)
        return
    hint = None
    if (images.parent / name).is_file():
        hint = f"file_name is the path within {relative_to_cwd(images)}/, without that folder"
    elif (close := _like(path)) and images in close.parents:
        hint = f"did you mean '{close.relative_to(images)}'?"
    raise InputError(
        "data-missing",
        f"no image at {relative_to_cwd(images)}/{name}, which {file.shown} names",
        location=file.place("images", index, "file_name"),
        hint=hint,
    )


def _like(path: Path) -> Path | None:
    """The file whose name differs in capitals alone, else the nearest one."""
    if path.parent.is_dir():
        for place in path.parent.iterdir():
            if place.name.casefold() == path.name.casefold():
                return place
    return nearest_path(path)


def _check_whole(file: JsonFile, what: str, index: int, key: str) -> None:
    if not is_whole(file.content[what][index].get(key)):
        raise _wrong(file, what, index, key, WHOLE)


def _wrong(file: JsonFile, what: str, index: int, key: str, expected: str) -> InputError:
    entry = file.content[what][index]
    name = _named(what, index, entry)
    if key in entry:
        text = f"{name} has the {key} {reprlib.repr(entry[key])}, expected {expected}"
        return InputError(CODE, text, location=file.place(what, index, key), hint=FORMAT)
    close = nearest(key, set(entry) - KEYS)
    return InputError(
        CODE,
        f"{name} has no {key}, expected {expected}",
        location=file.place(what, index),
        hint=f"did you mean '{close}' to be '{key}'?" if close else FORMAT,
    )


def _twice(file: JsonFile, what: str, index: int, key: str, other: int) -> InputError:
    value = reprlib.repr(file.content[what][index][key])
    return InputError(
        CODE,
        f"{what}[{index}] has the {key} {value}, which {what}[{other}] has too",
        location=file.place(what, index, key),
        hint=f"each {key} of {what} has to be there once: of two, one would be lost",
    )


def _named(what: str, index: int, entry: Entry) -> str:
    if not is_whole(entry.get("id")):
        return f"{what}[{index}]"
    return f"{SINGULAR[what]} {entry['id']}"


def _is_box(value: object) -> bool:
    return isinstance(value, list) and len(value) == 4 and all(map(_is_number, value))


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < LARGEST
