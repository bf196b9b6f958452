"""`coco:DIR`: images with objects' boxes and outlines in COCO's annotation format.

Read are COCO's own layout, `annotations/instances_{train,val}*.json` beside the folders of images
`{train,val}*/`, and the simple one, `annotations.json` beside `images/`.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

from gpusq_compile.errors import InputError, nearest, relative_to_cwd
from gpusq_compile.model_source import ModelSource
from gpusq_compile.sources.classes import match_classes
from gpusq_compile.sources.coco_file import (
    BOX,
    CODE,
    check_outlines,
    count_objects,
    described,
    has_area,
    place_of_image,
    read_annotations,
)
from gpusq_compile.sources.images import open_image, whole_image
from gpusq_compile.sources.json_files import JsonFile
from gpusq_compile.sources.model import LibraryModel
from gpusq_compile.sources.require import require

BATCH = 16
FORM = (
    "coco:DIR has DIR/annotations/instances_train*.json and DIR/train*/, or DIR/annotations.json "
    "and DIR/images/"
)

Target = dict[str, torch.Tensor]


def coco(source: ModelSource, model: LibraryModel, root: Path) -> None:
    """Give `source` annotated images in the form that the model's own loss reads.

    Raises:
        InputError: the folder has another form, a file is missing or damaged, or the categories
            are not the model's.
    """
    train = _find(source, root, "train")
    held_out = _find(source, root, "val")
    simple = root / "annotations.json"
    if train is None and held_out is None and simple.is_file():
        train = (simple, _images(root, simple, [root / "images", root]))
    known = train or held_out
    if known is None:
        raise _no_annotations(root)
    batch = model.images.batch_size(BATCH)
    first = _open(source, model, *known)
    outputs = _outputs(source, model, first)
    gather = _gather(model)
    samples = Samples(first, model, outputs, known[0])
    source.calibration_data = partial(DataLoader, samples, batch_size=batch, collate_fn=gather)
    if train is not None:
        source.train_data = partial(
            DataLoader, samples, batch_size=batch, shuffle=True, collate_fn=gather
        )
    if held_out is None:
        text = f"{relative_to_cwd(root)} has no instances_val*.json, so nothing is evaluated"
        source.notes.append(("no-evaluation-images", text))
        source.data_forms = "coco:DIR with annotations/instances_val*.json and val*/"
        return
    if train is None:
        text = (
            f"{relative_to_cwd(root)} has no instances_train*.json, so scales are calibrated on "
            "the images that are evaluated, which flatters what is measured"
        )
        source.notes.append(("calibrated-on-evaluation", text))
        source.data_forms = "coco:DIR with annotations/instances_train*.json and train*/"
    other = first if train is None else _open(source, model, *held_out)
    again = Samples(other, model, _same_outputs(first, outputs, other), held_out[0])
    source.eval_data = partial(DataLoader, again, batch_size=batch, collate_fn=gather)


def _find(source: ModelSource, root: Path, split: str) -> tuple[Path, Path] | None:
    """The annotations and the folder of images of a split, in COCO's own layout."""
    found = sorted((root / "annotations").glob(f"instances_{split}*.json"))
    if not found:
        return None
    if others := ", ".join(path.name for path in found[1:]):
        text = f"of {relative_to_cwd(root)}/annotations {found[0].name} is read, and not {others}"
        source.notes.append(("files-left-out", text))
    name = found[0].stem.removeprefix("instances_")
    places = [root / name, root / "images" / name, *sorted(root.glob(f"{split}*")), root / "images"]
    return found[0], _images(root, found[0], places)


def _no_annotations(root: Path) -> InputError:
    there = sorted(
        str(path.relative_to(root))
        for pattern in ("*.json", "*/*.json")
        for path in root.glob(pattern)
    )
    return InputError(
        CODE,
        f"{relative_to_cwd(root)} has no annotations/instances_train*.json and no annotations.json"
        + (f", but {there[0]}" if there else ""),
        hint=FORM,
    )


def _images(root: Path, annotations: Path, places: list[Path]) -> Path:
    for place in places:
        if place.is_dir():
            return place
    raise InputError(
        "data-missing",
        f"no folder with the images of {relative_to_cwd(annotations)}: neither "
        + " nor ".join(dict.fromkeys(relative_to_cwd(place) for place in places)),
        hint=FORM,
    )


def _open(source: ModelSource, model: LibraryModel, annotations: Path, images: Path) -> Any:
    """torchvision's `CocoDetection` of annotations that have been checked."""
    datasets = require("torchvision.datasets")
    require("pycocotools.coco")
    file = read_annotations(annotations, images)
    if model.task == "segmentation" or model.masks:
        check_outlines(file, model.origin, crowds=model.task == "segmentation")
    if model.task == "detection":
        _note_objects(source, file)
    # Without a file, and given what is in it: the library would read it once more, unchecked.
    dataset = datasets.CocoDetection(str(images), None)
    dataset.coco.dataset = file.content
    # The library prints how far it is.
    with contextlib.redirect_stdout(io.StringIO()):
        dataset.coco.createIndex()
    dataset.ids = sorted(dataset.coco.imgs)
    return dataset


def _note_objects(source: ModelSource, file: JsonFile) -> None:
    """Say which objects are left out or cut; one remark for all that are alike."""
    objects = count_objects(file)
    count = len(file.content["annotations"])
    if objects.crowds:
        text = (
            f"{len(objects.crowds)} of {count} annotations of {file.shown} are crowds, which are "
            "no single objects and are left out"
        )
        source.facts.append(("crowds-left-out", text))
    if objects.flat:
        text = (
            f"{len(objects.flat)} of {count} boxes of {file.shown} have no area and are left out; "
            f"the first is {described(file, objects.flat[0])}"
        )
        source.notes.append(("objects-left-out", text))
    if objects.cut:
        text = (
            f"{len(objects.cut)} of {count} boxes of {file.shown} reach beyond their image and are "
            f"cut off at its border; the first is {described(file, objects.cut[0])}; COCO's boxes "
            f"are {BOX}, not two corners"
        )
        source.notes.append(("boxes-cut", text))


def _outputs(source: ModelSource, model: LibraryModel, dataset: Any) -> dict[int, int]:
    if model.classes is None:
        return {}
    what = relative_to_cwd(Path(dataset.root).parent)
    return match_classes(source, model.classes, _names(dataset), what, numbered=True)


def _names(dataset: Any) -> dict[int, str]:
    return {number: str(c.get("name", number)) for number, c in dataset.coco.cats.items()}


def _same_outputs(first: Any, outputs: dict[int, int], other: Any) -> dict[int, int]:
    """The outputs of another split's categories: those of the same names, whatever their ids.

    Raises:
        InputError: one of them is none of the first split's.
    """
    if not outputs:
        return {}
    by_name = {name: outputs[number] for number, name in _names(first).items()}
    unknown = [name for name in _names(other).values() if name not in by_name]
    if unknown:
        close = nearest(unknown[0], by_name)
        raise InputError(
            "unknown-class",
            f"the evaluation's category '{unknown[0]}' is none of the training's {len(by_name)}",
            hint=f"did you mean '{close}'?" if close else None,
        )
    return {number: by_name[name] for number, name in _names(other).items()}


@dataclass(frozen=True)
class Samples(Dataset[Any]):
    """Images in the model's size, each with a target in the form of the model's task.

    `dataset` is torchvision's `CocoDetection`, whose own items are not used: it opens every image
    with three channels, and names none that is damaged. `annotations` is the file it was made of.
    """

    dataset: Any
    model: LibraryModel
    outputs: dict[int, int]
    annotations: Path

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Any:
        api = self.dataset.coco
        number = self.dataset.ids[index]
        entry = api.imgs[number]
        path = Path(self.dataset.root) / entry["file_name"]
        image = open_image(path, self.model.images.channels)
        self._check_size(entry, image.size, path)
        annotations = api.loadAnns(api.getAnnIds(number))
        pixels = whole_image(self.model.images)(image)
        size = (image.height, image.width)
        if self.model.task == "segmentation":
            return pixels, self._labels(annotations, size)
        if self.model.task == "detection":
            return pixels, self._objects(annotations, size)
        return pixels, None

    def _check_size(self, entry: Any, found: tuple[int, int], path: Path) -> None:
        """Boxes and outlines of an image of another size would be of other places in it."""
        said = (entry["width"], entry["height"])
        if said == found:
            return
        turned = said == found[::-1]
        raise InputError(
            "image-size-differs",
            f"{relative_to_cwd(path)} is {found[0]}x{found[1]}, and {self.annotations.name} says "
            f"{said[0]}x{said[1]}",
            location=place_of_image(self.annotations, entry["id"]),
            hint="images are read as their pixels are stored; an EXIF orientation turns none: "
            "store them turned"
            if turned
            else "give the images that were annotated, or correct width and height",
        )

    def _objects(self, annotations: list[Any], size: tuple[int, int]) -> Target:
        """Boxes and classes of an image's single objects; those without an area are left out."""
        images = self.dataset.coco.imgs
        kept = [
            annotation
            for annotation in annotations
            if not annotation.get("iscrowd")
            and has_area(annotation["bbox"], images[annotation["image_id"]])
        ]
        boxes = torch.tensor([a["bbox"] for a in kept], dtype=torch.float32).reshape(-1, 4)
        height, width = size
        boxes = boxes / torch.tensor([width, height, width, height], dtype=torch.float32)
        corners = torch.cat([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], dim=1).clamp(0, 1)
        classes = torch.tensor([self.outputs[a["category_id"]] for a in kept], dtype=torch.int64)
        if not self.model.listed:
            sides = corners[:, 2:] - corners[:, :2]
            return {
                "class_labels": classes,
                "boxes": torch.cat([corners[:, :2] + sides / 2, sides], dim=1),
            }
        high, wide = self.model.images.size
        target = {"boxes": corners * torch.tensor([wide, high, wide, high]), "labels": classes}
        if self.model.masks:
            found = [self._mask(annotation) for annotation in kept]
            target["masks"] = torch.stack(found) if found else torch.zeros(0, high, wide).byte()
        return target

    def _labels(self, annotations: list[Any], size: tuple[int, int]) -> torch.Tensor:
        """The class of each pixel, int64 [height, width]; what nothing covers is not counted."""
        labels = torch.full(self.model.images.size, self.model.ignored_label)
        # Small objects lie on top of large ones.
        for annotation in sorted(annotations, key=lambda a: -a["bbox"][2] * a["bbox"][3]):
            labels[self._mask(annotation).bool()] = self.outputs[annotation["category_id"]]
        return labels

    def _mask(self, annotation: Any) -> torch.Tensor:
        """The object's outline in the model's size, uint8 [height, width]."""
        try:
            mask = torch.from_numpy(self.dataset.coco.annToMask(annotation))
        except Exception as error:  # The library raises whatever it stumbles over.
            raise InputError(
                CODE,
                f"annotation {annotation['id']} of {relative_to_cwd(self.annotations)} has a "
                f"segmentation that cannot be read: {error}",
            ) from None
        resized = torch.nn.functional.interpolate(
            mask[None, None].float(), self.model.images.size, mode="nearest-exact"
        )
        return resized[0, 0].byte()


def _gather(model: LibraryModel) -> Callable[[list[Any]], Any]:
    """How samples become a batch: images stacked, or listed as torchvision's detectors want."""

    def gather(samples: list[Any]) -> Any:
        images = [image for image, _ in samples]
        targets = [target for _, target in samples]
        if model.listed:
            return images, targets
        pixels = torch.stack(images)
        if model.task == "segmentation":
            return pixels, torch.stack(targets)
        return (pixels, targets) if model.task == "detection" else pixels

    return gather
