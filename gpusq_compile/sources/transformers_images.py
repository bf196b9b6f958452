"""The size and the normalization of a transformers model's input images."""

from __future__ import annotations

from typing import Any

from gpusq_compile.sources.model import Images
from gpusq_compile.sources.require import require

DEFAULT_SIZE = (224, 224)
IMAGENET = Images(DEFAULT_SIZE)
PILLOW_FILTERS: dict[int | None, str] = dict(
    enumerate(("nearest", "lanczos", "bilinear", "bicubic", "box", "hamming"))
)
"""`resample` in preprocessor_config.json is Pillow's number of a filter."""

PROCESSOR_KEYS = (
    "size",
    "crop_size",
    "crop_pct",
    "do_center_crop",
    "do_normalize",
    "image_mean",
    "image_std",
    "resample",
    "do_rescale",
    "rescale_factor",
    "do_flip_channel_order",
)
WHOLE_FROM = 384
"""The least size to which a preprocessor with `crop_pct` alone resizes images without a cut."""
BYTES = 255.0
"""What 1 stands for in an image's file."""


def input_images(
    config: Any, processor: dict[str, Any] | None, model_type: str
) -> tuple[Images, str]:
    """How images become `pixel_values`, and where that was read.

    The size is the first of these that is known: the configuration's `image_size`, or that of its
    vision part; the size that the preprocessor cuts or resizes to, the `image_size` of a backbone,
    the size of the model family's own preprocessor, 224 x 224. A preprocessor that resizes one
    side alone makes inputs of any shape; a compiled model has one, so that side is taken for both.
    A model of one channel has the mean of the family's means.

    Args:
        processor: the content of preprocessor_config.json, which `check_processor` has passed;
            None where there is none.
        model_type: of the whole configuration, by which the family's preprocessor is found.
    """
    said = _family(model_type, (processor or {}).get("image_processor_type")) | (processor or {})
    own = "its preprocessor" if processor is not None else f"the default of {model_type}"
    named = (processor or {}).get("image_processor_type")
    if named is not None and not hasattr(require("transformers"), named):
        own += f", a {named}, which transformers does not know"
    cut, resized = _made(said)
    backbone = _size(getattr(getattr(config, "backbone_config", None), "image_size", None))
    choices = [
        (_own_size(config), "its configuration"),
        (cut or resized, own),
        (DEFAULT_SIZE, "the default"),
    ]
    choices.insert(1 if processor is None else 2, (backbone, "its backbone's configuration"))
    size, place = next((size, place) for size, place in choices if size is not None)
    # A preprocessor made for another size keeps its margin.
    edge = round(min(size) * min(resized) / min(cut)) if cut and resized else None
    channels = channels_of(config)
    mean, std = _normalization(said, channels)
    images = Images(
        size,
        mean,
        std,
        edge=edge if edge is not None and edge >= max(size) else None,
        channels=channels,
        interpolation=PILLOW_FILTERS.get(said.get("resample"), "bilinear"),
        blue_first=bool(said.get("do_flip_channel_order")),
    )
    text = (
        f"images of {size[0]}x{size[1]} ({place}), normalized with mean {_short(images.mean)} and "
        f"deviation {_short(images.std)} ({own if said else 'the default'})"
    )
    if images.blue_first:
        text += ", blue first"
    return images, text


def channels_of(config: Any) -> int:
    """The channels of a model's inputs; 3 where its configuration does not say."""
    for part in (config, *_parts(config), getattr(config, "backbone_config", None)):
        channels = getattr(part, "num_channels", None)
        if isinstance(channels, int):
            return channels
    return 3


def other_size(config: Any, processor: dict[str, Any] | None) -> str | None:
    """That a preprocessor makes images of another size than its model is compiled for, if so.

    Some models are published so: they were trained on larger images than they are evaluated on.
    """
    size = _own_size(config)
    cut, resized = _made(processor or {})
    made = cut or resized
    if size is None or made is None or made == size:
        return None
    return (
        f"its configuration says images of {size[0]}x{size[1]}, which it is compiled for, and its "
        f"preprocessor makes {made[0]}x{made[1]}"
    )


def _parts(config: Any) -> list[Any]:
    """The vision part of a configuration of text and images."""
    vision = getattr(config, "vision_config", None)
    return [] if vision is None else [vision]


def _own_size(config: Any) -> tuple[int, int] | None:
    sizes = [_size(getattr(part, "image_size", None)) for part in (config, *_parts(config))]
    return next((size for size in sizes if size is not None), None)


def _made(said: dict[str, Any]) -> tuple[tuple[int, int] | None, tuple[int, int] | None]:
    """The size that a preprocessor cuts images to, and that to which it resizes them before."""
    cut = _size(said.get("crop_size")) if said.get("do_center_crop") else None
    resized = _size(said.get("size")) if said.get("do_resize") is not False else None
    share = said.get("crop_pct")
    if share and resized and (cut or min(resized) < WHOLE_FROM):
        # `size` is then what is left of the larger image, as ConvNeXt's and PoolFormer's say it.
        cut, resized = cut or resized, (int(resized[0] / share), int(resized[1] / share))
    return cut, resized


def _normalization(
    said: dict[str, Any], channels: int
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """The mean and deviation for pixels in [0, 1] that do what a preprocessor does to bytes.

    It multiplies them by `rescale_factor` if `do_rescale` holds, and normalizes what that gives.
    """
    mean = _for_channels(said.get("image_mean", IMAGENET.mean) or IMAGENET.mean, channels)
    std = _for_channels(said.get("image_std", IMAGENET.std) or IMAGENET.std, channels)
    if said and not said.get("do_normalize"):
        mean, std = (0.0,), (1.0,)
    largest = BYTES
    if said.get("do_rescale", True):
        factor = said.get("rescale_factor")
        largest *= 1.0 / BYTES if factor is None else factor
    return tuple(value / largest for value in mean), tuple(value / largest for value in std)


def _for_channels(values: Any, channels: int) -> tuple[float, ...]:
    """One value for all channels, or one for each; a single channel has their mean."""
    several = tuple(values) if isinstance(values, (list, tuple)) else (values,)
    return (sum(several) / len(several),) if channels == 1 else several


def _short(values: tuple[float, ...]) -> str:
    return "/".join(f"{value:.3g}" for value in dict.fromkeys(values))


def _size(value: Any) -> tuple[int, int] | None:
    """(height, width) of the forms that configurations use."""
    if isinstance(value, int) and value > 0:
        return value, value
    if isinstance(value, (list, tuple)) and len(value) == 2:
        height, width = map(_size, value)
        return (height[0], width[0]) if height and width else None
    if isinstance(value, dict):
        for keys in (("height", "width"), ("max_height", "max_width")):
            if all(isinstance(value.get(key), int) for key in keys):
                return _size([value[key] for key in keys])
        return _size(value.get("shortest_edge") or value.get("longest_edge"))
    return None


def _family(model_type: str, named: str | None = None) -> dict[str, Any]:
    """What the image processor `named`, or that of a model family, does where nothing is said."""
    auto = require("transformers.models.auto.image_processing_auto")
    names = auto.IMAGE_PROCESSOR_MAPPING_NAMES.get(model_type)
    if isinstance(names, dict):
        names = tuple(names.values())
    transformers = require("transformers")
    for name in (named, *(names or ())):
        found = getattr(transformers, name or "", None)
        if found is not None and hasattr(found, "image_mean"):
            return {key: getattr(found, key, None) for key in PROCESSOR_KEYS}
    return {}
