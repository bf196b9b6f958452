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
        InputError: there is no class, one has no image, or a link leads back to where it is.
    """
    shown = relative_to_cwd(folder)
    datasets = require("torchvision.datasets")
    extensions = tuple(datasets.folder.IMG_EXTENSIONS)
    left_out = _left_out(folder, extensions)
    if not visible_folders(folder):
        loose = [path for path in folder.iterdir() if path.name.lower().endswith(extensions)]
        there = f"{len(loose)} images" if loose else "nothing"
        raise _no_images(shown, f"no folder of a class, but {there}")

    start = len(os.path.join(str(folder), ""))

    def valid(path: str) -> bool:
        return path.lower().endswith(extensions) and not any(
            map(_hidden, path[start:].split(os.sep))
        )

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


def _left_out(folder: Path, extensions: tuple[str, ...]) -> list[Path]:
    """The files that are no image of a class.

    Raises:
        InputError: a link leads back to a folder that it is in: its images would be counted again
            and again, and as of other classes.
        OSError: a folder may not be read; `ImageFolder` would pass over it in silence.
    """
    found = []
    above: dict[str, tuple[str, ...]] = {str(folder): (os.path.realpath(folder),)}
    for place, folders, files in os.walk(folder, followlinks=True, onerror=_raise):
        folders[:] = sorted(name for name in folders if not _hidden(name))
        for name in folders:
            inner = os.path.join(place, name)
            real = os.path.realpath(inner)
            if real in above[place]:
                raise InputError(
                    "data-not-an-imagefolder",
                    f"{relative_to_cwd(Path(place))}/{name} is a link that leads back to {real}, "
                    "which it is in",
                    hint="remove the link",
                )
            above[inner] = (*above[place], real)
        loose = place == str(folder)
        found += [
            Path(place, name)
            for name in sorted(files)
            if not _hidden(name) and (loose or not name.lower().endswith(extensions))
        ]
    return found


def _raise(error: OSError) -> None:
    raise error


def _hidden(name: str) -> bool:
    return name.startswith(".") or name == RESOURCE_FORKS


def _kinds(files: Iterable[Path]) -> str:
    """How many files there are of each kind: `20 files .gif and 1 file .heic`."""
    counts = Counter(path.suffix.lower() or "without extension" for path in files)
    parts = [f"{n} {'file' if n == 1 else 'files'} {kind}" for kind, n in counts.most_common()]
    return " and ".join(filter(None, [", ".join(parts[:-1]), parts[-1]]))


def _no_images(place: str, found: str) -> InputError:
    return InputError("data-not-an-imagefolder", f"{place} has {found}", hint=FORM)
