"""Where the model and its data come from: a model file, a library's model, or Python objects."""

from __future__ import annotations

import importlib.util
import inspect
import linecache
import sys
import sysconfig
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
LIBRARIES = ("timm", "torchvision")
MODEL_FORMS = "MODEL is a Python file, timm:NAME or torchvision:NAME"

MOST_LINES = 12
"""Most lines of a user's error message that are shown."""


@dataclass
class ModelSource:
    """A model and everything the compiler was given with it.

    `origin` is what messages call the model: the file as typed, `timm:NAME`, or a class name.
    `synthetic` is true when the calibration images are generated noise because a library model
    came without data; `notes` are warnings about the source that belong in the report. `places`
    are where the model file defines its functions.
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
    places: dict[str, Location] = field(default_factory=dict)

    def place(self, function: str) -> Location | None:
        """Where the model file defines a function; the file alone if that is not known."""
        default = Location(relative_to_cwd(self.file)) if self.file else None
        return self.places.get(function, default)


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
    if separator and library in LIBRARIES:
        from gpusq_compile.library_models import load_library_model

        return load_library_model(library, name, data=data, weights=weights)
    if separator and not Path(spec).exists():
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
                f"{option} is for timm:NAME and torchvision:NAME",
            )
    return _load_file(Path(spec))


def _load_file(path: Path) -> ModelSource:
    if not path.exists():
        raise _no_file(path)
    if path.is_dir():
        raise InputError(
            "model-file-is-folder", f"{path} is a folder, not a Python file", hint=MODEL_FORMS
        )
    namespace = _execute(path)
    functions = _functions(namespace, path)
    notes = [
        ("unused-model-function", f"{name}() is defined, but this version does not use it")
        for name in ("loss", "metrics")
        if callable(getattr(namespace, name, None))
    ]
    return ModelSource(
        origin=str(path),
        module=call_user(functions["model"], path, "model()"),
        example_inputs=call_user(functions["example_inputs"], path, "example_inputs()"),
        train_data=_data_factory(functions, "train_data", path),
        calibration_data=_data_factory(functions, "calibration_data", path),
        eval_data=_data_factory(functions, "eval_data", path),
        logits=functions.get("logits"),
        dynamic_shapes=call_user(functions["dynamic_shapes"], path, "dynamic_shapes()")
        if "dynamic_shapes" in functions
        else None,
        file=path,
        notes=notes,
        places={
            name: place for name, function in functions.items() if (place := defined_at(function))
        },
    )


def _no_file(path: Path) -> InputError:
    siblings = [str(p) for p in path.parent.glob("*.py")] if path.parent.is_dir() else []
    if close := nearest(str(path), siblings):
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
                f"{name} is {_described(value)}, expected a function",
                location=Location(shown),
                hint=f"write `def {name}(): return ...`",
            )
        found[name] = value
    return found


def _described(value: object) -> str:
    """What a value is, in words: `None`, `the class Net`, `a list`."""
    if value is None:
        return "None"
    if isinstance(value, type):
        return f"the class {value.__name__}"
    name = type(value).__name__
    return f"{'an' if name[0] in 'AEIOUaeiou' else 'a'} {name}"


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


def defined_at(function: Callable[..., Any]) -> Location | None:
    """Where a function is written; None for what is not Python."""
    code = getattr(inspect.unwrap(function), "__code__", None)
    if code is None:
        return None
    return Location(relative_to_cwd(Path(code.co_filename)), code.co_firstlineno)


def call_user(function: Callable[..., Any], path: Path | None, what: str, *args: Any) -> Any:
    """Call a user's function; what it raises becomes an InputError with its own file:line."""
    try:
        return function(*args)
    except InputError:
        raise
    except (Exception, SystemExit) as error:
        failure = user_error(error, path, what, "model-file-failed")
        # A wrong signature fails before the first line of the function.
        failure.location = failure.location or defined_at(function)
        raise failure from error


def user_error(error: BaseException, path: Path | None, what: str, code: str) -> InputError:
    """The error a user's code raised, placed at the innermost line of it that we can name.

    That is a line of the model file `path` where one was running, else of any file that is
    neither this package's nor an installed library's; no location when there is none.
    """
    frames = traceback.extract_tb(error.__traceback__)
    outside = [frame for frame in frames if _is_users(Path(frame.filename))]
    own = [frame for frame in outside if path and _same_file(Path(frame.filename), path)]
    message = f"{what} raised {_error_text(error, outside)}"
    if not outside:
        return InputError(code, message)
    frame = (own or outside)[-1]
    if outside[-1] is not frame:
        deeper = Location(relative_to_cwd(Path(outside[-1].filename)), outside[-1].lineno)
        message += f" (at {deeper})"
    return InputError(
        code, message, location=Location(relative_to_cwd(Path(frame.filename)), frame.lineno)
    )


def _error_text(error: BaseException, frames: list[traceback.FrameSummary]) -> str:
    lines = str(error).strip().splitlines()
    if len(lines) > MOST_LINES:
        lines = [*lines[:MOST_LINES], f"... and {len(lines) - MOST_LINES} more lines"]
    if not lines and frames:
        source = linecache.getline(frames[-1].filename, frames[-1].lineno or 0).strip()
        lines = [source] if source else []
    return ": ".join([type(error).__name__, *(["\n".join(lines)] if lines else [])])


def _is_users(file: Path) -> bool:
    if file.name.startswith("<"):
        return False
    ours = Path(__file__).resolve().parent
    stdlib = Path(sysconfig.get_path("stdlib")).resolve()
    resolved = file.resolve()
    return (
        not {"site-packages", "dist-packages"} & set(resolved.parts)
        and not any(folder in resolved.parents for folder in (ours, stdlib))
        and ours not in file.parents
    )


def _same_file(one: Path, other: Path) -> bool:
    return one.resolve() == other.resolve()


def check_source(source: ModelSource) -> None:
    """Check the model's type, its example inputs and that every weight is finite.

    Raises:
        InputError: naming the object and what was expected.
    """
    _check_module(source)
    source.example_inputs = _tuple_of_inputs(source)
    parameters = {name for name, _ in source.module.named_parameters()}
    for name, tensor in source.module.state_dict().items():
        if not isinstance(tensor, torch.Tensor):
            continue
        if tensor.is_meta:
            raise InputError(
                "weights-not-loaded",
                f"{name} is on the meta device: it has a shape, but no values",
                location=source.place("model"),
                hint="load the weights before model() returns",
            )
        if not tensor.is_floating_point():
            continue
        if name in parameters and tensor.dtype != torch.float32:
            raise InputError(
                "weights-not-float32",
                f"{name} {list(tensor.shape)} is {str(tensor.dtype).removeprefix('torch.')}, "
                "expected float32: fine-tune and scales need its precision",
                location=source.place("model"),
                hint="return model.float(); the rules' target.precision sets the result's type",
            )
        # A buffer may hold infinities on purpose, such as an attention mask.
        bad = ~torch.isfinite(tensor) if name in parameters else torch.isnan(tensor)
        if bool(bad.any()):
            kind = "NaN" if bool(torch.isnan(tensor).any()) else "infinite"
            raise InputError(
                "weights-not-finite",
                f"{name} {list(tensor.shape)} is {kind} in {int(bad.sum())} of {tensor.numel()} "
                "places",
                location=source.place("model"),
                hint="the checkpoint is damaged or training diverged",
            )


def _check_module(source: ModelSource) -> None:
    found: Any = source.module
    if isinstance(found, nn.Module):
        return
    if isinstance(found, type) and issubclass(found, nn.Module):
        hint = f"add parentheses: return {found.__name__}(...)"
    elif found is None:
        hint = "model() has no `return`, or returns nothing"
    elif isinstance(found, dict):
        hint = "build the module, load_state_dict() the weights into it, and return the module"
    else:
        hint = "return the module itself, with its weights loaded"
    raise InputError(
        "model-not-a-module",
        f"model() returned {_described(found)}, expected a torch.nn.Module",
        location=source.place("model"),
        hint=hint,
    )


def _tuple_of_inputs(source: ModelSource) -> tuple[Any, ...]:
    inputs: Any = source.example_inputs
    if isinstance(inputs, torch.Tensor):
        inputs = (inputs,)
    if not isinstance(inputs, (tuple, list)) or not any(
        isinstance(value, torch.Tensor) and value.ndim > 0 and value.shape[0] > 0
        for value in inputs
    ):
        raise InputError(
            "example-inputs",
            f"example_inputs() returned {_described(inputs)} without a batched tensor",
            location=source.place("example_inputs"),
            hint="return a tuple of the tensors that forward() takes, batch first",
        )
    return tuple(inputs)
