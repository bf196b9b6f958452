"""One batch of the user's data: reading it, and whether it fits the model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from gpusq_compile.batch_inputs import find_inputs, moved, part_of, size_of
from gpusq_compile.errors import InputError, Location


@dataclass(frozen=True)
class Batch:
    """One batch of the user's data.

    Args:
        inputs: what `forward` takes, batch first; empty where a batch that only the user's loss
            reads holds nothing like the example inputs.
        labels: class indices int64 [batch], where the data has them.
        raw: the batch as the user's data gave it.
        labelled: whether anything stands beside the inputs.
        paired: whether `raw[0]` are the inputs.
    """

    inputs: tuple[Any, ...]
    labels: torch.Tensor | None
    raw: Any = None
    labelled: bool = False
    paired: bool = False

    @property
    def size(self) -> int:
        """Samples: the first size of the first tensor, or the length of the first list."""
        return size_of(self.inputs or self.raw) or 1

    def to(self, device: torch.device) -> Batch:
        """Its tensors on `device`, and the structure around them as it was."""
        inputs, labels, raw = moved((self.inputs, self.labels, self.raw), device)
        return replace(self, inputs=inputs, labels=labels, raw=raw)

    def part(self, start: int, end: int) -> Batch:
        """Samples `start` to `end` alone. What does not have one entry per sample stays whole."""
        size = self.size
        inputs = tuple(part_of(value, start, end, size) for value in self.inputs)
        labels = None if self.labels is None else self.labels[start:end]
        samples = inputs[0] if len(inputs) == 1 and isinstance(inputs[0], list) else None
        if not self.paired:
            raw = part_of(self.raw, start, end, size) if samples is None else samples
            if isinstance(self.raw, Mapping):
                raw = part_of(self.raw, start, end, size)
        else:
            first, *rest = self.raw
            first = part_of(first, start, end, size) if samples is None else samples
            raw = (first, *(part_of(value, start, end, size) for value in rest))
        return replace(self, inputs=inputs, labels=labels, raw=raw)


@dataclass(frozen=True)
class Form:
    """What every batch of one of the user's data functions must be like.

    Args:
        example: the example inputs, which the batch's inputs must resemble in number, type and
            rank.
        names: the parameters of `forward` that they fill.
        fixed: every size but that of the batch must be the example's too.
        free: the batch may have any form, as the user's own `loss` or `metrics` reads it.
        labels: the batch must have labels.
        inputs: the batch must hold inputs for `forward`.
    """

    example: tuple[Any, ...]
    names: tuple[str, ...] = ()
    fixed: bool = False
    free: bool = False
    labels: bool = False
    inputs: bool = True


def check_fit(batch: Batch, example: tuple[Any, ...], where: str, *, fixed: bool) -> None:
    """Raise InputError unless the batch is like the example inputs, and its values are finite."""
    if len(batch.inputs) != len(example):
        raise InputError(
            "batch-form",
            f"{where} has {len(batch.inputs)} inputs, example_inputs() has {len(example)}",
            hint="a batch is (inputs, labels); several inputs go in a tuple: ((a, b), labels)",
        )
    for index, (value, like) in enumerate(zip(batch.inputs, example, strict=True)):
        _check_value(value, like, f"input {index}", where, fixed=fixed)


def _check_value(value: Any, like: Any, name: str, where: str, *, fixed: bool) -> None:
    if isinstance(like, Mapping):
        for key in like:
            _check_value(value[key], like[key], f"{name}[{key!r}]", where, fixed=fixed)
    elif isinstance(like, (list, tuple)) and like:
        # Items of a list are samples of their own: their first size is no batch.
        for index, item in enumerate(value):
            other = like[0] if isinstance(like, list) else like[index]
            free = isinstance(like, list)
            _check_value(item, other, f"{name}[{index}]", where, fixed=fixed and not free)
    if not isinstance(value, torch.Tensor) or not isinstance(like, torch.Tensor):
        return
    fits = value.ndim == like.ndim and (not fixed or value.shape[1:] == like.shape[1:])
    if value.dtype != like.dtype or not fits:
        raise InputError(
            "batch-form",
            f"{where} has {name} of {describe(value)}, example_inputs() gives {describe(like)}",
            hint="only the first size, the batch, may differ: correct whichever is wrong"
            if fixed
            else "correct whichever is wrong",
        )
    if value.is_floating_point() and not bool(torch.isfinite(value).all()):
        raise InputError("data-not-finite", f"{where} has NaN or infinite values in {name}")


def describe(tensor: torch.Tensor) -> str:
    """Type and shape, e.g. `float32 [16, 3, 224, 224]`."""
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"


def outline(value: Any, depth: int = 3) -> str:
    """What a batch is built of, e.g. `tuple(list(2 of float32 [3, 64, 64]), list(2 of dict))`."""
    if isinstance(value, torch.Tensor):
        return describe(value)
    name = type(value).__name__
    if depth == 0:
        return name
    if isinstance(value, Mapping):
        items = [f"{key}: {outline(item, depth - 1)}" for key, item in list(value.items())[:6]]
        return f"{name}({', '.join(items)})"
    if isinstance(value, list) and value:
        return f"{name}({len(value)} of {outline(value[0], depth - 1)})"
    if isinstance(value, tuple):
        return f"{name}({', '.join(outline(item, depth - 1) for item in value[:6])})"
    return name


def read_batch(raw: Any, where: str) -> Batch:
    """One batch as the user's data yields it -> `Batch`.

    A tensor is inputs alone. The second item of a pair is the labels: class indices [batch].

    Raises:
        InputError: what was found and what was expected.
    """
    if isinstance(raw, torch.Tensor):
        return Batch(_inputs(raw, where), None, raw)
    if not isinstance(raw, (tuple, list)) or not raw:
        raise InputError(
            "batch-form",
            f"{where} is a {type(raw).__name__}",
            hint="a batch is a tensor, or a pair (inputs, labels)",
        )
    if len(raw) == 1:
        return Batch(_inputs(raw[0], where), None, raw, paired=True)
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
        return Batch(inputs, None, raw, paired=True)
    if not isinstance(labels, torch.Tensor):
        try:
            labels = torch.as_tensor(labels)
        except (TypeError, ValueError, RuntimeError):
            raise _labels_error(where, f"a {type(labels).__name__} of no numbers") from None
    size = Batch(inputs, None).size
    if labels.ndim == 2 and labels.shape[1] > 1:
        hint = "one-hot or soft labels become indices with labels.argmax(dim=1)"
        raise _labels_error(where, describe(labels), hint)
    if labels.ndim == 2:
        raise _labels_error(where, describe(labels), "labels.squeeze(1) drops the second axis")
    if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
        raise _labels_error(where, describe(labels), "labels.long() makes class indices of them")
    if labels.ndim != 1:
        raise _labels_error(where, describe(labels))
    if labels.shape[0] != size:
        raise _labels_error(where, f"{labels.shape[0]} labels for {size} inputs")
    return Batch(inputs, labels.long(), raw, labelled=True, paired=True)


def read_free_batch(raw: Any, form: Form, where: str) -> Batch:
    """One batch of any form -> `Batch`, with the inputs that `find_inputs` finds in it.

    What stands beside the inputs is taken for class labels only where it is integers [batch]; in a
    mapping, where its key `labels` or `label` holds them.

    Raises:
        InputError: the batch is empty, or nothing in it is like the example inputs.
    """
    found = find_inputs(raw, form.example, form.names)
    if found is None and form.inputs:
        names = f", {{{', '.join(form.names)}: ...}}" if form.names else ""
        raise InputError(
            "batch-form",
            f"{where} is {outline(raw)}: nothing in it is like example_inputs(), "
            f"{outline(form.example)}",
            hint=f"forward's inputs are found in batches of the form (inputs, ...){names} "
            "or inputs alone",
        )
    if found is None:
        batch = Batch((), None, raw, labelled=True)
    else:
        labelled = found.rest is not None
        batch = Batch(found.inputs, None, raw, labelled=labelled, paired=found.paired)
    size = size_of(batch.inputs or raw)
    if size == 0:
        raise InputError("batch-form", f"{where} is empty: {outline(raw)}")
    labels = _class_labels(found.rest if found else None, size)
    return batch if labels is None else replace(batch, labels=labels)


def _class_labels(rest: Any, size: int | None) -> torch.Tensor | None:
    if isinstance(rest, Mapping):
        rest = rest.get("labels", rest.get("label"))
    if isinstance(rest, list) and rest and all(type(item) is int for item in rest):
        rest = torch.tensor(rest)
    if not isinstance(rest, torch.Tensor) or rest.ndim != 1 or rest.shape[0] != size:
        return None
    integer = not (rest.is_floating_point() or rest.is_complex() or rest.dtype == torch.bool)
    return rest.long() if integer else None


def check_required_labels(batch: Batch, where: str, place: Location | None) -> None:
    """Raise InputError where `finetune.labels: required` meets a batch without labels."""
    if not batch.labelled and batch.labels is None:
        raise InputError(
            "labels-missing",
            f"{where} has no labels, which the rules' `finetune.labels: required` asks for",
            location=place,
            hint="yield (inputs, labels), or let the teacher stand in: `labels: hard` or `soft`",
        )


def _inputs(value: Any, where: str) -> tuple[Any, ...]:
    inputs = tuple(value) if isinstance(value, (tuple, list)) else (value,)
    tensors = [item for item in inputs if isinstance(item, torch.Tensor) and item.ndim > 0]
    if not tensors:
        numpy = type(value).__module__ == "numpy"
        raise InputError(
            "batch-form",
            f"{where} has inputs of type {type(value).__name__}, expected batched tensors",
            hint="torch.from_numpy(array) makes a tensor of it" if numpy else None,
        )
    if tensors[0].shape[0] == 0:
        raise InputError("batch-form", f"{where} is empty: its input is {describe(tensors[0])}")
    return inputs


def _labels_error(where: str, found: str, hint: str | None = None) -> InputError:
    return InputError(
        "labels-kind",
        f"{where} has labels of the wrong kind: {found}; expected integer class indices [batch]",
        hint=hint or "without labels, yield inputs alone",
    )
