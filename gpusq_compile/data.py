"""Batches of the user's data: there when asked for, of the right form, fitting the model."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.utils._pytree import tree_leaves

from gpusq_compile.errors import InputError, Location
from gpusq_compile.graph.walk import Call
from gpusq_compile.model_source import DATA_FUNCTIONS, DataFactory, ModelSource
from gpusq_compile.network import Network
from gpusq_compile.user_code import call_user, defined_at, user_error


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


def check_data(
    source: ModelSource, *, finetune: bool, scoped: bool = False, labelled: bool = False
) -> None:
    """Check, before anything slow runs, that the data that is there fits the model.

    Reads the first batch of each. Afterwards `source` gives checked data: every later batch is
    compared with the example inputs too. Whether data is missing is known once the rules are
    matched (`require_train_data`, `require_calibration_data`).

    Args:
        finetune: whether a fine-tune may run.
        scoped: whether a submodule alone is compiled; the shapes around it may then vary.
        labelled: whether accuracy is needed, so that `eval_data` must be there with labels.

    Raises:
        InputError: data is empty, or does not fit the model; names the function and the batch.
    """
    if labelled and source.eval_data is None:
        raise _no_labels(source, f"{source.origin} gives no eval_data()")
    fixed = source.dynamic_shapes is None and not scoped
    needed = [name for name in DATA_FUNCTIONS if name != "train_data" or finetune]
    for name in needed:
        factory = getattr(source, name)
        if factory is None:
            continue
        checked = _checked_factory(source, name, factory, fixed)
        setattr(source, name, checked)
        # The user's own random order must not depend on this check.
        with torch.random.fork_rng(devices=[]):
            first = next(batches(checked, name, torch.device("cpu"), limit=1))
        if name == "eval_data" and labelled and first.labels is None:
            raise _no_labels(source, "eval_data() yields inputs without labels")


def require_train_data(source: ModelSource, phase: str) -> DataFactory:
    """The data that a fine-tune phase (`sparse` or `quantize`) trains on, or InputError."""
    if source.train_data is not None:
        return source.train_data
    raise InputError(
        "no-training-data",
        f"the rules ask for a fine-tune (finetune.{phase}), but {source.origin} gives no "
        "train_data()",
        hint=f"{how_to_give(source, 'train_data')}, or compile without it: --no-finetune",
    )


def require_calibration_data(source: ModelSource) -> tuple[str, DataFactory]:
    """The data, with its name, that activation scales come from, or InputError."""
    for name in ("calibration_data", "train_data"):
        factory = getattr(source, name)
        if factory is not None:
            return name, factory
    raise InputError(
        "no-calibration-data",
        f"the rules quantize activations, but {source.origin} gives no data to calibrate from",
        hint=f"{how_to_give(source, 'calibration_data')}: batches of real inputs",
    )


def calibration_calls(
    source: ModelSource, network: Network, device: torch.device, limit: int
) -> list[Call]:
    """The (args, kwargs) of the compiled module for up to `limit` batches of calibration data.

    Raises:
        InputError: there is no data.
    """
    name, factory = require_calibration_data(source)
    found = batches(factory, name, device, limit)
    return [network.scoped_inputs(batch.inputs) for batch in found]


def some_batches(source: ModelSource, device: torch.device, limit: int) -> list[Batch]:
    """A few real batches to compare models on, held-out ones first; none where there is no data."""
    for name in ("eval_data", "calibration_data", "train_data"):
        factory = getattr(source, name)
        if factory is not None:
            return list(batches(factory, name, device, limit))
    return []


def _no_labels(source: ModelSource, found: str) -> InputError:
    return InputError(
        "no-labelled-eval-data",
        f"a largest drop of top-1 was given, but {found}, so there is no top-1 to measure",
        location=source.place("eval_data"),
        hint=f"{how_to_give(source, 'eval_data')} with (inputs, labels) batches",
    )


def how_to_give(source: ModelSource, name: str) -> str:
    """The way in which the data called `name` comes with this kind of source."""
    if source.file is not None:
        return f"define {name}() in the model file"
    if ":" in source.origin:
        return "give --data imagefolder:DIR"
    return f"give {name}="


def _checked_factory(
    source: ModelSource, name: str, factory: DataFactory, fixed: bool
) -> DataFactory:
    seen: list[Any] = []

    def checked() -> CheckedData:
        data = call_user(factory, source.file, f"{name}()")
        if seen and data is seen[0] and isinstance(data, Iterator):
            raise InputError(
                "data-iterates-once",
                f"{name}() returned the same {type(data).__name__} again, which is used up",
                location=source.place(name),
                hint="make a new iterator in each call, or return a list or a DataLoader",
            )
        seen[:] = [data]
        return CheckedData(
            data, name, source.file, source.place(name), source.example_inputs, fixed
        )

    return checked


class CheckedData:
    """One pass over a user's data, each batch read and checked; it has a length if the data has.

    With `example`, the model's example inputs, every batch must be like them in number, type and
    rank of its inputs, and with `fixed` in every size but that of the batch.
    """

    def __init__(
        self,
        data: Any,
        name: str,
        file: Path | None = None,
        place: Location | None = None,
        example: tuple[Any, ...] | None = None,
        fixed: bool = False,
    ) -> None:
        self.data = data
        self.name = name
        self.file = file
        self.place = place
        self.example = example
        self.fixed = fixed

    def __len__(self) -> int:
        return len(self.data)

    def __iter__(self) -> Iterator[Batch]:
        try:
            iterator = iter(self.data)
        except TypeError:
            raise InputError(
                "data-not-iterable",
                f"{self.name}() returned {self.data!r:.60}, expected an iterable of batches",
                location=self.place,
            ) from None
        count = 0
        while True:
            where = f"{self.name}() batch {count}"
            try:
                raw = next(iterator)
            except StopIteration:
                break
            except InputError:
                raise
            except (Exception, SystemExit) as error:
                failure = user_error(error, self.file, where, "data-failed")
                failure.location = failure.location or self.place
                raise failure from error
            try:
                batch = read_batch(raw, where)
                if self.example is not None:
                    check_fit(batch, self.example, where, fixed=self.fixed)
            except InputError as error:
                error.location = error.location or self.place
                raise
            yield batch
            count += 1
        if count == 0:
            raise InputError(
                "data-empty",
                f"{self.name}() yielded no batch",
                location=self.place,
                hint="it must yield (inputs, labels) batches or inputs alone",
            )


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
    checked = data if isinstance(data, CheckedData) else CheckedData(data, name)
    for count, batch in enumerate(checked, start=1):
        yield batch.to(device)
        if count == limit:
            return


def check_fit(batch: Batch, example: tuple[Any, ...], where: str, *, fixed: bool) -> None:
    """Raise InputError unless the batch is like the example inputs, and its values are finite."""
    if len(batch.inputs) != len(example):
        raise InputError(
            "batch-form",
            f"{where} has {len(batch.inputs)} inputs, example_inputs() has {len(example)}",
            hint="a batch is (inputs, labels); several inputs go in a tuple: ((a, b), labels)",
        )
    for index, (value, like) in enumerate(zip(batch.inputs, example, strict=True)):
        if not isinstance(value, torch.Tensor) or not isinstance(like, torch.Tensor):
            continue
        fits = value.ndim == like.ndim and (not fixed or value.shape[1:] == like.shape[1:])
        if value.dtype != like.dtype or not fits:
            raise InputError(
                "batch-form",
                f"{where} has input {index} of {describe(value)}, "
                f"example_inputs() gives {describe(like)}",
                hint="only the first size, the batch, may differ: correct whichever is wrong"
                if fixed
                else "correct whichever is wrong",
            )
        if value.is_floating_point() and not bool(torch.isfinite(value).all()):
            raise InputError(
                "data-not-finite", f"{where} has NaN or infinite values in input {index}"
            )


def describe(tensor: torch.Tensor) -> str:
    """Type and shape, e.g. `float32 [16, 3, 224, 224]`."""
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"


def read_batch(raw: Any, where: str) -> Batch:
    """One batch as the user's data yields it -> `Batch`.

    A tensor is inputs alone. The second item of a pair is the labels: class indices [batch].

    Raises:
        InputError: what was found and what was expected.
    """
    if isinstance(raw, torch.Tensor):
        return Batch(_inputs(raw, where), None)
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
    return Batch(inputs, labels.long())


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


def logits_of(outputs: Any, logits: Callable[[Any], torch.Tensor] | None) -> torch.Tensor:
    """The logits [batch, classes] in a model's outputs.

    Raises:
        InputError: the outputs hold no single [batch, classes] tensor and no `logits(outputs)`
            was given, or that function raised or returned something else.
    """
    if logits is not None:
        code = getattr(inspect.unwrap(logits), "__code__", None)
        file = Path(code.co_filename) if code else None
        found: Any = call_user(logits, file, "logits()", outputs)
        if not isinstance(found, torch.Tensor) or found.ndim != 2:
            what = describe(found) if isinstance(found, torch.Tensor) else type(found).__name__
            raise InputError(
                "no-logits",
                f"logits() returned {what}, expected a tensor [batch, classes]",
                location=defined_at(logits),
            )
        return found
    tensors = [leaf for leaf in tree_leaves(outputs) if isinstance(leaf, torch.Tensor)]
    if len(tensors) == 1 and tensors[0].ndim == 2:
        return tensors[0]
    shapes = ", ".join(str(list(tensor.shape)) for tensor in tensors) or "no tensor"
    raise InputError(
        "no-logits",
        f"the model's outputs are {shapes}: no single [batch, classes] tensor",
        hint="define logits(outputs) -> tensor in the model file",
    )


def check_labels(labels: torch.Tensor, classes: int, where: str) -> None:
    """Raise InputError unless every label is in [0, classes)."""
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or high >= classes:
        raise InputError(
            "labels-range",
            f"{where} has labels from {low} to {high}, but the model has {classes} classes",
            hint=f"labels are class indices from 0 to {classes - 1}",
        )
