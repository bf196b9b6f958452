"""`imagefolder:DIR`: one folder of images per class, or `train/` and `val/` of such folders."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from torch.utils.data import DataLoader, Dataset, Subset

from gpusq_compile.errors import InputError, nearest, relative_to_cwd
from gpusq_compile.model_source import ModelSource
from gpusq_compile.sources.class_folders import Split, has_image, read_classes, visible_folders
from gpusq_compile.sources.classes import match_classes
from gpusq_compile.sources.images import classified_image
from gpusq_compile.sources.model import LibraryModel

BATCH = 32
TRAIN = ("train", "training")
EVALUATION = ("val", "valid", "validation", "test")
HELD_OUT = 5
"""Of a folder without a split each fifth image of a class is held out for the evaluation."""


@dataclass(frozen=True)
class Unlabelled(Dataset[Any]):
    """The images alone, for a model without classes."""

    labelled: Any

    def __len__(self) -> int:
        return len(self.labelled)

    def __getitem__(self, index: int) -> Any:
        return self.labelled[index][0]


def image_folder(source: ModelSource, model: LibraryModel, root: Path) -> None:
    """Give `source` the images of a folder, with the model's own preprocessing.

    Raises:
        InputError: the folder has another form, or its classes are not the model's.
    """
    train, held_out = _splits(source, root, model.images.channels)
    everything = train or held_out
    assert everything is not None
    if train and held_out and (unknown := sorted(set(held_out.names) - set(everything.names))):
        raise InputError(
            "unknown-class",
            f"{held_out.shown} has the class '{unknown[0]}', which {everything.shown} has not",
            hint=f"did you mean '{close}'?"
            if (close := nearest(unknown[0], train.names))
            else None,
        )
    outputs = _outputs(source, model, everything)
    transform = classified_image(model.images)

    def samples(split: Split) -> Dataset[Any]:
        images = split.images
        images.transform = transform
        images.target_transform = [outputs.get(name, -1) for name in images.classes].__getitem__
        chosen = Subset(images, split.indices)
        return chosen if model.classes is not None else Unlabelled(chosen)

    batch = model.images.batch_size(BATCH)
    calibration = partial(DataLoader, samples(_spread(everything)), batch_size=batch)
    source.calibration_data = calibration
    if train is not None:
        source.train_data = partial(DataLoader, samples(train), batch_size=batch, shuffle=True)
    if held_out is not None:
        source.eval_data = partial(DataLoader, samples(held_out), batch_size=batch)


def _splits(source: ModelSource, root: Path, channels: int) -> tuple[Split | None, Split | None]:
    """The images to train on and those to evaluate on."""
    shown = relative_to_cwd(root)
    folders = visible_folders(root)
    train, held_out = _called(folders, TRAIN), _called(folders, EVALUATION)
    if train is None and held_out is None:
        _check_wrapper(root, folders)
        whole = read_classes(source, root, channels)
        _note_nested(source, whole)
        return _hold_out(source, whole)
    used = [place for place in (train, held_out) if place is not None]
    _note_others(source, shown, used, [place for place in folders if place not in used])
    if held_out is None:
        text = f"{shown} has no val/ folder, so accuracy is not measured"
        source.notes.append(("no-evaluation-images", text))
        source.data_forms = "imagefolder:DIR with val/ beside train/"
    if train is None:
        text = (
            f"{shown} has no train/ folder, so scales are calibrated on the images that are "
            "evaluated, which flatters the accuracy"
        )
        source.notes.append(("calibrated-on-evaluation", text))
        source.data_forms = "imagefolder:DIR with train/ beside val/"
    return (
        None if train is None else read_classes(source, train, channels),
        None if held_out is None else read_classes(source, held_out, channels),
    )


def _called(folders: list[Path], names: tuple[str, ...]) -> Path | None:
    """The folder of the first of these names, in small letters or any others."""
    for name in names:
        alike = [place for place in folders if place.name.casefold() == name]
        if alike:
            return next((place for place in alike if place.name == name), alike[0])
    return None


def _note_others(source: ModelSource, shown: str, used: list[Path], others: list[Path]) -> None:
    """Name the folders beside a split, which are not read."""
    if not others:
        return
    names = " and ".join(f"{place.name}/" for place in used)
    text = f"of {shown} {names} {'is' if len(used) == 1 else 'are'} read, and not " + ", ".join(
        f"{place.name}/" for place in others
    )
    for place in others:
        free = [names for names in (TRAIN, EVALUATION) if _called(used, names) is None]
        close = nearest(place.name.casefold(), [name for names in free for name in names])
        if close:
            text += f"; did you mean {place.name}/ to be {close}/?"
            break
    source.notes.append(("folders-left-out", text))


def _check_wrapper(root: Path, folders: list[Path]) -> None:
    """Raise InputError where the only folder is no class, but holds the folders that are meant."""
    if len(folders) != 1:
        return
    [only] = folders
    inner = visible_folders(only)
    split = _called(inner, TRAIN) or _called(inner, EVALUATION)
    if split or (len(inner) > 1 and not has_image(only)):
        raise InputError(
            "data-not-an-imagefolder",
            f"{relative_to_cwd(root)} has one folder, {only.name}/, which holds no image but "
            + _listed([f"{place.name}/" for place in inner]),
            hint=f"did you mean imagefolder:{relative_to_cwd(only)}?",
        )


def _note_nested(source: ModelSource, whole: Split) -> None:
    """Say so where each class has its images in folders of its own: these may be the classes."""
    start = len(os.path.join(whole.images.root, ""))
    paths = (path[start:].split(os.sep) for path, _ in whole.images.samples)
    deeper: set[str] = set()
    for _, name, *rest in paths:
        if not rest:
            return
        deeper.add(name)
    text = (
        f"the images of {whole.shown} lie a folder deeper: its classes are "
        f"{_listed(whole.names)}, and not {_listed(sorted(deeper))}; folders of a split are called "
        "train/ and val/"
    )
    source.notes.append(("classes-nested", text))


def _listed(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _hold_out(source: ModelSource, whole: Split) -> tuple[Split, Split | None]:
    """A part of each class for the evaluation: images seen in training would flatter it."""
    seen: dict[int, int] = {}
    train: list[int] = []
    held_out: list[int] = []
    for index, label in zip(whole.indices, whole.labels, strict=True):
        seen[label] = seen.get(label, 0) + 1
        (train if seen[label] % HELD_OUT else held_out).append(index)
    if not held_out:
        text = (
            f"{whole.shown} has no class of {HELD_OUT} images, so none is held out and accuracy "
            "is not measured"
        )
        source.notes.append(("no-evaluation-images", text))
        source.data_forms = "imagefolder:DIR with val/ beside train/"
        return whole, None
    text = (
        f"{len(held_out)} of {len(whole.indices)} images of {whole.shown} are held out for the "
        f"evaluation, each {HELD_OUT}th of a class; val/ beside train/ would say which"
    )
    source.facts.append(("images-held-out", text))
    return replace(whole, indices=train), replace(whole, indices=held_out)


def _spread(split: Split) -> Split:
    """The classes in turn: calibration reads the first batches alone, unshuffled."""
    by_class: dict[int, list[int]] = {}
    for index, label in zip(split.indices, split.labels, strict=True):
        by_class.setdefault(label, []).append(index)
    longest = max(map(len, by_class.values()))
    turns = [found[i] for i in range(longest) for found in by_class.values() if i < len(found)]
    return replace(split, indices=turns)


def _outputs(source: ModelSource, model: LibraryModel, everything: Split) -> dict[str, int]:
    if model.classes is None:
        return {}
    numbers = dict(enumerate(everything.names))
    outputs = match_classes(source, model.classes, numbers, everything.shown, numbered=False)
    return {name: outputs[number] for number, name in numbers.items()}
