"""Batches of any form: where the model's inputs are in them, and what is refused."""

from __future__ import annotations

import random
from collections import UserDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from gpusq_compile.batch import Batch, Form, check_fit, read_batch, read_free_batch
from gpusq_compile.batch_inputs import find_inputs, forward_names
from gpusq_compile.data import batches, check_data
from gpusq_compile.errors import InputError, Location
from gpusq_compile.model_source import ModelSource, check_source
from tests.models import TinyViT, images, seeded

T = torch.zeros(4, 3)
PICTURES = [torch.zeros(3, 8, 8), torch.zeros(3, 6, 6)]
TARGETS = [{"boxes": torch.zeros(1, 4)}, {"boxes": torch.zeros(2, 4)}]
ONE = (torch.ones(2, 3),)
TWO = (torch.ones(2, 3), torch.ones(2, 3))
LIST = ([torch.ones(3, 8, 8)],)
MAPPING = ({"image": torch.ones(2, 3)},)

# The batch, the example inputs, forward's names, the inputs that are found, what is left (None:
# nothing is), and whether the inputs were the first item.
FORMS: dict[str, tuple[Any, tuple[Any, ...], tuple[str, ...], Any, Any, bool]] = {
    "inputs alone": (T, ONE, (), (T,), None, False),
    "a pair": ((T, "labels"), ONE, (), (T,), "labels", True),
    "a list as a pair": ([T, "labels"], ONE, (), (T,), "labels", True),
    "one item": ((T,), ONE, (), (T,), None, True),
    "three items": ((T, "a", "b"), ONE, (), (T,), ("a", "b"), True),
    "several inputs": (((T, T), "labels"), TWO, (), (T, T), "labels", True),
    "several inputs alone": ((T, T), TWO, (), (T, T), None, False),
    "a list of images": ((PICTURES, TARGETS), LIST, (), (PICTURES,), TARGETS, True),
    "a tuple of images": (
        (tuple(PICTURES), tuple(TARGETS)),
        LIST,
        (),
        (PICTURES,),
        tuple(TARGETS),
        True,
    ),
    "a list of images alone": (PICTURES, LIST, (), (PICTURES,), None, False),
    "a mapping by name": ({"x": T, "labels": "l"}, ONE, ("x",), (T,), {"labels": "l"}, False),
    "a mapping as input": (
        ({"image": T, "id": 7}, "labels"),
        MAPPING,
        ("x",),
        ({"image": T, "id": 7},),
        "labels",
        True,
    ),
    "a mapping as input alone": ({"image": T}, MAPPING, ("x",), ({"image": T},), None, False),
}


@pytest.mark.parametrize("name", FORMS)
def test_inputs_are_found_in_batches_of_any_form(name: str) -> None:
    raw, example, names, inputs, rest, paired = FORMS[name]
    found = find_inputs(raw, example, names)
    assert found is not None
    assert same(found.inputs, inputs)
    assert same(found.rest, rest)
    assert found.paired is paired


def same(left: Any, right: Any) -> bool:
    """Equal in structure, with the very same tensors."""
    if isinstance(left, (tuple, list)):
        return (
            type(left) is type(right)
            and len(left) == len(right)
            and all(same(one, other) for one, other in zip(left, right, strict=True))
        )
    if isinstance(left, dict):
        return left.keys() == right.keys() and all(same(left[key], right[key]) for key in left)
    return left is right or (not isinstance(left, Tensor) and bool(left == right))


@pytest.mark.parametrize(
    ("raw", "example"),
    [
        ("text", ONE),
        ({"y": T}, ONE),
        ((TARGETS, PICTURES), LIST),
        ((T, T, T), TWO),
        ([], ONE),
    ],
)
def test_a_batch_with_nothing_like_the_example_has_no_inputs(raw: Any, example: Any) -> None:
    assert find_inputs(raw, example, ("x",)) is None


def test_names_are_those_of_forwards_parameters() -> None:
    class Named(nn.Module):
        def forward(self, pixels: Tensor, mask: Tensor, *, scale: float = 1.0) -> Tensor:
            return pixels * mask * scale

    class Anything(nn.Module):
        def forward(self, *values: Tensor) -> Tensor:
            return values[0]

    assert forward_names(Named(), (T, T)) == ("pixels", "mask")
    assert forward_names(Named(), (T,)) == ()
    assert forward_names(Anything(), (T, T)) == ()


# --- what a batch knows ---------------------------------------------------------------------------


def free(raw: Any, example: tuple[Any, ...] = ONE, **rest: Any) -> Batch:
    return read_free_batch(raw, Form(example, free=True, **rest), "batch 0")


@pytest.mark.parametrize(
    ("raw", "example", "size"),
    [
        ((T, None), ONE, 4),
        ((PICTURES, TARGETS), LIST, 2),
        ((tuple(PICTURES), TARGETS), LIST, 2),
        ({"image": T}, MAPPING, 4),
        ((T, T), TWO, 4),
    ],
)
def test_the_size_is_the_number_of_samples(raw: Any, example: Any, size: int) -> None:
    assert free(raw, example).size == size


@pytest.mark.parametrize(
    ("rest", "found"),
    [
        (torch.tensor([0, 1, 2, 1]), True),
        (torch.tensor([0, 1, 2, 1], dtype=torch.uint8), True),
        ([0, 1, 2, 1], True),
        ({"labels": torch.tensor([0, 1, 2, 1]), "id": "a"}, True),
        (torch.tensor([0, 1, 2]), False),
        (torch.zeros(4), False),
        (torch.tensor([True] * 4), False),
        (torch.zeros(4, 2, dtype=torch.int64), False),
        (TARGETS, False),
        ([0, 1, 2, True], False),
    ],
)
def test_class_labels_are_taken_only_for_what_they_are(rest: Any, found: bool) -> None:
    batch = free((T, rest))
    assert batch.labelled
    if found:
        assert batch.labels is not None
        assert batch.labels.dtype == torch.int64
        assert batch.labels.tolist() == [0, 1, 2, 1]
    else:
        assert batch.labels is None


def test_the_raw_batch_keeps_its_structure_on_another_device() -> None:
    class Boxed(UserDict):
        def to(self, device: torch.device) -> Boxed:
            return Boxed({key: value.to(device) for key, value in self.items()})

    raw = (PICTURES, {"nested": [(T, "name")], "boxed": Boxed(y=T)})
    moved = free(raw, LIST).to(torch.device("meta"))
    pictures, rest = moved.raw
    assert [picture.device.type for picture in pictures] == ["meta", "meta"]
    assert rest["nested"][0][0].device.type == "meta"
    assert rest["nested"][0][1] == "name"
    assert rest["boxed"]["y"].device.type == "meta"
    # One copy of each tensor: the inputs are those of the raw batch.
    assert moved.inputs[0][0] is pictures[0]


@pytest.mark.parametrize(
    ("raw", "example"),
    [
        ((T, torch.arange(4)), ONE),
        ((T, {"weight": torch.arange(4), "name": "x"}), ONE),
        ({"x": T, "labels": torch.arange(4)}, ONE),
        ((PICTURES * 2, TARGETS * 2), LIST),
        ((tuple(PICTURES * 2), tuple(TARGETS * 2)), LIST),
        (((T, T), torch.arange(4)), TWO),
        (PICTURES * 2, LIST),
        (T, ONE),
    ],
)
def test_a_part_of_a_batch_has_its_samples_alone(raw: Any, example: Any) -> None:
    batch = free(raw, example, names=("x",)) if isinstance(raw, dict) else free(raw, example)
    part = batch.part(1, 3)
    assert batch.size == 4
    assert part.size == 2
    again = (
        free(part.raw, example, names=("x",)) if isinstance(raw, dict) else free(part.raw, example)
    )
    assert again.size == 2
    assert again.labelled is batch.labelled
    if batch.labels is not None:
        assert part.labels is not None
        assert part.labels.tolist() == [1, 2]
        assert again.labels is not None
        assert again.labels.tolist() == [1, 2]
    if isinstance(raw, tuple) and not isinstance(raw[1], (Tensor, dict)):
        assert part.raw[1][0] is raw[1][1]


# --- what is refused ------------------------------------------------------------------------------


def test_a_batch_without_inputs_says_what_it_is_made_of() -> None:
    with pytest.raises(InputError) as caught:
        free((TARGETS, PICTURES), LIST, names=("images",))
    error = caught.value
    assert error.code == "batch-form"
    assert "batch 0 is tuple(list(2 of dict(boxes: float32 [1, 4])), list(2 of" in error.message
    assert "like example_inputs(), tuple(list(1 of float32 [3, 8, 8]))" in error.message
    assert error.hint is not None
    assert "{images: ...}" in error.hint


def test_inputs_are_not_asked_for_where_the_loss_alone_reads_the_batch() -> None:
    batch = free({"views": [T, T]}, LIST, inputs=False)
    assert batch.inputs == ()
    assert batch.size == 2


def test_an_empty_list_of_images_is_refused() -> None:
    with pytest.raises(InputError, match="batch 0 is empty"):
        free(([], []), LIST)


@pytest.mark.parametrize(
    ("raw", "part"),
    [
        ([torch.zeros(3, 8, 8), torch.zeros(8, 8)], "input 0[1] of float32 [8, 8]"),
        ([torch.zeros(3, 8, 8, dtype=torch.uint8)], "input 0[0] of uint8 [3, 8, 8]"),
        ([torch.full((3, 8, 8), float("nan"))], "NaN or infinite values in input 0[0]"),
    ],
)
def test_every_image_of_a_list_is_checked(raw: Any, part: str) -> None:
    with pytest.raises(InputError) as caught:
        check_fit(Batch((raw,), None), LIST, "batch 0", fixed=True)
    assert part in caught.value.message


def test_images_of_a_list_may_differ_in_size() -> None:
    check_fit(Batch((PICTURES,), None), LIST, "batch 0", fixed=True)


def test_a_value_of_a_mapping_is_checked() -> None:
    with pytest.raises(InputError, match=r"input 0\['image'\] of float32 \[4, 5\]"):
        check_fit(Batch(({"image": torch.zeros(4, 5)},), None), MAPPING, "batch 0", fixed=True)


def vit_source(**given: Any) -> ModelSource:
    source = ModelSource("test", seeded(TinyViT), (images(2),), **given)
    check_source(source)
    return source


def test_batches_of_any_form_are_taken_only_with_a_loss_or_metrics() -> None:
    data = [(images(2), {"weights": torch.ones(2)})]
    with pytest.raises(InputError, match="labels of the wrong kind"):
        check_data(vit_source(train_data=lambda: data), finetune=True)
    source = vit_source(train_data=lambda: data, metrics=lambda outputs, batch: {})
    with pytest.raises(InputError, match="labels of the wrong kind"):
        check_data(source, finetune=True)
    check_data(vit_source(train_data=lambda: data, loss=lambda model, batch: model), finetune=True)
    check_data(vit_source(eval_data=lambda: data, metrics=lambda outputs, batch: {}), finetune=True)


def test_metrics_without_data_to_measure_on_are_remarked() -> None:
    source = vit_source(metrics=lambda outputs, batch: {})
    check_data(source, finetune=False)
    assert source.notes == [
        ("unused-model-function", "metrics() is defined, but there is no eval_data() to measure on")
    ]


LABELLED = (images(2), torch.tensor([1, 2]))


@pytest.mark.parametrize("loss", [None, lambda model, batch: model])
@pytest.mark.parametrize("bare", [images(2), (images(2), None), (images(2),)])
def test_labels_that_the_rules_require_are_asked_of_every_batch(loss: Any, bare: Any) -> None:
    def train_data() -> Any:
        yield LABELLED
        yield bare

    source = vit_source(train_data=train_data, loss=loss)
    source.places["train_data"] = place = Location("model.py", 7)
    check_data(source, finetune=True, train_labels=True)
    assert source.train_data is not None
    with pytest.raises(InputError) as caught:
        list(batches(source.train_data, "train_data", torch.device("cpu")))
    assert caught.value.code == "labels-missing"
    assert "train_data() batch 1 has no labels" in caught.value.message
    assert caught.value.location == place


def test_labels_are_missed_in_the_first_batch_before_anything_runs() -> None:
    source = vit_source(train_data=lambda: [images(2)])
    with pytest.raises(InputError, match="batch 0 has no labels"):
        check_data(source, finetune=True, train_labels=True)


def test_labels_are_not_asked_for_without_a_fine_tune_or_of_other_data() -> None:
    bare = [images(2)]
    check_data(vit_source(train_data=lambda: bare), finetune=False, train_labels=True)
    source = vit_source(train_data=lambda: [LABELLED], calibration_data=lambda: bare)
    check_data(source, finetune=True, train_labels=True)


def test_batches_with_and_without_labels_may_come_in_one_loader() -> None:
    data = [LABELLED, images(2), (images(2), None), (images(1), [3])]
    found = [read_batch(raw, f"batch {index}") for index, raw in enumerate(data)]
    assert [batch.labelled for batch in found] == [True, False, False, True]
    assert [batch.size for batch in found] == [2, 2, 2, 1]


def numpy_state() -> str:
    """The whole state: two of them are equal where the next numbers are."""
    state: Any = np.random.get_state()
    return str((state[1].tolist(), *state[2:]))


def test_checking_the_data_leaves_every_random_state_alone() -> None:
    def train_data() -> Any:
        torch.rand(3), np.random.rand(3), random.random()
        yield images(2)

    states = torch.get_rng_state(), numpy_state(), random.getstate()
    check_data(vit_source(train_data=train_data), finetune=True)
    assert torch.equal(states[0], torch.get_rng_state())
    assert states[1:] == (numpy_state(), random.getstate())


def test_example_inputs_may_be_a_list_of_images() -> None:
    source = ModelSource("test", nn.Identity(), LIST, file=Path("model.py"))
    check_source(source)
    source.example_inputs = ([],)
    with pytest.raises(InputError, match="without a batched tensor"):
        check_source(source)
