"""`coco:DIR`: images with objects' boxes and outlines in COCO's annotation format.

Read are COCO's own layout, `annotations/instances_{train,val}*.json` beside the folders of images
`{train,val}*/`, and the simple one, `annotations.json` beside `images/`.
"""

from __future__ import annotations

import contextlib
import io
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

from gpusq_compile.errors import InputError, Location, nearest, relative_to_cwd
from gpusq_compile.model_source import ModelSource
from gpusq_compile.sources.classes import match_classes
from gpusq_compile.sources.coco_format import faults, is_cut
from gpusq_compile.sources.images import open_image, whole_image
from gpusq_compile.sources.json_files import read_json
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
    train = _find(root, "train")
    held_out = _find(root, "val")
    simple = root / "annotations.json"
    if train is None and held_out is None and simple.is_file():
        train = (simple, _images(root, simple, [root / "images", root]))
    if train is None and held_out is None:
        raise InputError(
            "data-not-coco",
            f"{relative_to_cwd(root)} has no annotations/instances_train*.json and no "
            "annotations.json",
            hint=FORM,
        )
    batch = model.images.batch_size(BATCH)
    chosen = train or held_out
    assert chosen is not None
    first = _open(*chosen)
    if model.task == "detection":
        _tell_objects(source, first, chosen[0], train=train is not None)
    outputs = _outputs(source, model, first)
    gather = _gather(model)
    samples = Samples(first, model, outputs)
    source.calibration_data = partial(DataLoader, samples, batch_size=batch, collate_fn=gather)
    if train is not None:
        source.train_data = partial(
            DataLoader, samples, batch_size=batch, shuffle=True, collate_fn=gather
        )
    if held_out is None:
        text = f"{relative_to_cwd(root)} has no instances_val*.json, so nothing is evaluated"
        source.notes.append(("no-evaluation-images", text))
    else:
        other = first if train is None else _open(*held_out)
        again = Samples(other, model, _same_outputs(first, outputs, other))
        source.eval_data = partial(DataLoader, again, batch_size=batch, collate_fn=gather)


def _find(root: Path, split: str) -> tuple[Path, Path] | None:
    """The annotations and the folder of images of a split, in COCO's own layout."""
    found = sorted((root / "annotations").glob(f"instances_{split}*.json"))
    if not found:
        return None
    name = found[0].stem.removeprefix("instances_")
    places = [root / name, root / "images" / name, *sorted(root.glob(f"{split}*")), root / "images"]
    return found[0], _images(root, found[0], places)


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


def _open(annotations: Path, images: Path) -> Any:
    """torchvision's `CocoDetection`, checked for what every image needs."""
    datasets = require("torchvision.datasets")
    require("pycocotools.coco")
    shown = relative_to_cwd(annotations)
    try:
        # The library prints how far it is.
        with contextlib.redirect_stdout(io.StringIO()):
            dataset = datasets.CocoDetection(str(images), str(annotations))
    except json.JSONDecodeError as error:
        raise InputError(
            "data-not-coco", f"{shown}:{error.lineno}:{error.colno}: no JSON: {error.msg}"
        ) from None
    except UnicodeDecodeError as error:
        raise _not_coco(shown, f"cannot be read: {error}") from None
    except (KeyError, TypeError, AssertionError, AttributeError) as error:
        # The library names a key at best.
        _check_format(annotations, read_json(annotations).content)
        raise _not_coco(shown, f"cannot be read: {type(error).__name__}: {error}") from None
    _check_format(annotations, dataset.coco.dataset)
    for image in dataset.coco.imgs.values():
        if not (images / image["file_name"]).is_file():
            raise InputError(
                "data-missing",
                f"no image at {relative_to_cwd(images)}/{image['file_name']}, which {shown} names",
            )
    return dataset


def _check_format(annotations: Path, content: Mapping[str, Any]) -> None:
    """Raise InputError for the first fault of a file's content, at its place."""
    for keys, text in faults(content):
        place = read_json(annotations).place(*keys)
        raise _not_coco(relative_to_cwd(annotations), text, place)


def _not_coco(shown: str, found: str, location: Location | None = None) -> InputError:
    return InputError(
        "data-not-coco",
        f"{shown} {found}",
        location=location,
        hint="COCO's format has images, annotations (image_id, category_id, bbox) and categories",
    )


def _tell_objects(source: ModelSource, dataset: Any, annotations: Path, *, train: bool) -> None:
    """Say which annotations a detector does not see as they are.

    Raises:
        InputError: it would see none.
    """
    api, shown = dataset.coco, relative_to_cwd(annotations)
    entries = list(api.anns.values())
    crowds = [a for a in entries if a.get("iscrowd")]
    flat = [a for a in entries if not a.get("iscrowd") and not is_object(a)]
    cut = [a for a in entries if is_object(a) and is_cut(a["bbox"], api.imgs[a["image_id"]])]
    left_out = f"{len(crowds)} of crowds and {len(flat)} without an area"
    if len(crowds) + len(flat) == len(entries) and train:
        raise InputError(
            "no-objects",
            f"{shown} has no annotation to train a detector on: {left_out}",
            hint="a detector learns from single objects: iscrowd 0, and a box with an area",
        )
    if crowds or flat:
        text = f"of the {len(entries)} annotations of {shown}, {left_out} are left out"
        source.facts.append(("objects-left-out", text))
    if cut:
        text = (
            f"{len(cut)} of the {len(entries)} boxes of {shown} reach beyond their images and are "
            f"cut, the first of them annotation {cut[0]['id']}"
        )
        source.notes.append(("boxes-cut", text))


def is_object(annotation: Mapping[str, Any]) -> bool:
    """Whether it is a single object with an area, which is what a detector is trained on."""
    return not annotation.get("iscrowd") and min(annotation["bbox"][2:]) > 0


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
    """Images in the model's size, each with a target in the form of the model's task."""

    dataset: Any
    model: LibraryModel
    outputs: dict[int, int]

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Any:
        api = self.dataset.coco
        number = self.dataset.ids[index]
        path = Path(self.dataset.root) / api.loadImgs(number)[0]["file_name"]
        image = open_image(path, self.model.images.channels)
        self._check_size(api.imgs[number], path, (image.width, image.height))
        annotations = api.loadAnns(api.getAnnIds(number))
        pixels = whole_image(self.model.images)(image)
        size = (image.height, image.width)
        if self.model.task == "segmentation":
            return pixels, self._labels(annotations, size)
        if self.model.task == "detection":
            return pixels, self._objects(annotations, size)
        return pixels, None

    def _check_size(self, entry: Mapping[str, Any], path: Path, size: tuple[int, int]) -> None:
        """Raise InputError unless the file is of the size that boxes and outlines are given in."""
        said = entry.get("width", size[0]), entry.get("height", size[1])
        if said != size:
            raise InputError(
                "image-size-differs",
                f"{relative_to_cwd(path)} is {size[0]} x {size[1]} pixels, but the annotations say "
                f"{said[0]} x {said[1]} of image {entry['id']}",
                hint="its boxes would lie elsewhere; pixels count as stored, whatever an EXIF "
                "orientation says",
            )

    def _objects(self, annotations: list[Any], size: tuple[int, int]) -> Target:
        """Boxes and classes of an image's single objects; those without an area are left out."""
        kept = [annotation for annotation in annotations if is_object(annotation)]
        classes = torch.tensor([self.outputs[a["category_id"]] for a in kept], dtype=torch.int64)
        boxes = torch.tensor([a["bbox"] for a in kept], dtype=torch.float32).reshape(-1, 4)
        height, width = size
        boxes = boxes / torch.tensor([width, height, width, height], dtype=torch.float32)
        corners = torch.cat([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], dim=1).clamp(0, 1)
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
        if not annotation.get("segmentation"):
            raise InputError(
                "no-outlines",
                f"annotation {annotation.get('id')} has a box, but no segmentation",
                hint=f"{self.model.origin} is trained on objects' outlines",
            )
        try:
            mask = torch.from_numpy(self.dataset.coco.annToMask(annotation))
        except Exception as error:  # The library raises whatever it stumbles over.
            raise _not_coco(
                f"annotation {annotation.get('id')}",
                f"has a segmentation that cannot be read: {error}",
            ) from None
        image = self.dataset.coco.imgs[annotation["image_id"]]
        if mask.shape != (image["height"], image["width"]):
            raise _not_coco(
                f"annotation {annotation['id']}",
                f"has a segmentation of {mask.shape[1]} x {mask.shape[0]} pixels for an image of "
                f"{image['width']} x {image['height']}",
            )
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
