"""What is wrong with a preprocessor_config.json, said at its place in the file."""

from __future__ import annotations

import math
from typing import Any

from gpusq_compile.errors import InputError, nearest
from gpusq_compile.sources.json_files import JsonFile, is_whole, wrong_value

PROCESSOR_INVALID = "preprocessor-invalid"
SWITCHES = ("do_center_crop", "do_flip_channel_order", "do_normalize", "do_rescale", "do_resize")
SIZE_KEYS = (
    {"height", "width"},
    {"shortest_edge"},
    {"longest_edge"},
    {"shortest_edge", "longest_edge"},
    {"max_height", "max_width"},
    {"min_pixels", "max_pixels"},
)
"""The keys that a size may have together, as the library's own processors take them."""
FILTERS = "nearest 0, lanczos 1, bilinear 2, bicubic 3, box 4 or hamming 5"


def check_processor(file: JsonFile, channels: int) -> None:
    """Check every value that decides how images become inputs.

    Args:
        channels: of the model's inputs.

    Raises:
        InputError: the first value that the library could not use, with what was expected.
    """
    said = file.content
    for key in SWITCHES:
        if not isinstance(said.get(key), bool | None):
            raise _wrong(file, key, "true or false")
    named = said.get("image_processor_type")
    if not isinstance(named, str | None):
        raise _wrong(file, "image_processor_type", "the name of a class")
    for key in ("size", "crop_size"):
        _check_size(file, key)
    resample = said.get("resample")
    if resample is not None and not (is_whole(resample) and 0 <= resample <= 5):
        raise _wrong(file, "resample", f"Pillow's number of a filter: {FILTERS}")
    share = said.get("crop_pct")
    if share is not None and not (_is_number(share) and 0 < share <= 1):
        raise _wrong(file, "crop_pct", "the share of the resized side that is kept, up to 1")
    # Where the step is left out, the library does not look at its values.
    if said.get("do_rescale") or said.get("rescale_factor") is not None:
        _check_factor(file)
    for key in ("image_mean", "image_std"):
        if said.get("do_normalize") or said.get(key) is not None:
            _check_channels(file, key, channels)


def _check_factor(file: JsonFile) -> None:
    factor = file.content.get("rescale_factor", 1)
    if not _is_number(factor) or factor <= 0:
        raise _wrong(file, "rescale_factor", "a number above 0, such as 0.00392156862745098")


def _check_channels(file: JsonFile, key: str, channels: int) -> None:
    """A mean or deviation is one number, or a list with one for each channel."""
    if key not in file.content:
        return
    found = file.content[key]
    values = found if isinstance(found, list) else [found]
    positive = " above 0" if key == "image_std" else ""
    expected = f"a number{positive}, or a list of {channels}"
    if not values or not all(_is_number(value) for value in values):
        raise _wrong(file, key, expected)
    if positive and min(values) <= 0:
        raise _wrong(file, key, expected)
    # The library itself writes three equal values for a model of one channel.
    grey = channels == 1 and len(set(values)) == 1
    if len(values) not in (1, channels) and not grey:
        raise _wrong(file, key, f"{expected}: the model takes {channels} channels")


def _check_size(file: JsonFile, key: str) -> None:
    """A size is a length, a pair, or lengths by name."""
    found = file.content.get(key)
    if found is None:
        return
    names = sorted({name for names in SIZE_KEYS for name in names})
    expected = "a whole number above 0, [height, width], or height and width by name"
    if isinstance(found, dict):
        given = {name: value for name, value in found.items() if value is not None}
        for name, value in given.items():
            if name not in names:
                close = nearest(name, names)
                raise InputError(
                    PROCESSOR_INVALID,
                    f"{key} has '{name}', expected {', '.join(names)}",
                    location=file.place(key, name),
                    hint=f"did you mean '{close}'?" if close else None,
                )
            if not is_whole(value) or value <= 0:
                raise _wrong(file, key, "a whole number above 0", name)
        if set(given) not in SIZE_KEYS:
            raise _wrong(file, key, "height and width, or shortest_edge")
        return
    values = found if isinstance(found, list) and len(found) == 2 else [found]
    if not all(is_whole(value) and value > 0 for value in values):
        raise _wrong(file, key, expected)


def _is_number(value: Any) -> bool:
    return is_whole(value) or (isinstance(value, float) and math.isfinite(value))


def _wrong(file: JsonFile, key: str, expected: str, *inner: str) -> InputError:
    return wrong_value(file, PROCESSOR_INVALID, (key, *inner), expected)
