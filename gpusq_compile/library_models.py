"""Models that a library builds by name: `timm:NAME` and `torchvision:NAME`."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from gpusq_compile.errors import InputError, did_you_mean, nearest
from gpusq_compile.model_source import ModelSource

SYNTHETIC_BATCHES = 8
SYNTHETIC_BATCH = 2
"""Noise in place of data only shows that the whole compiles: there is no more to see in more."""

BATCH = 32


def load_library_model(
    library: str, name: str, *, data: str | None, weights: str | None
) -> ModelSource:
    """Build a library's model, with its weights and data where they were asked for.

    Raises:
        InputError: the library is not installed, has no such model, or cannot load the weights.
    """
    builder = _timm if library == "timm" else _torchvision
    module, input_size, mean, std = builder(name, weights == "pretrained")
    notes = []
    if weights is None:
        notes.append(
            (
                "random-weights",
                f"{library}:{name} has random weights, so accuracy means nothing; "
                "--weights pretrained or --weights FILE.safetensors loads trained ones",
            )
        )
    elif weights != "pretrained":
        _load_weights(module, Path(weights))
    example = torch.randn((2, *input_size), generator=torch.Generator().manual_seed(0))
    source = ModelSource(f"{library}:{name}", module.eval(), (example,), notes=notes)
    if data is not None:
        _image_folder(source, data, input_size, mean, std)
    else:
        source.synthetic = True
        source.calibration_data = lambda: _noise(input_size)
    return source


def _require(package: str) -> Any:
    import importlib

    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise InputError(
            "library-not-installed",
            f"{package} cannot be imported: {error}",
            hint="pip install 'gpusq-compile[models]'",
        ) from None


def _timm(name: str, pretrained: bool) -> tuple[nn.Module, tuple[int, ...], Any, Any]:
    timm = _require("timm")
    if not timm.is_model(name.split(".")[0]):
        raise _unknown_model("timm", name, timm.list_models())
    module = _build("timm", name, lambda: timm.create_model(name, pretrained=pretrained))
    config = timm.data.resolve_model_data_config(module)
    return module, tuple(config["input_size"]), config["mean"], config["std"]


def _torchvision(name: str, pretrained: bool) -> tuple[nn.Module, tuple[int, ...], Any, Any]:
    models = _require("torchvision.models")
    if name not in models.list_models():
        raise _unknown_model("torchvision", name, models.list_models())
    weights = models.get_model_weights(name).DEFAULT
    module = _build(
        "torchvision", name, lambda: models.get_model(name, weights=weights if pretrained else None)
    )
    preset = weights.transforms()
    crop = getattr(preset, "crop_size", [224])
    size = crop[0] if isinstance(crop, (list, tuple)) else crop
    mean = getattr(preset, "mean", (0.485, 0.456, 0.406))
    std = getattr(preset, "std", (0.229, 0.224, 0.225))
    return module, (3, size, size), mean, std


def _build(library: str, name: str, create: Any) -> nn.Module:
    try:
        with quiet_downloads():
            module: nn.Module = create()
    except Exception as error:
        raise InputError(
            "model-not-loaded",
            f"{library} could not build {name}: {type(error).__name__}: {error}",
            hint="pretrained weights need a network; --weights FILE.safetensors does not",
        ) from error
    return module


@contextmanager
def quiet_downloads() -> Iterator[None]:
    """Without the download library's line for each retry; the last error says it all."""
    logger = logging.getLogger("huggingface_hub")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def _unknown_model(library: str, name: str, valid: list[str]) -> InputError:
    close = nearest(name, valid)
    module = "torchvision.models" if library == "torchvision" else library
    return InputError(
        "unknown-model",
        f"{library} has no model '{name}'",
        hint=f"did you mean {library}:{close}?"
        if close
        else f"{module}.list_models() lists all {len(valid)}",
    )


def _load_weights(module: nn.Module, path: Path) -> None:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    if not path.is_file():
        raise InputError(
            "weights-missing",
            f"no weights at {path}",
            hint=("did you mean 'pretrained'? " if nearest(str(path), ["pretrained"]) else "")
            + "--weights takes 'pretrained' or the path of a safetensors file",
        )
    try:
        state = load_file(path)
    except (SafetensorError, OSError) as error:
        raise InputError("weights-unreadable", f"{path} is no safetensors file: {error}") from None
    if faults := _mismatches(module.state_dict(), state):
        raise InputError(
            "weights-mismatch", f"{path} does not fit the model: tensors {'; '.join(faults)}"
        )
    module.load_state_dict(state)


def _mismatches(
    expected: Mapping[str, torch.Tensor], found: Mapping[str, torch.Tensor]
) -> list[str]:
    """What keeps weights from fitting, each kind with its count and its first name."""
    missing = [name for name in expected if name not in found]
    unknown = [name for name in found if name not in expected]
    shapes = [
        f"{name} is {list(found[name].shape)}, the model has {list(tensor.shape)}"
        for name, tensor in expected.items()
        if name in found and found[name].shape != tensor.shape
    ]
    kinds = ((missing, "missing"), (unknown, "not in the model"), (shapes, "of another shape"))
    return [f"{len(names)} {what} (first: {names[0]})" for names, what in kinds if names]


def _noise(input_size: tuple[int, ...]) -> Iterable[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    for _ in range(SYNTHETIC_BATCHES):
        yield torch.randn((SYNTHETIC_BATCH, *input_size), generator=generator)


def _image_folder(
    source: ModelSource, data: str, input_size: tuple[int, ...], mean: Any, std: Any
) -> None:
    kind, _, folder = data.partition(":")
    if kind != "imagefolder" or not folder:
        bare = Path(data).is_dir()
        raise InputError(
            "unknown-data",
            f"--data {data} is not a form this version reads",
            hint=f"did you mean imagefolder:{data}?"
            if bare
            else did_you_mean(kind, ["imagefolder"]) + ":DIR",
        )
    root = Path(folder)
    if not root.is_dir():
        raise InputError("data-missing", f"no folder at {root} (from --data {data})")
    datasets = _require("torchvision.datasets")
    transforms = _require("torchvision.transforms")
    _, height, width = input_size
    transform = transforms.Compose(
        [
            transforms.Resize(round(height / 0.875)),
            transforms.CenterCrop((height, width)),
            transforms.ToTensor(),
            transforms.Normalize(mean, std),
        ]
    )

    def loader(split: str, shuffle: bool) -> Iterable[Any]:
        place = root / split if (root / split).is_dir() else root
        try:
            images = datasets.ImageFolder(str(place), transform)
        except FileNotFoundError as error:
            raise InputError(
                "data-not-an-imagefolder",
                f"{place}: {error}",
                hint="an image folder holds one folder of images per class",
            ) from None
        return torch.utils.data.DataLoader(images, batch_size=BATCH, shuffle=shuffle)

    source.train_data = lambda: loader("train", True)
    source.calibration_data = lambda: loader("train", False)
    source.eval_data = lambda: loader("val", False)
