"""Batches of the user's data: there when asked for, of the right form, fitting the model."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch.utils._pytree import tree_leaves

from gpusq_compile.batch import Batch as Batch
from gpusq_compile.batch import Form, check_fit, describe, read_batch, read_free_batch
from gpusq_compile.batch import check_required_labels as check_required_labels
from gpusq_compile.batch_inputs import forward_names
from gpusq_compile.errors import InputError, Location
from gpusq_compile.graph.walk import Call
from gpusq_compile.model_source import DATA_FUNCTIONS, DataFactory, ModelSource
from gpusq_compile.network import Network
from gpusq_compile.randomness import isolated_random
from gpusq_compile.user_code import call_user, defined_at, user_error


def check_data(
    source: ModelSource,
    *,
    finetune: bool,
    scoped: bool = False,
    labelled: bool = False,
    train_labels: bool = False,
) -> None:
    """Check, before anything slow runs, that the data that is there fits the model.

    Reads the first batch of each. Afterwards `source` gives checked data: every later batch is
    compared with the example inputs too. Whether data is missing is known once the rules are
    matched (`require_train_data`, `require_calibration_data`).

    With a `loss` of the user's, batches may have any form; with `metrics` those of `eval_data` and
    `calibration_data`. Their inputs are then what `find_inputs` finds.

    Args:
        finetune: whether a fine-tune may run.
        scoped: whether a submodule alone is compiled; the shapes around it may then vary.
        labelled: whether top-1 is needed, so that `eval_data` must be there with class labels.
        train_labels: whether every batch of `train_data` must have labels
            (`finetune.labels: required`).

    Raises:
        InputError: data is empty, or does not fit the model; names the function and the batch.
    """
    if labelled and source.eval_data is None:
        raise _no_labels(source, f"{source.origin} gives no eval_data()")
    if source.metrics is not None and source.eval_data is None:
        text = "metrics() is defined, but there is no eval_data() to measure on"
        source.notes.append(("unused-model-function", text))
    names = forward_names(source.module, source.example_inputs)
    calibrates = source.calibration_data is None
    needed = [name for name in DATA_FUNCTIONS if name != "train_data" or finetune or calibrates]
    for name in needed:
        factory = getattr(source, name)
        if factory is None:
            continue
        train = name == "train_data"
        form = Form(
            source.example_inputs,
            names,
            fixed=source.dynamic_shapes is None and not scoped,
            free=source.loss is not None or (source.metrics is not None and not train),
            labels=train and train_labels and finetune,
            inputs=not train or source.loss is None or source.calibration_data is None,
        )
        checked = _checked_factory(source, name, factory, form)
        setattr(source, name, checked)
        # The user's own random order must not depend on this check.
        with isolated_random(torch.device("cpu")):
            first = next(batches(checked, name, torch.device("cpu"), limit=1))
        if name == "eval_data" and labelled and first.labels is None:
            found = "no class indices [batch]" if first.labelled else "inputs without labels"
            raise _no_labels(source, f"eval_data() yields {found}")


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


def require_calibration_data(
    source: ModelSource, reason: str = "the rules quantize activations"
) -> tuple[str, DataFactory]:
    """The data, with its name, that is there to look at layers' inputs, or InputError."""
    for name in ("calibration_data", "train_data"):
        factory = getattr(source, name)
        if factory is not None:
            return name, factory
    raise InputError(
        "no-calibration-data",
        f"{reason}, but {source.origin} gives no data to calibrate from",
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
    pairs = "" if _of_library(source) else " with (inputs, labels) batches"
    own = "" if source.metrics is None else "; metrics() are reported, but no gate compares them"
    return InputError(
        "no-labelled-eval-data",
        f"a largest drop of top-1 was given, but {found}, so there is no top-1 to measure{own}",
        location=source.place("eval_data"),
        hint=f"{how_to_give(source, 'eval_data')}{pairs}",
    )


def how_to_give(source: ModelSource, name: str) -> str:
    """The way in which the data called `name` comes with this kind of source."""
    if source.file is not None:
        return f"define {name}() in the model file"
    if _of_library(source):
        return f"give --data {source.data_forms}"
    return f"give {name}="


def _of_library(source: ModelSource) -> bool:
    return source.file is None and ":" in source.origin


def _checked_factory(
    source: ModelSource, name: str, factory: DataFactory, form: Form
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
        return CheckedData(data, name, source.file, source.place(name), form)

    return checked


class CheckedData:
    """One pass over a user's data, each batch read and checked; it has a length if the data has.

    Without a `form`, batches are `(inputs, labels)` or inputs alone, of any sizes.
    """

    def __init__(
        self,
        data: Any,
        name: str,
        file: Path | None = None,
        place: Location | None = None,
        form: Form | None = None,
    ) -> None:
        self.data = data
        self.name = name
        self.file = file
        self.place = place
        self.form = form

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
                batch = self._read(raw, where)
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

    def _read(self, raw: Any, where: str) -> Batch:
        form = self.form
        if form is None:
            return read_batch(raw, where)
        batch = read_free_batch(raw, form, where) if form.free else read_batch(raw, where)
        if form.labels:
            check_required_labels(batch, where, self.place)
        if batch.inputs:
            check_fit(batch, form.example, where, fixed=form.fixed)
        return batch


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


def has_logits(outputs: Any, logits: Callable[[Any], torch.Tensor] | None) -> bool:
    """Whether `logits_of` has something to find; with a `logits(outputs)` function it must."""
    if outputs is None:
        return False
    tensors = [leaf for leaf in tree_leaves(outputs) if isinstance(leaf, torch.Tensor)]
    return logits is not None or (len(tensors) == 1 and tensors[0].ndim == 2)


def check_labels(labels: torch.Tensor, classes: int, where: str) -> None:
    """Raise InputError unless every label is in [0, classes)."""
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or high >= classes:
        raise InputError(
            "labels-range",
            f"{where} has labels from {low} to {high}, but the model has {classes} classes",
            hint=f"labels are class indices from 0 to {classes - 1}",
        )
