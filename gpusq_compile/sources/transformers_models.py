"""`hf:WHAT`: transformers models that take `pixel_values`.

The class is chosen from the configuration alone and is always the library's own; code that comes
with a model is never run, and no weights are unpickled.
"""

from __future__ import annotations

import inspect
import re
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from gpusq_compile.errors import InputError, nearest
from gpusq_compile.sources.losses import pixel_loss, transformers_detection_loss
from gpusq_compile.sources.metrics import found_queries, pixel_accuracy
from gpusq_compile.sources.model import PRETRAINED, Classes, LibraryModel, Task
from gpusq_compile.sources.require import require
from gpusq_compile.sources.transformers_config import Place, find, quiet_transformers
from gpusq_compile.sources.transformers_images import input_images
from gpusq_compile.sources.transformers_outputs import take_pixels_alone
from gpusq_compile.sources.weights import misfit, read_weights

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
    file = Path(weights) if weights not in (None, PRETRAINED) else None
    with quiet_transformers():
        config = _configuration(place)
        kind, own, why = _choose(place, config)
        if why:
            facts.append(("model-chosen", why))
        module = _build(place, kind, own, file, notes, tower=own is not config)
    task = _task(kind)
    take_pixels_alone(module, task)
    images, text = input_images(own, place.processor, config.model_type)
    facts.append(("input-images", f"{place.origin}: {text}"))
    model = LibraryModel(
        place.origin,
        module,
        task,
        images,
        random=place.weights is None and file is None,
        notes=notes,
        facts=facts,
    )
    return _with_loss(model, own)


def _configuration(place: Place) -> Any:
    """The library's configuration object for a config.json."""
    transformers = require("transformers")
    model_type = place.config.get("model_type")
    known = transformers.CONFIG_MAPPING
    if not isinstance(model_type, str) or model_type not in known:
        found = "has no model_type" if model_type is None else f"has model_type '{model_type}'"
        own_code = " and comes with code of its own, which is never run" * bool(
            place.config.get("auto_map")
        )
        close = nearest(str(model_type), known.keys()) if model_type else None
        raise InputError(
            "unknown-model",
            f"the configuration of {place.origin} {found}{own_code}; transformers "
            f"{transformers.__version__} has no such model",
            hint=f"did you mean '{close}'?"
            if close
            else "a model file can build what the library does not know",
        )
    try:
        return known[model_type].from_dict({**place.config, "return_dict": True})
    except Exception as error:
        raise InputError(
            "config-invalid",
            f"transformers refuses the configuration of {place.origin}: "
            f"{type(error).__name__}: {_first_line(error)}",
        ) from error


def _choose(place: Place, config: Any) -> tuple[Any, Any, str | None]:
    """The class to build, the configuration that it takes, and what a person should know of it."""
    transformers = require("transformers")
    named = list(config.architectures or ())
    for name in named:
        kind = getattr(transformers, name, None)
        if inspect.isclass(kind) and _takes_images(kind):
            return kind, config, None
    vision = getattr(config, "vision_config", None)
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


def _build(
    place: Place,
    kind: Any,
    config: Any,
    file: Path | None,
    notes: list[tuple[str, str]],
    *,
    tower: bool,
) -> Any:
    """The module in float32, with the weights of `file`, of `place`, or random ones.

    Args:
        tower: whether it is the vision part alone of what the weights are of.
    """
    if place.weights is None and file is None:
        for part in (config, getattr(config, "backbone_config", None)):
            if part is not None and getattr(part, "use_pretrained_backbone", False):
                part.use_pretrained_backbone = False  # It would be downloaded.
        try:
            return kind(config).float()
        except Exception as error:
            raise _not_built(place, kind, error) from error
    # The library knows the names that a model's tensors had in its earlier versions.
    state = None if file is None else read_weights(file)
    try:
        module, info = kind.from_pretrained(
            None if file is not None else place.weights,
            config=config,
            state_dict=state,
            use_safetensors=True,
            trust_remote_code=False,
            local_files_only=place.offline,
            dtype=torch.float32,
            output_loading_info=True,
        )
    except SafetensorError as error:
        raise InputError(
            "weights-unreadable", f"the weights of {place.origin} are damaged: {error}"
        ) from None
    except OSError as error:
        raise InputError("weights-unreadable", f"{place.origin}: {_first_line(error)}") from None
    except Exception as error:
        raise _not_built(place, kind, error) from error
    missing = sorted(info["missing_keys"])
    if missing and file is not None:
        raise misfit(file, [f"{len(missing)} missing (first: {missing[0]})"])
    # A vision tower leaves the text part's tensors behind, and that is said already.
    unused = sorted(info["unexpected_keys"]) if not tower else []
    if missing:
        text = "are not among the weights and are random"
        notes.append(("weights-incomplete", _counted(place, missing, text)))
    if unused:
        text = "of the weights are none of its own and are left out"
        notes.append(("weights-unused", _counted(place, unused, text)))
    return module


def _counted(place: Place, names: list[str], what: str) -> str:
    return f"{place.origin}: {len(names)} tensors {what} (first: {names[0]})"


def _not_built(place: Place, kind: Any, error: Exception) -> InputError:
    if isinstance(error, ImportError):
        return InputError(
            "library-not-installed",
            f"{kind.__name__} needs another library: {_first_line(error)}",
            hint="pip install 'gpusq-compile[models]'",
        )
    return InputError(
        "model-not-loaded",
        f"transformers could not build {kind.__name__} for {place.origin}: "
        f"{type(error).__name__}: {_first_line(error)}",
    )


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__


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


def _with_loss(model: LibraryModel, config: Any) -> LibraryModel:
    """The model with the classes, the loss and the metrics of its task."""
    if model.task == "features":
        return model
    names = {int(index): str(name) for index, name in (config.id2label or {}).items()}
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
