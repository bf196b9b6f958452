"""Models that a library builds by name: `timm:NAME`, `torchvision:NAME` and `hf:WHAT`."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import Any

import torch
from torch import nn

from gpusq_compile.errors import InputError
from gpusq_compile.model_source import ModelSource
from gpusq_compile.sources.data_spec import give_data, kinds_for
from gpusq_compile.sources.losses import features_alone
from gpusq_compile.sources.model import LibraryModel
from gpusq_compile.sources.timm_models import timm_model
from gpusq_compile.sources.torchvision_models import torchvision_model
from gpusq_compile.sources.transformers_models import transformers_model

BUILDERS = {"timm": timm_model, "torchvision": torchvision_model, "hf": transformers_model}
SYNTHETIC_BATCHES = 8
SYNTHETIC_BATCH = 2
"""Noise in place of data only shows that the whole compiles: there is no more to see in more."""


def load_library_model(
    library: str, name: str, *, data: str | None, weights: str | None, scope: str | None
) -> ModelSource:
    """Build a library's model, with its weights and data where they were asked for.

    Raises:
        InputError: the library is not installed, has no such model, cannot load the weights or
            has a model that compiles by its parts alone; or the data does not fit it.
    """
    model = BUILDERS[library](name, weights)
    if model.scopes and scope is None:
        raise InputError(
            "scope-needed",
            f"{model.origin} takes and gives lists of any length, which no ONNX graph of fixed "
            "sizes can say: one of its parts can be compiled",
            hint=f"--scope {' or --scope '.join(model.scopes)}; the model around it trains with "
            "its own losses",
        )
    if model.random:
        ways = "a folder with model.safetensors" if library == "hf" else "--weights pretrained"
        text = (
            f"{model.origin} has random weights, so accuracy means nothing; "
            f"{ways} or --weights FILE.safetensors loads trained ones"
        )
        model.notes.append(("random-weights", text))
    source = ModelSource(
        model.origin,
        model.module.eval(),
        example_images(model),
        loss=model.loss,
        metrics=model.metrics,
        notes=model.notes,
        facts=model.facts,
        data_forms=kinds_for(model.task),
    )
    # The data's makers know the model by its description; its weights go once it is traced.
    model.module = nn.Identity()
    if model.task != "classification" and model.loss is None:
        source.loss = features_alone
        text = (
            f"{model.origin} has no loss that is known here: a fine-tune trains it by the "
            "distances at the distillation taps alone"
        )
        source.facts.append(("features-alone", text))
    if data is not None:
        give_data(source, model, data)
        if source.eval_data is None:
            source.metrics = None
    else:
        source.metrics = None
        source.synthetic = True
        source.calibration_data = partial(_noise, model)
    return source


def example_images(model: LibraryModel) -> tuple[Any, ...]:
    """Two images of noise as the model's forward takes them."""
    return (_images(model, 2, torch.Generator().manual_seed(0)),)


def _noise(model: LibraryModel) -> Iterable[Any]:
    generator = torch.Generator().manual_seed(0)
    for _ in range(SYNTHETIC_BATCHES):
        yield _images(model, SYNTHETIC_BATCH, generator)


def _images(model: LibraryModel, count: int, generator: torch.Generator) -> Any:
    shape = (model.images.channels, *model.images.size)
    if model.listed:
        return [torch.rand(shape, generator=generator) for _ in range(count)]
    return torch.randn((count, *shape), generator=generator)
