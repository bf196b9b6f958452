"""Weights from a safetensors file, checked name by name before they are loaded."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import nn

from gpusq_compile.errors import InputError, nearest


def read_weights(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of a safetensors file by name.

    Raises:
        InputError: there is no such file, or it is no safetensors file.
    """
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
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise InputError("weights-unreadable", f"{path} is no safetensors file: {error}") from None


def load_weights(module: nn.Module, path: Path) -> None:
    """Load all of a module's weights from a safetensors file.

    Raises:
        InputError: there is no such file, it is no safetensors file, or it does not fit.
    """
    state = read_weights(path)
    if faults := _mismatches(module.state_dict(), state):
        raise misfit(path, faults)
    module.load_state_dict(state)


def misfit(path: Path, faults: list[str]) -> InputError:
    """The error for weights that are another model's."""
    return InputError(
        "weights-mismatch", f"{path} does not fit the model: tensors {'; '.join(faults)}"
    )


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
