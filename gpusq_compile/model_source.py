"""A model and everything the compiler was given with it."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import is_lazy
from torch.utils._pytree import tree_leaves

from gpusq_compile.batch_inputs import size_of
from gpusq_compile.errors import InputError, Location, relative_to_cwd
from gpusq_compile.user_code import defined_at, described

DataFactory = Callable[[], Iterable[Any]]
"""Called once per pass over the data; yields `(inputs, labels)` batches or inputs alone."""

LossFunction = Callable[[nn.Module, Any], torch.Tensor]
"""`loss(model, batch)`: a scalar to minimize; `batch` as the data gave it, on the device."""

MetricsFunction = Callable[[Any, Any], Mapping[str, Any]]
"""`metrics(outputs, batch)`: numbers by name, higher is better; means over the batch's samples."""

ARGUMENTS = {
    "loss": ("model", "batch"),
    "metrics": ("outputs", "batch"),
    "logits": ("outputs",),
}
"""What the functions that a user may give are called with."""

DATA_FUNCTIONS = ("train_data", "calibration_data", "eval_data")


@dataclass
class ModelSource:
    """A model and everything the compiler was given with it.

    `origin` is what messages call the model: the file as typed, `timm:NAME`, or a class name.
    `synthetic` is true when the calibration images are generated noise because a library model
    came without data; `notes` are warnings about the source that belong in the report, and `facts`
    what a person should know of it. `data_forms` are the forms of `--data` that serve a library
    model. `places` are where the model file defines its functions.
    """

    origin: str
    module: nn.Module
    example_inputs: tuple[Any, ...]
    train_data: DataFactory | None = None
    calibration_data: DataFactory | None = None
    eval_data: DataFactory | None = None
    logits: Callable[[Any], torch.Tensor] | None = None
    loss: LossFunction | None = None
    metrics: MetricsFunction | None = None
    dynamic_shapes: Any = None
    file: Path | None = None
    synthetic: bool = False
    data_forms: str = "imagefolder:DIR"
    notes: list[tuple[str, str]] = field(default_factory=list)
    facts: list[tuple[str, str]] = field(default_factory=list)
    places: dict[str, Location] = field(default_factory=dict)

    def place(self, function: str) -> Location | None:
        """Where the model file defines a function; the file alone if that is not known."""
        default = Location(relative_to_cwd(self.file)) if self.file else None
        return self.places.get(function, default)


def check_source(source: ModelSource) -> None:
    """Check the model's type, its example inputs and functions, and that every weight is finite.

    Raises:
        InputError: naming the object and what was expected.
    """
    _check_module(source)
    source.example_inputs = _tuple_of_inputs(source)
    for name in ARGUMENTS:
        _check_function(name, getattr(source, name))
    parameters = {name for name, _ in source.module.named_parameters()}
    for name, tensor in source.module.state_dict().items():
        if not isinstance(tensor, torch.Tensor):
            continue
        if is_lazy(tensor):
            raise InputError(
                "weights-not-loaded",
                f"{name} has neither shape nor values: a lazy module makes its weights when it is "
                "first called",
                location=source.place("model"),
                hint="call the model once on example inputs before model() returns it",
            )
        if tensor.is_meta:
            raise InputError(
                "weights-not-loaded",
                f"{name} is on the meta device: it has a shape, but no values",
                location=source.place("model"),
                hint="load the weights before model() returns",
            )
        if tensor.is_inference():
            raise InputError(
                "weights-inference",
                f"{name} was made under torch.inference_mode(), which forbids to change it later",
                location=source.place("model"),
                hint="make or load the model under torch.no_grad(), or outside of both",
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
        _check_written_in_python(source)
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
        f"model() returned {described(found)}, expected a torch.nn.Module",
        location=source.place("model"),
        hint=hint,
    )


def _check_written_in_python(source: ModelSource) -> None:
    """Raise InputError for what is a program already, which cannot be traced again."""
    for path, module in source.module.named_modules():
        if isinstance(module, torch.jit.ScriptModule):
            form, made_by = "a TorchScript program", "torch.jit.script() or torch.jit.trace()"
        elif isinstance(module, torch.fx.GraphModule) and "eval" in vars(module):
            form, made_by = "an exported program", "torch.export.export()"
        else:
            continue
        raise InputError(
            "model-is-a-program",
            f"{f'the submodule {path!r}' if path else 'the model'} is {form} "
            f"({type(module).__name__}), expected a torch.nn.Module in Python",
            location=source.place("model"),
            hint=f"return the module itself, as it was before {made_by}",
        )


def _check_function(name: str, function: Any) -> None:
    """Raise InputError unless the user's function takes what it is called with."""
    if function is None:
        return
    wanted = ARGUMENTS[name]
    expected = f"expected {name}({', '.join(wanted)})"
    if not callable(function) or isinstance(function, nn.Module):
        hint = f"write `def {name}({', '.join(wanted)}): return ...`"
        text = f"{name} is {described(function)}, {expected}"
        raise InputError("not-a-function", text, hint=hint)
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):
        return  # Not written in Python: calling it will tell.
    try:
        signature.bind(*wanted)
    except TypeError as error:
        raise InputError(
            "function-arguments",
            f"{name}{signature} cannot be called with ({', '.join(wanted)}): {error}",
            location=defined_at(function),
            hint=expected,
        ) from None


def _tuple_of_inputs(source: ModelSource) -> tuple[Any, ...]:
    inputs: Any = source.example_inputs
    if isinstance(inputs, torch.Tensor):
        inputs = (inputs,)
    batched = isinstance(inputs, (tuple, list)) and size_of(tuple(inputs))
    if not batched or not any(isinstance(leaf, torch.Tensor) for leaf in tree_leaves(inputs)):
        raise InputError(
            "example-inputs",
            f"example_inputs() returned {described(inputs)} without a batched tensor",
            location=source.place("example_inputs"),
            hint="return a tuple of the tensors that forward() takes, batch first",
        )
    return tuple(inputs)
