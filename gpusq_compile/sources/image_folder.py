"""`imagefolder:DIR`: one folder of images per class, or `train/` and `val/` of such folders."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from torch.utils.data import DataLoader, Dataset

from gpusq_compile.errors import InputError, nearest, relative_to_cwd
from gpusq_compile.model_source import ModelSource
from gpusq_compile.sources.classes import match_classes
from gpusq_compile.sources.images import classified_image, open_image
from gpusq_compile.sources.model import LibraryModel
from gpusq_compile.sources.paths import readable_files
from gpusq_compile.sources.require import require

BATCH = 32
TRAIN = ("train", "training")
EVALUATION = ("val", "valid", "validation", "test")
SPLITS = (*TRAIN, *EVALUATION)
HELD_OUT = 5
"""Of a folder without a split each fifth image of a class is held out for the evaluation."""
FORM = "an image folder holds one folder of images per class, or train/ and val/ of such folders"


@dataclass(frozen=True)
class Samples(Dataset[Any]):
    """Images and the model's outputs that they belong to; -1 where it has no classes."""

    files: list[tuple[Path, int]]
    transform: Any
    channels: int
    labelled: bool

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> Any:
        path, label = self.files[index]
        image = self.transform(open_image(path, self.channels))
        return (image, label) if self.labelled else image


def image_folder(source: ModelSource, model: LibraryModel, root: Path) -> None:
    """Give `source` the images of a folder, with the model's own preprocessing.

    Raises:
        InputError: the folder has another form, or its classes are not the model's.
    """
    train, held_out = _splits(source, root)
    everything = train or held_out
    assert everything is not None
    outputs = _outputs(source, model, everything.folder, everything.names)
    transform = classified_image(model.images)

    def samples(split: Split) -> Samples:
        files = [(path, outputs.get(name, -1)) for path, name in split.files]
        return Samples(files, transform, model.images.channels, model.classes is not None)

    batch = model.images.batch_size(BATCH)
    calibration = partial(DataLoader, samples(_spread(everything)), batch_size=batch)
    source.calibration_data = calibration
    if train is not None:
        source.train_data = partial(DataLoader, samples(train), batch_size=batch, shuffle=True)
    if held_out is not None:
        if unknown := sorted(set(held_out.names) - set(everything.names)):
            raise InputError(
                "unknown-class",
                f"{held_out.folder} has the class '{unknown[0]}', which {everything.folder} "
                "has not",
            )
        source.eval_data = partial(DataLoader, samples(held_out), batch_size=batch)


@dataclass(frozen=True)
class Split:
    """The files of a folder with the names of their classes."""

    folder: str
    files: list[tuple[Path, str]]

    @property
    def names(self) -> list[str]:
        return sorted({name for _, name in self.files})


def _splits(source: ModelSource, root: Path) -> tuple[Split | None, Split | None]:
    """The images to train on and those to evaluate on."""
    folders = _folders(root)
    train, held_out = _named(folders, TRAIN), _named(folders, EVALUATION)
    if train is None and held_out is None:
        _check_no_wrapper(root, folders)
        return _hold_out(source, _read(source, root))
    shown = relative_to_cwd(root)
    if train is None:
        text = f"{shown} has no train/ folder, so calibration sees the images that are evaluated"
        source.notes.append(("calibrated-on-evaluation", text))
    if held_out is None:
        text = f"{shown} has no val/ folder, so accuracy is not measured"
        source.notes.append(("no-evaluation-images", text))
    used = {train, held_out}
    for folder in folders:
        if folder in used:
            continue
        # What is there for a third purpose is passed over on purpose.
        meant = None if folder.name.lower() in EVALUATION else nearest(folder.name, SPLITS)
        text = f"{shown}/{folder.name} is not read" + (f"; did you mean {meant}/?" if meant else "")
        source.notes.append(("folders-left-out", text))
    return (
        None if train is None else _read(source, train),
        None if held_out is None else _read(source, held_out),
    )


def _folders(root: Path) -> list[Path]:
    return sorted(
        place for place in root.iterdir() if place.is_dir() and not place.name.startswith(".")
    )


def _named(folders: list[Path], names: Sequence[str]) -> Path | None:
    """The folder of the first of the names that is there, in capitals or not."""
    lower = {folder.name.lower(): folder for folder in reversed(folders)}
    return next((lower[name] for name in names if name in lower), None)


def _check_no_wrapper(root: Path, folders: list[Path]) -> None:
    """Raise InputError where the only folder is no class, but holds the folders that are meant."""
    if len(folders) != 1:
        return
    [only] = folders
    inside = _folders(only)
    if _named(inside, SPLITS) or (len(inside) > 1 and not _images_in(only)):
        names = ", ".join(f"{folder.name}/" for folder in inside[:3])
        raise InputError(
            "data-not-an-imagefolder",
            f"{relative_to_cwd(root)} has one folder, {only.name}/, which holds no image but "
            f"{names}{' ...' if len(inside) > 3 else ''}",
            hint=f"did you mean imagefolder:{relative_to_cwd(only)}?",
        )


def _hold_out(source: ModelSource, whole: Split) -> tuple[Split, Split | None]:
    """A part of each class for the evaluation: images seen in training would flatter it."""
    seen: dict[str, int] = {}
    train: list[tuple[Path, str]] = []
    held_out: list[tuple[Path, str]] = []
    for path, name in whole.files:
        seen[name] = seen.get(name, 0) + 1
        (train if seen[name] % HELD_OUT else held_out).append((path, name))
    if not held_out:
        text = (
            f"{whole.folder} has no class of {HELD_OUT} images, so none is held out and accuracy "
            "is not measured"
        )
        source.notes.append(("no-evaluation-images", text))
        return whole, None
    text = (
        f"{len(held_out)} of {len(whole.files)} images of {whole.folder} are held out for the "
        f"evaluation, each {HELD_OUT}th of a class; val/ beside train/ would say which"
    )
    source.facts.append(("images-held-out", text))
    return replace(whole, files=train), replace(whole, files=held_out)


def _read(source: ModelSource, folder: Path) -> Split:
    """The images below each class's folder as torchvision's `ImageFolder` finds them, but for
    hidden ones, which it would read too; what is no image is counted."""
    shown = relative_to_cwd(folder)
    classes = _folders(folder)
    if not classes:
        loose = _images_in(folder)
        found_there = f"{len(loose)} images" if loose else "nothing"
        raise _no_images(shown, f"no folder of a class, but {found_there}")
    others: Counter[str] = Counter()

    def is_image(path: str) -> bool:
        file = Path(path)
        if file.name.startswith("."):
            return False
        if not _is_image(file):
            others[file.suffix.lower() or "without an ending"] += 1
            return False
        return True

    numbers = {place.name: number for number, place in enumerate(classes)}
    with readable_files():
        for place in classes:
            os.listdir(place)  # Walking passes in silence over a folder that may not be read.
    make_dataset = require("torchvision.datasets.folder").make_dataset
    found = make_dataset(str(folder), numbers, is_valid_file=is_image, allow_empty=True)
    names = list(numbers)
    files = _once([(Path(path), names[number]) for path, number in found])
    empty = [name for name in names if name not in {name for _, name in files}]
    if empty:
        raise _no_images(f"{shown}/{empty[0]}", f"no image ({', '.join(_extensions())})")
    if others:
        kinds = ", ".join(f"{kind} {count}" for kind, count in sorted(others.items()))
        text = (
            f"{others.total()} files of {shown} are of kinds that are not read: {kinds}; read are "
            f"{', '.join(_extensions())}"
        )
        source.notes.append(("files-left-out", text))
    return Split(shown, files)


def _once(files: list[tuple[Path, str]]) -> list[tuple[Path, str]]:
    """Without the folders of a class that links lead to again, into themselves without end."""
    first: dict[tuple[str, str], Path] = {}
    kept: dict[tuple[Path, str], bool] = {}
    for path, name in files:
        folder = (path.parent, name)
        if folder not in kept:
            real = os.path.realpath(path.parent)
            kept[folder] = first.setdefault((real, name), path.parent) == path.parent
    return [(path, name) for path, name in files if kept[path.parent, name]]


def _images_in(folder: Path) -> list[Path]:
    return [path for path in folder.iterdir() if _is_image(path)]


def _is_image(path: Path) -> bool:
    return path.name.lower().endswith(_extensions())


def _extensions() -> tuple[str, ...]:
    return tuple(require("torchvision.datasets.folder").IMG_EXTENSIONS)


def _no_images(place: str, found: str) -> InputError:
    return InputError("data-not-an-imagefolder", f"{place} has {found}", hint=FORM)


def _spread(split: Split) -> Split:
    """The classes in turn: calibration reads the first batches alone, unshuffled."""
    by_class: dict[str, list[tuple[Path, str]]] = {}
    for file in split.files:
        by_class.setdefault(file[1], []).append(file)
    longest = max(map(len, by_class.values()))
    turns = [files[i] for i in range(longest) for files in by_class.values() if i < len(files)]
    return replace(split, files=turns)


def _outputs(
    source: ModelSource, model: LibraryModel, folder: str, names: list[str]
) -> dict[str, int]:
    if model.classes is None:
        return {}
    numbers = dict(enumerate(names))
    outputs = match_classes(source, model.classes, numbers, folder, numbered=False)
    return {name: outputs[number] for number, name in numbers.items()}
