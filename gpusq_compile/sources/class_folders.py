"""A folder with one folder of images per class, as torchvision's `ImageFolder` reads it."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from gpusq_compile.errors import InputError, relative_to_cwd
from gpusq_compile.model_source import ModelSource
from gpusq_compile.sources.images import open_image
from gpusq_compile.sources.require import require

FORM = "an image folder holds one folder of images per class, or train/ and val/ of such folders"
RESOURCE_FORKS = "__MACOSX"
"""What macOS puts beside the files of an archive; no class."""


@dataclass(frozen=True)
class Split:
    """Some of the images of torchvision's `ImageFolder`, by their indices in it.

    `shown` is the folder in messages.
    """

    shown: str
    images: Any
    indices: list[int]

    @property
    def labels(self) -> list[int]:
        """The number of each image's class in `images.classes`."""
        return [self.images.targets[index] for index in self.indices]

    @property
    def names(self) -> list[str]:
        """The classes that have an image, sorted."""
        return [self.images.classes[label] for label in sorted(set(self.labels))]


def visible_folders(folder: Path) -> list[Path]:
    """The folders in a folder that a person put there, by name."""
    return sorted(place for place in folder.iterdir() if place.is_dir() and not _hidden(place.name))


def read_classes(source: ModelSource, folder: Path, channels: int) -> Split:
    """The images below each class's folder, by class and path; what is left out is a remark.

    The files are found and labelled by `ImageFolder`. It is told what to leave out, because it
    would take a hidden folder for a class; and to allow a class without images, because its own
    error does not name what is there instead. Images are opened by `open_image`, because its own
    loader names no damaged file, clips 16 bits at 255 and always gives three channels.

    Raises:
        InputError: there is no class, one has no image, or links lead back to where they are.
    """
    shown = relative_to_cwd(folder)
    datasets = require("torchvision.datasets")
    extensions = tuple(datasets.folder.IMG_EXTENSIONS)
    walked = _walk(source, folder, extensions)
    left_out = walked.left_out
    if not visible_folders(folder):
        loose = _images_in(folder)
        there = f"{len(loose)} images" if loose else "nothing"
        raise _no_images(shown, f"no folder of a class, but {there}")

    def valid(path: str) -> bool:
        place, name = os.path.split(path)
        return place in walked.places and name.lower().endswith(extensions) and not _hidden(name)

    images = datasets.ImageFolder(
        str(folder),
        loader=partial(open_image, channels=channels),
        is_valid_file=valid,
        allow_empty=True,
    )
    split = Split(shown, images, list(range(len(images))))
    names = set(split.names)
    for place in visible_folders(folder):
        if place.name not in names:
            others = [path for path in left_out if place in path.parents]
            there = f", but {_kinds(others)}" if others else ""
            found = f"no image ({', '.join(extensions)}){there}"
            raise _no_images(f"{shown}/{place.name}", found)
    if left_out:
        text = (
            f"of {shown} {_kinds(left_out)} {'is' if len(left_out) == 1 else 'are'} not read, the "
            f"first {relative_to_cwd(left_out[0])}; images are {', '.join(extensions)} in the "
            "folder of a class"
        )
        source.notes.append(("files-left-out", text))
    return split


@dataclass(frozen=True)
class Walked:
    """The folders whose files are read, as `os.walk` gives them, and the files that are not."""

    places: set[str]
    left_out: list[Path]


def _walk(source: ModelSource, folder: Path, extensions: tuple[str, ...]) -> Walked:
    """Look at every folder and file once, as `ImageFolder` does not.

    Raises:
        InputError: several links lead back to folders that they are in. `ImageFolder` follows
            each as deep as the system lets it, and in each of them the others.
        OSError: a folder may not be read; `ImageFolder` would pass over it in silence.
    """
    top = str(folder)
    places: set[str] = set()
    left_out: list[Path] = []
    # A class may be a link to another, whose images are then of both.
    seen: set[tuple[str, str]] = set()
    above: dict[str, tuple[str, ...]] = {top: (os.path.realpath(top),)}
    again: list[Path] = []
    back: list[Path] = []
    for place, folders, files in os.walk(top, followlinks=True, onerror=_raise):
        folders[:] = sorted(name for name in folders if not _hidden(name))
        # Of a folder and a link to it the folder is read.
        for name in sorted(folders, key=lambda name: os.path.islink(os.path.join(place, name))):
            inner = os.path.join(place, name)
            real = os.path.realpath(inner)
            label = name if place == top else os.path.relpath(inner, top).split(os.sep)[0]
            if real in above[place]:
                back.append(Path(inner))
            if real in above[place] or (label, real) in seen:
                again.append(Path(inner))
                folders.remove(name)
                continue
            seen.add((label, real))
            above[inner] = (*above[place], real)
        if place != top:
            places.add(place)
        left_out += [
            Path(place, name)
            for name in sorted(files)
            if not _hidden(name) and (place == top or not name.lower().endswith(extensions))
        ]
    if len(back) > 1:
        names = " and ".join(_shown(link) for link in sorted(back)[:2])
        text = f"{names} are links that lead back to folders that they are in"
        raise InputError("data-not-an-imagefolder", text, hint="remove the links")
    for link in again:
        text = f"{_shown(link)} is a link to a folder whose images are read already"
        source.notes.append(("folders-left-out", text))
    return Walked(places, left_out)


def _raise(error: OSError) -> None:
    raise error


def _hidden(name: str) -> bool:
    return name.startswith(".") or name == RESOURCE_FORKS


def has_image(folder: Path) -> bool:
    """Whether a folder itself holds an image."""
    return bool(_images_in(folder))


def _images_in(folder: Path) -> list[Path]:
    extensions = tuple(require("torchvision.datasets.folder").IMG_EXTENSIONS)
    return [path for path in folder.iterdir() if path.name.lower().endswith(extensions)]


def _shown(link: Path) -> str:
    """A link's own path: `relative_to_cwd` shows what it leads to."""
    return f"{relative_to_cwd(link.parent)}/{link.name}"


def _kinds(files: Iterable[Path]) -> str:
    """How many files there are of each kind: `20 files .gif and 1 file .heic`."""
    counts = Counter(path.suffix.lower() or "without extension" for path in files)
    parts = [f"{n} {'file' if n == 1 else 'files'} {kind}" for kind, n in counts.most_common()]
    return " and ".join(filter(None, [", ".join(parts[:-1]), parts[-1]]))


def _no_images(place: str, found: str) -> InputError:
    return InputError("data-not-an-imagefolder", f"{place} has {found}", hint=FORM)
