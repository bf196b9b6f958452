"""`torchvision:NAME`: classifiers, detectors and segmentation models of torchvision."""

from __future__ import annotations

from typing import Any

from torch import nn

from gpusq_compile.errors import InputError
from gpusq_compile.sources.losses import pixel_loss, torchvision_detection_loss
from gpusq_compile.sources.metrics import found_boxes, pixel_accuracy
from gpusq_compile.sources.model import PRETRAINED, Classes, Images, LibraryModel
from gpusq_compile.sources.paths import typed_path
from gpusq_compile.sources.require import quiet_downloads, require
from gpusq_compile.sources.timm_models import not_built, unknown_model
from gpusq_compile.sources.weights import load_weights

PACKAGE = "torchvision.models"
REFUSED = {
    "optical_flow": "estimates optical flow between two images",
    "quantization": "is quantized already",
    "video": "takes videos",
}
"""The packages of torchvision whose models are not compiled, and why."""


def torchvision_model(name: str, weights: str | None) -> LibraryModel:
    """Build a torchvision model; its kind is told by the package that defines it.

    Args:
        weights: `pretrained`, a safetensors file, or None for random ones.

    Raises:
        InputError: torchvision is not installed, has no such model or cannot build it, the model
            takes anything but single images, or the weights do not fit.
    """
    models = require(PACKAGE)
    if name not in models.list_models():
        raise unknown_model("torchvision", name, models.list_models())
    package = models.get_model_builder(name).__module__.removeprefix(f"{PACKAGE}.").split(".")[0]
    if package in REFUSED:
        raise InputError(
            "model-not-supported",
            f"torchvision:{name} {REFUSED[package]}; the compiler takes float models of images",
        )
    pretrained = weights == PRETRAINED
    published = models.get_model_weights(name).DEFAULT
    arguments: dict[str, Any] = {"weights": published if pretrained else None}
    if package in ("detection", "segmentation") and not pretrained:
        arguments["weights_backbone"] = None  # By default they would be downloaded.
    try:
        with quiet_downloads():
            module = models.get_model(name, **arguments)
    except Exception as error:
        raise not_built("torchvision", name, error) from error
    described: Any = {"detection": _detector, "segmentation": _segmenter}.get(package, _classifier)
    model: LibraryModel = described(f"torchvision:{name}", module, published)
    model.random = weights is None
    if weights is not None and not pretrained:
        load_weights(model, typed_path(weights))
    return model


def _names(weights: Any, count: int) -> dict[int, tuple[str, ...]]:
    """The names of the classes, where the listed ones are as many as the outputs."""
    names = weights.meta.get("categories", ())
    known = enumerate(names) if len(names) == count else ()
    return {index: (name,) for index, name in known if name not in ("__background__", "N/A")}


def _classifier(origin: str, module: nn.Module, weights: Any) -> LibraryModel:
    preset = weights.transforms()
    crop = getattr(preset, "crop_size", [224])
    side = crop[0] if isinstance(crop, (list, tuple)) else crop
    count = len(weights.meta["categories"])
    images = Images((side, side), tuple(preset.mean), tuple(preset.std), own=preset)
    classes = Classes(count, _names(weights, count))
    return LibraryModel(origin, module, "classification", images, classes)


def _segmenter(origin: str, module: nn.Module, weights: Any) -> LibraryModel:
    preset = weights.transforms()
    side = preset.resize_size[0]
    count = len(weights.meta["categories"])
    return LibraryModel(
        origin,
        module,
        "segmentation",
        Images((side, side), tuple(preset.mean), tuple(preset.std)),
        Classes(count, _names(weights, count), first=1),
        loss=pixel_loss("out"),
        metrics=pixel_accuracy("out"),
    )


def _detector(origin: str, module: Any, weights: Any) -> LibraryModel:
    """A model whose own transform normalizes and resizes a list of images.

    Images all come in one square size that it leaves alone: a compiled submodule has the sizes
    that it was traced for.
    """
    own = module.transform
    size = tuple(reversed(own.fixed_size)) if own.fixed_size else (own.min_size[-1],) * 2
    head = getattr(module, "roi_heads", None)
    if head is not None and head.has_keypoint():
        raise InputError(
            "model-not-supported",
            f"{origin} needs key points as targets, which no --data form gives",
            hint="a model file with loss() and train_data() can train it",
        )
    count = (
        head.box_predictor.cls_score.out_features
        if head is not None
        else len(weights.meta["categories"])
    )
    return LibraryModel(
        origin,
        module,
        "detection",
        Images(size, mean=(0.0,), std=(1.0,)),
        Classes(count, _names(weights, count), first=1),
        listed=True,
        masks=head is not None and head.has_mask(),
        loss=torchvision_detection_loss,
        metrics=found_boxes,
        scopes=_scopes(module),
    )


def _scopes(module: nn.Module) -> tuple[str, ...]:
    """The parts that take and give tensors: the backbone, and the box head where there is one."""
    head = getattr(module, "roi_heads", None)
    boxes = head is not None and isinstance(getattr(head, "box_head", None), nn.Module)
    return ("backbone", "roi_heads.box_head") if boxes else ("backbone",)
