"""Where the model and its data come from: a model file, a library's model, or Python objects."""

from __future__ import annotations

import importlib.util
import sys
import traceback
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import nn

from gpusq_compile.errors import InputError, Location, did_you_mean, nearest, relative_to_cwd

DataFactory = Callable[[], Iterable[Any]]
"""Called once per pass over the data; yields `(inputs, labels)` batches or inputs alone."""

REQUIRED = ("model", "example_inputs")
DATA_FUNCTIONS = ("train_data", "calibration_data", "eval_data")
OPTIONAL = (*DATA_FUNCTIONS, "logits", "dynamic_shapes")


@dataclass
class ModelSource:
    """A model and everything the compiler was given with it.

    `origin` is what messages call the model: the file as typed, `timm:NAME`, or a class name.
    `synthetic` is true when the calibration images are generated noise because a library model
    came without data; `notes` are warnings about the source that belong in the report.
    """

    origin: str
    module: nn.Module
    example_inputs: tuple[Any, ...]
    train_data: DataFactory | None = None
    calibration_data: DataFactory | None = None
    eval_data: DataFactory | None = None
    logits: Callable[[Any], torch.Tensor] | None = None
    dynamic_shapes: Any = None
    file: Path | None = None
    synthetic: bool = False
    notes: list[tuple[str, str]] = field(default_factory=list)


def load_source(spec: str, *, data: str | None = None, weights: str | None = None) -> ModelSource:
    """Load what the command line names as MODEL.

    Args:
        spec: a Python file, `timm:NAME` or `torchvision:NAME`.
        data: `imagefolder:DIR`, for library models.
        weights: for library models, `pretrained` (downloaded by the library) or the path of a
            safetensors file; random when None.

    Raises:
        InputError: what is wrong with the file, the name, the data or the weights.
    """
    library, separator, name = spec.partition(":")
    if separator and library in ("timm", "torchvision"):
        from gpusq_compile.library_models import load_library_model

        return load_library_model(library, name, data=data, weights=weights)
    if separator and not Path(spec).exists():
        raise InputError(
            "unknown-model-library",
            f"no model library '{library}' (from '{spec}')",
            hint=did_you_mean(library, ["timm", "torchvision"]) + ", or a Python file",
        )
    for option, value in (("--data", data), ("--weights", weights)):
        if value is not None:
            raise InputError(
                "option-for-library-models",
                f"{option} {value} was given with the model file {spec}",
                hint="a model file brings its own data and weights; "
                f"{option} is for timm:NAME and torchvision:NAME",
            )
    return _load_file(Path(spec))


def _load_file(path: Path) -> ModelSource:
    if not path.exists():
        siblings = [str(p) for p in path.parent.glob("*.py")] if path.parent.is_dir() else []
        close = nearest(str(path), siblings)
        raise InputError(
            "model-file-missing",
            f"no model file at {path}",
            hint=f"did you mean {close}?"
            if close
            else "MODEL is a Python file, timm:NAME or torchvision:NAME",
        )
    if path.is_dir():
        raise InputError("model-file-is-folder", f"{path} is a folder, not a Python file")
    module = _execute(path)
    for name in REQUIRED:
        if not callable(getattr(module, name, None)):
            present = [key for key, value in vars(module).items() if callable(value)]
            close = nearest(name, present)
            raise InputError(
                f"no-{name.replace('_', '-')}-function",
                f"{relative_to_cwd(path)} defines no function {name}()",
                location=Location(relative_to_cwd(path)),
                hint=(f"did you mean '{close}'? " if close else "")
                + "a model file defines model() -> nn.Module and example_inputs() -> tuple",
            )
    notes = [
        ("unused-model-function", f"{name}() is defined, but this version does not use it")
        for name in ("loss", "metrics")
        if callable(getattr(module, name, None))
    ]
    dynamic_shapes = getattr(module, "dynamic_shapes", None)
    return ModelSource(
        origin=str(path),
        module=call_user(module.model, path, "model()"),
        example_inputs=call_user(module.example_inputs, path, "example_inputs()"),
        train_data=_data_function(module, "train_data", path),
        calibration_data=_data_function(module, "calibration_data", path),
        eval_data=_data_function(module, "eval_data", path),
        logits=getattr(module, "logits", None),
        dynamic_shapes=call_user(dynamic_shapes, path, "dynamic_shapes()")
        if dynamic_shapes
        else None,
        file=path,
        notes=notes,
    )


def _execute(path: Path) -> ModuleType:
    shown = relative_to_cwd(path)
    name = "gpusq_model_" + "".join(c if c.isalnum() else "_" for c in path.stem)
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise InputError("model-file-not-python", f"{shown} is not a Python file")
    module = importlib.util.module_from_spec(spec)
    folder = str(path.resolve().parent)
    sys.modules[name] = module
    sys.path.insert(0, folder)
    try:
        spec.loader.exec_module(module)
    except SyntaxError as error:
        where = relative_to_cwd(Path(error.filename)) if error.filename else shown
        raise InputError(
            "model-file-syntax",
            f"{error.msg}: {(error.text or '').strip()}",
            location=Location(where, error.lineno, error.offset),
        ) from None
    except Exception as error:
        raise user_error(error, path, "importing the model file", "model-file-failed") from error
    finally:
        sys.path.remove(folder)
    return module


def _data_function(module: ModuleType, name: str, path: Path) -> DataFactory | None:
    function = getattr(module, name, None)
    if function is None:
        return None
    if not callable(function):
        raise InputError(
            "data-not-a-function",
            f"{name} is a {type(function).__name__}, not a function",
            location=Location(relative_to_cwd(path)),
            hint=f"write def {name}(): return the iterable",
        )
    return lambda: call_user(function, path, f"{name}()")


def call_user(function: Callable[..., Any], path: Path | None, what: str, *args: Any) -> Any:
    """Call a user's function; what it raises becomes an InputError with its own file:line."""
    try:
        return function(*args)
    except InputError:
        raise
    except Exception as error:
        raise user_error(error, path, what, "model-file-failed") from error


def user_error(error: BaseException, path: Path | None, what: str, code: str) -> InputError:
    """The error a user's code raised, placed at the innermost line of it that we can name."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if path and Path(frame.filename) == path.resolve()]
    own = own or [frame for frame in frames if path and Path(frame.filename) == path]
    outside = [
        frame
        for frame in frames
        if "site-packages" not in frame.filename
        and not frame.filename.startswith("<")
        and Path(__file__).parent not in Path(frame.filename).parents
    ]
    frame = (own or outside or list(frames))[-1] if frames else None
    location = (
        Location(relative_to_cwd(Path(frame.filename)), frame.lineno) if frame is not None else None
    )
    return InputError(code, f"{what} raised {type(error).__name__}: {error}", location=location)


def check_source(source: ModelSource) -> None:
    """Check the model's type, its example inputs and that every weight is finite.

    Raises:
        InputError: naming the object and what was expected.
    """
    location = Location(relative_to_cwd(source.file)) if source.file else None
    if not isinstance(source.module, nn.Module):
        raise InputError(
            "model-not-a-module",
            f"model() returned a {type(source.module).__name__}, expected a torch.nn.Module",
            location=location,
            hint="return the module itself, with its weights loaded",
        )
    inputs: Any = source.example_inputs
    if isinstance(inputs, torch.Tensor):
        source.example_inputs = inputs = (inputs,)
    if not isinstance(inputs, (tuple, list)) or not any(
        isinstance(value, torch.Tensor) and value.ndim > 0 for value in inputs
    ):
        raise InputError(
            "example-inputs",
            f"example_inputs() returned a {type(inputs).__name__} without a batched tensor",
            location=location,
            hint="return a tuple of the tensors that forward() takes, batch first",
        )
    source.example_inputs = tuple(inputs)
    for name, tensor in source.module.state_dict().items():
        parameter = name in dict(source.module.named_parameters())
        if not tensor.is_floating_point():
            continue
        bad = ~torch.isfinite(tensor) if parameter else torch.isnan(tensor)
        if bool(bad.any()):
            kind = "NaN" if bool(torch.isnan(tensor).any()) else "infinite"
            raise InputError(
                "weights-not-finite",
                f"{name} of shape {list(tensor.shape)} holds {int(bad.sum())} {kind} values",
                location=location,
                hint="the checkpoint is damaged or training diverged",
            )
