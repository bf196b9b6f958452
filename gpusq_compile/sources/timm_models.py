"""`timm:NAME`: models of PyTorch Image Models."""

from __future__ import annotations

from typing import Any

from gpusq_compile.errors import InputError, nearest
from gpusq_compile.sources.model import PRETRAINED, Classes, Images, LibraryModel
from gpusq_compile.sources.paths import typed_path
from gpusq_compile.sources.require import quiet_downloads, require
from gpusq_compile.sources.weights import load_weights

IMAGENET = {1000: "imagenet-1k", 21843: "imagenet-22k", 11821: "imagenet-12k"}
"""The class lists that timm ships, by their number of classes."""


def timm_model(name: str, weights: str | None) -> LibraryModel:
    """Build a timm model with the preprocessing of its own data configuration.

    Args:
        weights: `pretrained`, a safetensors file, or None for random ones.

    Raises:
        InputError: timm is not installed, has no such model or cannot build it, or the weights do
            not fit.
    """
    timm = require("timm")
    pretrained = weights == PRETRAINED
    if not timm.is_model(name.split(".")[0]):
        raise unknown_model("timm", name, timm.list_models())
    try:
        with quiet_downloads():
            module = timm.create_model(name, pretrained=pretrained)
    except Exception as error:
        raise not_built("timm", name, error) from error
    config = timm.data.resolve_model_data_config(module)
    channels, height, width = config["input_size"]
    outputs = getattr(module, "num_classes", 0)
    model = LibraryModel(
        f"timm:{name}",
        module,
        "classification" if outputs else "features",
        Images(
            (height, width),
            tuple(config["mean"]),
            tuple(config["std"]),
            channels,
            interpolation=config["interpolation"],
            own=timm.data.create_transform(**config, is_training=False),
        ),
        Classes(outputs, class_names(timm, outputs)) if outputs else None,
        random=weights is None,
    )
    if weights is not None and not pretrained:
        load_weights(model, typed_path(weights))
    return model


def class_names(timm: Any, outputs: int) -> dict[int, tuple[str, ...]]:
    """WordNet's identifier and lemmas of each class, where the number of classes is ImageNet's."""
    if outputs not in IMAGENET:
        return {}
    info = timm.data.ImageNetInfo(IMAGENET[outputs])
    return {
        index: (info.index_to_label_name(index), *info.index_to_description(index).split(", "))
        for index in range(outputs)
    }


def not_built(library: str, name: str, error: Exception) -> InputError:
    return InputError(
        "model-not-loaded",
        f"{library} could not build {name}: {type(error).__name__}: {error}",
        hint="pretrained weights need a network; --weights FILE.safetensors does not",
    )


def unknown_model(library: str, name: str, valid: list[str]) -> InputError:
    # What people leave out is the end of a name.
    longer = sorted((found for found in valid if found.startswith(name.lower())), key=len)
    close = longer[0] if longer and name else nearest(name.lower(), valid)
    module = "torchvision.models" if library == "torchvision" else library
    return InputError(
        "unknown-model",
        f"{library} has no model '{name}'",
        hint=f"did you mean {library}:{close}?"
        + (f" {len(longer)} names begin so" if len(longer) > 1 else "")
        if close
        else f"{module}.list_models() lists all {len(valid)}",
    )
