"""Batches of the user's data: their form, their labels, and top-1 accuracy over them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._pytree import tree_leaves

from gpusq_compile.errors import InputError
from gpusq_compile.model_source import DataFactory, user_error


@dataclass(frozen=True)
class Batch:
    """Model inputs (batch first) and, where the data has them, class indices int64 [batch]."""

    inputs: tuple[Any, ...]
    labels: torch.Tensor | None

    @property
    def size(self) -> int:
        return int(next(value for value in self.inputs if isinstance(value, torch.Tensor)).shape[0])

    def to(self, device: torch.device) -> Batch:
        moved = tuple(
            value.to(device) if isinstance(value, torch.Tensor) else value for value in self.inputs
        )
        return Batch(moved, None if self.labels is None else self.labels.to(device))


def batches(
    factory: DataFactory, name: str, device: torch.device, limit: int | None = None
) -> Iterator[Batch]:
    """The batches of `factory()`, in the form the compiler uses.

    Args:
        name: what messages call the data, e.g. `calibration_data`.
        limit: most batches to take; all when None.

    Raises:
        InputError: the data is no iterable, empty, or a batch has another form than
            `(inputs, labels)` or inputs alone.
    """
    data = factory()
    try:
        iterator = iter(data)
    except TypeError:
        raise InputError(
            "data-not-iterable",
            f"{name}() returned a {type(data).__name__}, expected an iterable of batches",
        ) from None
    count = 0
    while limit is None or count < limit:
        try:
            raw = next(iterator)
        except StopIteration:
            break
        except InputError:
            raise
        except Exception as error:
            raise user_error(error, None, f"{name}() batch {count}", "data-failed") from error
        yield read_batch(raw, f"{name}() batch {count}").to(device)
        count += 1
    if count == 0:
        raise InputError(
            "data-empty",
            f"{name}() yielded no batch",
            hint="it must yield (inputs, labels) batches or inputs alone",
        )


def read_batch(raw: Any, where: str) -> Batch:
    """One batch as the user's data yields it -> `Batch`.

    A tensor is inputs alone. Of a pair whose second item is not a floating-point tensor of
    several dimensions, the second is the labels. Labels must be class indices [batch].

    Raises:
        InputError: what was found and what was expected.
    """
    if isinstance(raw, torch.Tensor):
        return Batch((raw,), None)
    if not isinstance(raw, (tuple, list)) or not raw:
        raise InputError(
            "batch-form",
            f"{where} is a {type(raw).__name__}",
            hint="a batch is a tensor, or a pair (inputs, labels)",
        )
    if len(raw) == 1:
        return Batch(_inputs(raw[0], where), None)
    if len(raw) != 2:
        raise InputError(
            "batch-form",
            f"{where} has {len(raw)} items",
            hint="a batch is a tensor, or a pair (inputs, labels); "
            "several inputs go in a tuple: ((a, b), labels)",
        )
    inputs = _inputs(raw[0], where)
    labels = raw[1]
    if labels is None:
        return Batch(inputs, None)
    if not isinstance(labels, torch.Tensor):
        try:
            labels = torch.as_tensor(labels)
        except (TypeError, ValueError, RuntimeError):
            raise _labels_error(where, f"a {type(labels).__name__}") from None
    size = Batch(inputs, None).size
    if labels.is_floating_point() or labels.dtype == torch.bool or labels.ndim != 1:
        raise _labels_error(where, f"{labels.dtype} {list(labels.shape)}")
    if labels.shape[0] != size:
        raise _labels_error(where, f"{labels.shape[0]} labels for {size} inputs")
    return Batch(inputs, labels.long())


def _inputs(value: Any, where: str) -> tuple[Any, ...]:
    inputs = tuple(value) if isinstance(value, (tuple, list)) else (value,)
    if not any(isinstance(item, torch.Tensor) and item.ndim > 0 for item in inputs):
        raise InputError(
            "batch-form",
            f"{where} has inputs of type {type(value).__name__}, expected batched tensors",
        )
    return inputs


def _labels_error(where: str, found: str) -> InputError:
    return InputError(
        "labels-kind",
        f"{where} has labels of the wrong kind: {found}",
        hint="labels are integer class indices [batch]; without labels, yield inputs alone",
    )


def logits_of(outputs: Any, logits: Callable[[Any], torch.Tensor] | None) -> torch.Tensor:
    """The logits [batch, classes] in a model's outputs.

    Raises:
        InputError: the outputs hold no single [batch, classes] tensor and no `logits(outputs)`
            was given.
    """
    if logits is not None:
        return logits(outputs)
    tensors = [leaf for leaf in tree_leaves(outputs) if isinstance(leaf, torch.Tensor)]
    if len(tensors) == 1 and tensors[0].ndim == 2:
        return tensors[0]
    shapes = ", ".join(str(list(tensor.shape)) for tensor in tensors)
    raise InputError(
        "no-logits",
        f"the model's outputs have shapes {shapes}: no single [batch, classes] tensor",
        hint="define logits(outputs) -> tensor in the model file",
    )


def check_labels(labels: torch.Tensor, classes: int, where: str) -> None:
    """Raise InputError unless every label is in [0, classes)."""
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or high >= classes:
        raise InputError(
            "labels-range",
            f"{where} has labels from {low} to {high}, but the model has {classes} classes",
        )
