"""Loading what the command line names as MODEL: a model file, or a library's model."""

from __future__ import annotations

import importlib.util
import inspect
import os
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

from torch import nn

from gpusq_compile.errors import InputError, Location, did_you_mean, nearest, relative_to_cwd
from gpusq_compile.model_source import ARGUMENTS, DATA_FUNCTIONS, DataFactory, ModelSource
from gpusq_compile.sources.library import load_library_model
from gpusq_compile.sources.paths import nearest_path, readable_files, typed_path
from gpusq_compile.user_code import call_user, defined_at, described, user_error

REQUIRED = ("model", "example_inputs")
OPTIONAL = (*DATA_FUNCTIONS, *ARGUMENTS, "dynamic_shapes")
LIBRARIES = ("timm", "torchvision", "hf")
MODEL_FORMS = "MODEL is a Python file, timm:NAME, torchvision:NAME or hf:DIR"


def load_source(
    spec: str, *, data: str | None = None, weights: str | None = None, scope: str | None = None
) -> ModelSource:
    """Load what the command line names as MODEL.

    Args:
        spec: a Python file, `timm:NAME`, `torchvision:NAME`, or `hf:` and a transformers folder,
            a config.json or a hub name.
        data: `imagefolder:DIR` or `coco:DIR`, for library models.
        weights: for library models, `pretrained` (downloaded by the library) or the path of a
            safetensors file; when None, those of a transformers folder or hub name, else random.
        scope: the submodule that is to be compiled.

    Raises:
        InputError: what is wrong with the file, the name, the data or the weights.
    """
    library, separator, name = spec.partition(":")
    if separator and library in LIBRARIES:
        with readable_files():
            return load_library_model(library, name, data=data, weights=weights, scope=scope)
    path = typed_path(spec)
    if separator and not os.path.exists(path):
        raise InputError(
            "unknown-model-library",
            f"no model library '{library}' (from '{spec}')",
            hint=did_you_mean(library, LIBRARIES) + ", or a Python file",
        )
    for option, value in (("--data", data), ("--weights", weights)):
        if value is not None:
            raise InputError(
                "option-for-library-models",
                f"{option} {value} was given with the model file {spec}",
                hint="a model file brings its own data and weights; "
                f"{option} is for timm:NAME, torchvision:NAME and hf:DIR",
            )
    with readable_files():
        return _load_file(path)


def _load_file(path: Path) -> ModelSource:
    if not path.exists():
        raise _no_file(path)
    if path.is_dir():
        raise InputError(
            "model-file-is-folder", f"{path} is a folder, not a Python file", hint=MODEL_FORMS
        )
    namespace = _execute(path)
    functions = _functions(namespace, path)
    return ModelSource(
        origin=str(path),
        module=call_user(functions["model"], path, "model()"),
        example_inputs=call_user(functions["example_inputs"], path, "example_inputs()"),
        train_data=_data_factory(functions, "train_data", path),
        calibration_data=_data_factory(functions, "calibration_data", path),
        eval_data=_data_factory(functions, "eval_data", path),
        logits=functions.get("logits"),
        loss=functions.get("loss"),
        metrics=functions.get("metrics"),
        dynamic_shapes=call_user(functions["dynamic_shapes"], path, "dynamic_shapes()")
        if "dynamic_shapes" in functions
        else None,
        file=path,
        places={
            name: place for name, function in functions.items() if (place := defined_at(function))
        },
    )


def _no_file(path: Path) -> InputError:
    close: Path | None = None
    if path.parent.is_dir():
        # By its stem: every model file ends in .py.
        siblings = {sibling.stem: sibling for sibling in path.parent.glob("*.py")}
        close = siblings.get(nearest(path.stem, siblings) or "")
    else:
        close = nearest_path(path)
    if close is not None:
        hint = f"did you mean {close}?"
    elif path.suffix or len(path.parts) > 1:
        hint = MODEL_FORMS
    else:
        hint = f"{MODEL_FORMS}: did you mean timm:{path}?"
    return InputError("model-file-missing", f"no model file at {path}", hint=hint)


def _functions(namespace: ModuleType, path: Path) -> dict[str, Callable[..., Any]]:
    """The functions by name that a model file may define, those that it does.

    Raises:
        InputError: a required one is missing, or one of the names is no function.
    """
    shown = relative_to_cwd(path)
    found: dict[str, Callable[..., Any]] = {}
    for name in (*REQUIRED, *OPTIONAL):
        value = getattr(namespace, name, None)
        if value is None and name in REQUIRED:
            near = nearest(name, [k for k, v in vars(namespace).items() if inspect.isfunction(v)])
            raise InputError(
                f"no-{name.replace('_', '-')}-function",
                f"the model file defines no function {name}()",
                location=Location(shown),
                hint=(f"is {near}() meant? " if near else "")
                + "a model file defines model() -> nn.Module and example_inputs() -> tuple",
            )
        if value is None:
            continue
        # A module is callable too, but calling it would run its forward().
        if not callable(value) or isinstance(value, nn.Module):
            raise InputError(
                "not-a-function",
                f"{name} is {described(value)}, expected a function",
                location=Location(shown),
                hint=f"write `def {name}(): return ...`",
            )
        found[name] = value
    return found


def _execute(path: Path) -> ModuleType:
    shown = relative_to_cwd(path)
    name = "gpusq_model_" + "".join(c if c.isalnum() else "_" for c in path.stem)
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise InputError("model-file-not-python", f"{shown} is not a Python file", hint=MODEL_FORMS)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    # As `python FILE` does, and for good: functions of the file may import their neighbours late.
    folder = str(path.resolve().parent)
    if folder not in sys.path:
        sys.path.insert(0, folder)
    try:
        spec.loader.exec_module(module)
    except SyntaxError as error:
        where = relative_to_cwd(Path(error.filename)) if error.filename else shown
        text = f": {error.text.strip()}" if error.text else ""
        raise InputError(
            "model-file-syntax",
            f"{error.msg}{text}",
            location=Location(where, error.lineno or None, error.offset or None),
        ) from None
    except (Exception, SystemExit) as error:
        raise user_error(error, path, "importing the model file", "model-file-failed") from error
    return module


def _data_factory(
    functions: dict[str, Callable[..., Any]], name: str, path: Path
) -> DataFactory | None:
    function = functions.get(name)
    return None if function is None else lambda: call_user(function, path, f"{name}()")
