"""Reading image files, and turning them into a model's inputs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from gpusq_compile.errors import InputError
from gpusq_compile.sources.model import Images
from gpusq_compile.sources.paths import unreadable
from gpusq_compile.sources.require import require

MODES = {1: "L", 3: "RGB"}
"""PIL's name of an image of so many channels."""


BYTE = 255.0
"""The largest value of PIL's modes of 8 bits, at which converting to them clips."""


def open_image(path: str | Path, channels: int = 3) -> Any:
    """The PIL image of a file, whatever its own colours are, in the channels that a model takes.

    As torchvision's `pil_loader`, on whose images the libraries' models were trained: an EXIF
    orientation turns no image, and transparency is dropped, so that the colours under it show.
    Unlike it, 16 bits are scaled to 8 and not clipped, and nothing of 32 bits or of floats is
    read that would be clipped: its range is not in the file.

    Raises:
        InputError: the file cannot be read, is no image, is damaged (PIL itself would not always
            name it), or has values that 8 bits cannot hold.
    """
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(path) as file:
            image: Image.Image = file
            # Pillow gives 16 bits of a PGM, and some versions of it those of a PNG, as 32.
            wide = image.mode == "I" and file.format in ("PNG", "PPM")
            if image.mode.startswith("I;16") or wide:
                # Converting would clip its 16 bits at 255; Pillow scales those of 32 bits alone
                # in either order of bytes.
                image = image.convert("I").point(lambda value: value / 256).convert("L")
            elif image.mode in ("I", "F"):
                _check_range(path, image)
            return image.convert(MODES[channels])
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise unreadable(Path(path), error) from None
        unknown = isinstance(error, UnidentifiedImageError)
        raise InputError(
            "image-unreadable",
            f"{path}: {'no image of a known kind' if unknown else error}",
            hint="the file is damaged or no image: replace it, or take it out of the data",
        ) from None


def _check_range(path: str | Path, image: Any) -> None:
    low, high = image.getextrema()
    shares = image.mode == "F" and 0 < high <= 1
    if low >= 0 and high <= BYTE and not shares:
        return
    raise InputError(
        "image-unreadable",
        f"{path} has {'floats' if image.mode == 'F' else '32 bits'} from {low:g} to {high:g}, "
        "expected 8 bits from 0 to 255 or 16 bits",
        hint="which value is white is not in the file: convert the images to 8 or 16 bits",
    )


def whole_image(images: Images) -> Callable[[Any], Any]:
    """A PIL image -> the whole of it as float32 [channels, height, width] in the model's size."""
    transforms = require("torchvision.transforms")
    composed: Callable[[Any], Any] = transforms.Compose(
        [
            transforms.Resize(images.size, _interpolation(images)),
            *_as_tensor(images),
        ]
    )
    return composed


def classified_image(images: Images) -> Callable[[Any], Any]:
    """A PIL image -> float32 [channels, height, width], cut as for the model's own evaluation."""
    if images.own is not None:
        return images.own
    if images.edge is None:
        return whole_image(images)
    transforms = require("torchvision.transforms")
    composed: Callable[[Any], Any] = transforms.Compose(
        [
            transforms.Resize(images.edge, _interpolation(images)),
            transforms.CenterCrop(images.size),
            *_as_tensor(images),
        ]
    )
    return composed


def _as_tensor(images: Images) -> list[Callable[[Any], Any]]:
    """The steps from a PIL image in its last size to the normalized tensor."""
    transforms = require("torchvision.transforms")
    steps = [transforms.ToTensor(), transforms.Normalize(images.mean, images.std)]
    if images.blue_first:
        steps.insert(1, _turned)
    return steps


def _turned(image: torch.Tensor) -> torch.Tensor:
    return image.flip(0)


def _interpolation(images: Images) -> Any:
    return require("torchvision.transforms").InterpolationMode(images.interpolation)


def check_channels(origin: str, images: Images) -> None:
    """Raise InputError for a model whose inputs no image file can give."""
    if images.channels not in MODES:
        raise InputError(
            "input-channels",
            f"{origin} takes {images.channels} channels, and image files have 1 or 3",
            hint="a model file with train_data() can read other data",
        )
