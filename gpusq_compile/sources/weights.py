"""Weights from a safetensors file, checked name by name before they are loaded."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

import torch

from gpusq_compile.errors import InputError, nearest
from gpusq_compile.sources.model import PRETRAINED, LibraryModel
from gpusq_compile.sources.paths import check_readable, nearest_path

FLOATS = ("F64", "F32", "F16", "BF16")
INDICES = ("I64", "BOOL")
NAMED = 6
"""As many tensors a warning names."""


def read_weights(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of a safetensors file by name.

    Raises:
        InputError: there is no such file, or it is no safetensors file.
        OSError: the system does not let it be read.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    if not path.exists():
        raise InputError(
            "weights-missing",
            f"no weights at {path}",
            hint=_weights_hint(path),
        )
    check_readable(path)
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise InputError("weights-unreadable", f"{path} is no safetensors file: {error}") from None


def _weights_hint(path: Path) -> str:
    if nearest(str(path), [PRETRAINED]):
        close: object = f"'{PRETRAINED}'"
    else:
        close = nearest_path(path)
    start = f"did you mean {close}? " if close else ""
    return f"{start}--weights takes 'pretrained' or the path of a safetensors file"


def load_weights(model: LibraryModel, path: Path) -> None:
    """Load all weights of a model's module from a safetensors file.

    Tensors that are none of the model's are left out, and a warning of the model names them.

    Raises:
        InputError: there is no such file, it is no safetensors file, or it does not fit.
    """
    state = read_weights(path)
    expected = model.module.state_dict()
    missing = [name for name in expected if name not in state]
    unknown = [name for name in state if name not in expected]
    shapes = [
        f"{name} is {list(state[name].shape)}, the model has {list(tensor.shape)}"
        for name, tensor in expected.items()
        if name in state and state[name].shape != tensor.shape
    ]
    types = wrong_types(expected, stored_types([path]), unknown)
    if missing or shapes or types:
        faults = (
            (missing, "missing"),
            (unknown, "not in the model"),
            (shapes, "of another shape"),
            (types, "of another type"),
        )
        raise misfit(str(path), faults)
    model.module.load_state_dict({name: state[name] for name in expected})
    if unknown:
        text = f"{len(unknown)} tensors of {path} are none of its own and are left out"
        model.notes.append(("weights-unused", f"{model.origin}: {text} ({listed(unknown)})"))


def misfit(
    weights: str, faults: Iterable[tuple[list[str], str]], hint: str | None = None
) -> InputError:
    """The error for weights that are another model's: each kind of fault with what is wrong.

    Args:
        hint: what to say where shapes alone are wrong.
    """
    faults = [(names, what) for names, what in faults if names]
    kinds = [what for _, what in faults]
    if "of another type" in kinds:
        hint = "the compiler takes float weights, and quantizes them itself"
    shown = "; ".join(f"{len(names)} {what} (first: {names[0]})" for names, what in faults)
    verb = "do" if weights.startswith("the weights") else "does"
    return InputError(
        "weights-mismatch",
        f"{weights} {verb} not fit the model: tensors {shown}",
        hint=hint if kinds[-1] != "missing" else None,
    )


def listed(names: list[str]) -> str:
    """The first of some names, and how many there are beside them."""
    more = len(names) - NAMED
    return ", ".join(names[:NAMED]) + (f" and {more} more" if more > 0 else "")


def stored_types(files: Iterable[Path]) -> dict[str, str]:
    """The type of each tensor in safetensors files, as their headers call it: `F16`, `I8`."""
    from safetensors import safe_open

    found: dict[str, str] = {}
    for path in files:
        with safe_open(path, "pt") as file:
            names = file.keys()
            found |= {name: file.get_slice(name).get_dtype() for name in names}
    return found


def wrong_types(
    expected: Mapping[str, torch.Tensor], stored: Mapping[str, str], unused: Iterable[str]
) -> list[str]:
    """The stored tensors whose type no float weight of a model can be read from.

    A stored name may be longer than the model's, or shorter, as that of a part of a model is, or
    another one that a library translates; then the types of indices and masks are let through.

    Args:
        expected: the model's tensors by name.
        unused: the names of stored tensors that are not loaded.
    """
    unused = set(unused)
    faults = []
    for name, stored_type in stored.items():
        if stored_type in FLOATS or name in unused:
            continue
        own = [
            key
            for key in expected
            if key == name or name.endswith(f".{key}") or key.endswith(f".{name}")
        ]
        floating = [key for key in own if expected[key].is_floating_point()]
        if floating if own else stored_type not in INDICES:
            faults.append(f"{name} is {stored_type}, the model has float32")
    return faults
