"""`hf:WHAT`: transformers models that take `pixel_values`.

The class is chosen from the configuration alone and is always the library's own; code that comes
with a model is never run, and no weights are unpickled.
"""

from __future__ import annotations

import inspect
import re
from typing import Any

from gpusq_compile.errors import InputError, nearest
from gpusq_compile.sources.json_files import JsonFile, wrong_value
from gpusq_compile.sources.losses import pixel_loss, transformers_detection_loss
from gpusq_compile.sources.metrics import found_queries, pixel_accuracy
from gpusq_compile.sources.model import PRETRAINED, Classes, LibraryModel, Task
from gpusq_compile.sources.paths import typed_path
from gpusq_compile.sources.require import require
from gpusq_compile.sources.transformers_config import Place, find, quiet_transformers
from gpusq_compile.sources.transformers_images import channels_of, input_images, other_size
from gpusq_compile.sources.transformers_outputs import take_pixels_alone
from gpusq_compile.sources.transformers_processor import check_processor
from gpusq_compile.sources.transformers_weights import blamed, build, reason

CONFIG_INVALID = "config-invalid"
AUTO_CLASSES = (
    "AutoModelForImageClassification",
    "AutoModelForObjectDetection",
    "AutoModelForSemanticSegmentation",
    "AutoModelForUniversalSegmentation",
    "AutoModelForDepthEstimation",
    "AutoModel",
    "AutoBackbone",
)
"""Tried in this order for a configuration that names no class of the library."""

COUNTS = (
    "hidden_size",
    "image_size",
    "num_attention_heads",
    "num_channels",
    "num_hidden_layers",
    "num_labels",
    "patch_size",
)
"""Keys of configurations of which 0 says nothing, and which the library divides by or ignores."""


def transformers_model(what: str, weights: str | None) -> LibraryModel:
    """Build the model of a folder, a configuration or a hub name.

    Args:
        weights: a safetensors file; `pretrained` insists on those that lie beside the
            configuration, which are taken anyway.

    Raises:
        InputError: transformers is not installed, nothing is there, the configuration is no image
            model's, or the weights do not fit.
    """
    require("transformers")
    place = find(what)
    if weights == PRETRAINED and place.weights is None:
        raise InputError(
            "weights-missing",
            f"{place.origin} has no weights beside its configuration",
            hint="--weights FILE.safetensors, or a folder with model.safetensors",
        )
    notes: list[tuple[str, str]] = []
    facts: list[tuple[str, str]] = []
    file = typed_path(weights) if weights is not None and weights != PRETRAINED else None
    with quiet_transformers():
        config = _configuration(place)
        kind, own, why = _choose(place, config)
        if why:
            facts.append(("model-chosen", why))
        module, random = build(
            place,
            kind,
            own,
            file,
            notes,
            tower=own is not config,
            insist=weights == PRETRAINED,
        )
    task = _task(kind)
    take_pixels_alone(module, task)
    processor = None
    if place.processor is not None:
        check_processor(place.processor, channels_of(own))
        processor = place.processor.content
    images, text = input_images(own, processor, config.model_type)
    facts.append(("input-images", f"{place.origin}: {text}"))
    if differs := other_size(own, processor):
        notes.append(("input-size-differs", f"{place.origin}: {differs}"))
    model = LibraryModel(
        place.origin,
        module,
        task,
        images,
        random=random,
        notes=notes,
        facts=facts,
    )
    return _with_loss(model, own, place.config)


def _configuration(place: Place) -> Any:
    """The library's configuration object for a config.json."""
    transformers = require("transformers")
    _check_config(place.config)
    content = place.config.content
    model_type = content.get("model_type")
    known = transformers.CONFIG_MAPPING
    if not isinstance(model_type, str) or model_type not in known:
        version = transformers.__version__
        found = "has no model_type, which says the architecture"
        if model_type is not None:
            found = f"has model_type '{model_type}', which transformers {version} does not know"
        own_code = " and comes with code of its own, which is never run" * bool(
            content.get("auto_map")
        )
        close = nearest(str(model_type), known.keys()) if model_type else None
        raise InputError(
            "unknown-model",
            f"the configuration of {place.origin} {found}{own_code}",
            hint=f"did you mean '{close}'?"
            if close
            else "a model file can build what the library does not know",
        )
    try:
        return known[model_type].from_dict({**content, "return_dict": True})
    except Exception as error:
        raise InputError(
            CONFIG_INVALID,
            f"transformers refuses the configuration of {place.origin}: "
            f"{type(error).__name__}: {reason(error)}",
            location=blamed(place.config, error),
        ) from error


def _check_config(file: JsonFile) -> None:
    """Refuse what the library would take for something else, or leave out in silence."""
    named = file.content.get("architectures")
    if named is not None and not (
        isinstance(named, list) and all(isinstance(name, str) for name in named)
    ):
        hint = f'write ["{named}"]' if isinstance(named, str) else None
        raise wrong_value(
            file, CONFIG_INVALID, ["architectures"], "a list of names of classes", hint
        )
    for key in COUNTS:
        count = file.content.get(key, 1)
        if isinstance(count, int) and count < 1:
            raise wrong_value(file, CONFIG_INVALID, [key], "a whole number above 0")
    labels = file.content.get("id2label")
    if labels is not None and not (
        isinstance(labels, dict) and all(key.isdecimal() for key in labels)
    ):
        expected, hint = "a name for each number of an output", 'write {"0": "cat", "1": "dog"}'
        raise wrong_value(file, CONFIG_INVALID, ["id2label"], expected, hint)
    quantized = file.content.get("quantization_config")
    if quantized is not None:
        method = quantized.get("quant_method") if isinstance(quantized, dict) else quantized
        raise InputError(
            "weights-quantized",
            f"the weights are quantized already ({method}); the compiler takes float models",
            location=file.place("quantization_config"),
            hint="take the float weights: the rules say how they are quantized",
        )


def _choose(place: Place, config: Any) -> tuple[Any, Any, str | None]:
    """The class to build, the configuration that it takes, and what a person should know of it."""
    transformers = require("transformers")
    named = list(config.architectures or ())
    vision = getattr(config, "vision_config", None)
    for name in named:
        kind = getattr(transformers, name, None)
        if inspect.isclass(kind) and _takes_images(kind):
            # A tower that is named has the configuration of the vision part.
            wanted = getattr(kind, "config_class", None)
            if wanted is not None and isinstance(vision, wanted) and type(config) is not wanted:
                return kind, vision, None
            return kind, config, None
    if vision is not None and not isinstance(vision, dict):
        kind = _automatic(vision, ("AutoModel",))
        if kind is not None:
            text = (
                f"{place.origin} has a text and a vision part: its vision tower is compiled "
                f"({kind.__name__})"
            )
            return kind, vision, text
    kind = _automatic(config, AUTO_CLASSES)
    if kind is not None:
        found = f"names {', '.join(named)}, which is none here" if named else "names no class"
        return kind, config, f"the configuration {found}: {kind.__name__} is built"
    raise InputError(
        "not-an-image-model",
        f"{place.origin} is a {config.model_type} model"
        + (f" ({', '.join(named)})" if named else "")
        + ", which takes no images alone",
        hint="image models take pixel_values; a model file can compile a part of any other",
    )


def _automatic(config: Any, names: tuple[str, ...]) -> Any:
    """The first class that one of the library's Auto classes has for a configuration."""
    transformers = require("transformers")
    for name in names:
        mapping = getattr(transformers, name)._model_mapping
        kind = mapping.get(type(config), None)
        kind = kind[0] if isinstance(kind, (tuple, list)) else kind
        if kind is not None and _takes_images(kind):
            return kind
    return None


def _takes_images(kind: Any) -> bool:
    """Whether `forward` can be called with `pixel_values` and nothing else."""
    forward = getattr(kind, "forward", None)
    if forward is None:
        return False
    parameters = inspect.signature(forward).parameters
    needed = [
        name
        for name, parameter in parameters.items()
        if name not in ("self", "pixel_values")
        and parameter.default is parameter.empty
        and parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY)
    ]
    return "pixel_values" in parameters and "input_ids" not in parameters and not needed


def _task(kind: Any) -> Task:
    """What the library lists a class for."""
    auto = require("transformers.models.auto.modeling_auto")
    lists: dict[Task, Any] = {
        "classification": auto.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES,
        "detection": auto.MODEL_FOR_OBJECT_DETECTION_MAPPING_NAMES,
        "segmentation": auto.MODEL_FOR_SEMANTIC_SEGMENTATION_MAPPING_NAMES,
    }
    for task, names in lists.items():
        for listed in names.values():
            if kind.__name__ in (listed if isinstance(listed, (tuple, list)) else (listed,)):
                return task
    return "features"


def _with_loss(model: LibraryModel, config: Any, file: JsonFile) -> LibraryModel:
    """The model with the classes, the loss and the metrics of its task."""
    if model.task == "features":
        return model
    names = {int(index): str(name) for index, name in (config.id2label or {}).items()}
    if sorted(names) != list(range(len(names))):
        lost = next(index for index in range(len(names)) if index not in names)
        raise InputError(
            CONFIG_INVALID,
            f"id2label names {len(names)} outputs, so the model has those from 0 to "
            f"{len(names) - 1}; it names {max(names)} and not {lost}",
            location=file.place("id2label"),
            hint="give each output a name, 'N/A' for one that stands for nothing",
        )
    model.classes = Classes(
        config.num_labels,
        {
            index: tuple(dict.fromkeys((name, *name.split(", "))))
            for index, name in names.items()
            if not re.fullmatch(r"LABEL_\d+|N/A", name)
        },
    )
    if model.task == "segmentation":
        ignored = getattr(config, "semantic_loss_ignore_index", None)
        model.ignored_label = (
            getattr(config, "loss_ignore_index", 255) if ignored is None else ignored
        )
        model.loss = pixel_loss(ignored=model.ignored_label)
        model.metrics = pixel_accuracy(ignored=model.ignored_label)
    if model.task == "detection":
        model.loss = transformers_detection_loss(model.module)
        model.metrics = found_queries
    return model
