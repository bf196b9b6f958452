"""Packed files that are missing, cut, altered or contradictory are refused by name."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

from gpusq_compile import (
    InputError,
    load_packed,
)
from gpusq_compile.output import digest
from gpusq_compile.packed_graph import GRAPH, WEIGHTS, document_digest
from gpusq_compile.packed_model import MAX_GRAPH_BYTES
from tests.packed_cases import Case, document


def refusal(folder: Path) -> InputError:
    with pytest.raises(InputError) as caught:
        load_packed(folder)
    return caught.value


def outcome(folder: Path) -> str | None:
    """The code that a folder is refused with, None if it is read; nothing else may come of it."""
    try:
        load_packed(folder).state_dict()
    except InputError as error:
        return error.code
    return None


def rewrite(folder: Path, change: Callable[[dict[str, Any]], Any], tensors: Any = None) -> None:
    """Change graph.json, and the tensors, as one would who makes the digests fit again."""
    found = document(folder)
    change(found)
    if tensors is not None:
        stored = load_file(folder / WEIGHTS)
        tensors(stored)
        save_file(stored, folder / WEIGHTS)
        found["weights"]["bytes"] = (folder / WEIGHTS).stat().st_size
        found["weights"]["sha256"] = digest(folder / WEIGHTS)
    found["sha256"] = document_digest(found)
    (folder / GRAPH).write_text(json.dumps(found))


@pytest.mark.parametrize("name", [WEIGHTS, GRAPH])
def test_a_missing_file_is_named(name: str, copy: Path) -> None:
    (copy / name).unlink()
    error = refusal(copy)
    assert error.code == "packed-missing"
    assert f"{name}: there is no such file" in error.message


def test_a_folder_in_place_of_a_file_is_named(copy: Path) -> None:
    (copy / GRAPH).unlink()
    (copy / GRAPH).mkdir()
    assert refusal(copy).code == "packed-missing"


@pytest.mark.parametrize("folder", ["nowhere", "with\0nul"])
def test_a_missing_folder_is_named(folder: str, tmp_path: Path) -> None:
    assert refusal(tmp_path / folder).code == "packed-missing"


def test_a_file_in_place_of_the_folder_is_refused(copy: Path) -> None:
    error = refusal(copy / GRAPH)
    assert error.code == "packed-not-a-folder"
    assert "give the folder" in str(error)


@pytest.mark.parametrize("text", ["", "{", "no JSON", "\0", '{"a": ' * 100_000, "9" * 5000])
def test_what_is_no_json_is_refused(text: str, copy: Path) -> None:
    (copy / GRAPH).write_text(text)
    assert refusal(copy).code == "packed-not-json"


def test_bytes_that_are_no_text_are_refused(copy: Path) -> None:
    (copy / GRAPH).write_bytes(b'{"format": "\xff"}')
    assert refusal(copy).code == "packed-not-json"


@pytest.mark.parametrize("text", ["[]", "3", "{}", '{"format": "other"}', '{"format": []}'])
def test_another_format_is_refused(text: str, copy: Path) -> None:
    (copy / GRAPH).write_text(text)
    assert refusal(copy).code == "packed-format"


@pytest.mark.parametrize("version", [0, 2, "1", None, [1]])
def test_another_version_is_refused(version: Any, copy: Path) -> None:
    rewrite(copy, lambda found: found.update(version=version))
    error = refusal(copy)
    assert error.code == "packed-version"
    assert "expected 1" in error.message


def test_an_absurdly_large_graph_is_refused_unread(copy: Path) -> None:
    with (copy / GRAPH).open("r+b") as file:
        file.truncate(MAX_GRAPH_BYTES + 1)  # Sparse: it takes no space on the disk.
    assert refusal(copy).code == "packed-too-large"


@pytest.mark.parametrize("length", [0, 7, 100, -1])
def test_weights_that_were_cut_short_are_refused(length: int, copy: Path) -> None:
    whole = (copy / WEIGHTS).read_bytes()
    (copy / WEIGHTS).write_bytes(whole[:length])
    error = refusal(copy)
    assert error.code == "packed-altered"
    assert "cut short" in error.message


@pytest.mark.parametrize("content", [b"", b"\xff" * 8, b"\x02" + b"\0" * 7 + b"{}" + b"rest"])
def test_what_is_no_safetensors_file_is_refused_whatever_its_digest(
    content: bytes, copy: Path
) -> None:
    (copy / WEIGHTS).write_bytes(content)
    about = {"file": WEIGHTS, "bytes": len(content), "sha256": digest(copy / WEIGHTS)}
    rewrite(copy, lambda found: found.update(weights=about))
    assert refusal(copy).code == "packed-damaged"


def test_the_weights_of_another_run_are_refused(copy: Path, cases: Callable[[str], Case]) -> None:
    stored = load_file(copy / WEIGHTS)
    stored["last_norm.weight"] += 1
    save_file(stored, copy / WEIGHTS)
    error = refusal(copy)
    assert error.code == "packed-altered"
    assert "not the file" in error.message
    shutil.copy(cases("dense int8").folder / WEIGHTS, copy / WEIGHTS)
    assert refusal(copy).code == "packed-altered"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda stored: stored.pop("last_norm.weight"), "has no tensor 'last_norm.weight'"),
        (lambda stored: stored.pop("stem.weight.metadata"), "no tensor 'stem.weight.metadata'"),
        (lambda stored: stored.update(more=torch.ones(1)), "holds 'more', which graph.json"),
        (
            lambda stored: stored.update({"last_norm.weight": torch.ones(31)}),
            "'last_norm.weight' is float32 [31], expected float32 [32]",
        ),
        (
            lambda stored: stored.update({"stem.weight.values": torch.ones(32, 16)}),
            "'stem.weight.values' is float32 [32, 16], expected int8 [32, 16]",
        ),
    ],
)
def test_a_tensor_that_is_not_as_the_graph_says_is_named(
    change: Callable[[dict[str, Tensor]], Any], message: str, copy: Path
) -> None:
    rewrite(copy, lambda found: None, change)
    error = refusal(copy)
    assert error.code == "packed-tensor"
    assert message in error.message


@pytest.mark.parametrize("entry", [0b0000, 0b0101, 0b1111, 0b0001, 0b1011])
def test_illegal_metadata_is_named(entry: int, copy: Path) -> None:
    """Equal and descending indices, which the hardware does not define."""

    def change(stored: dict[str, Tensor]) -> None:
        stored["stem.weight.metadata"][3, 2] = entry | 0b0100 << 4

    rewrite(copy, lambda found: None, change)
    error = refusal(copy)
    assert error.code == "packed-metadata"
    assert "stem: 1 groups have illegal metadata" in error.message


LAYER: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "pattern": (lambda layer: layer["packing"].update(pattern="4:8"), "packing.pattern"),
    "group": (lambda layer: layer["packing"].update(group=8), "no such packing"),
    "axes": (lambda layer: layer["packing"].update(axes=["in", "out"]), "no such packing"),
    "size": (lambda layer: layer.update(shape=[32, 34]), "no such packing"),
    "one axis": (lambda layer: layer.update(shape=[32]), "shape"),
    "negative": (lambda layer: layer.update(shape=[32, -32]), "shape.1"),
    "true": (lambda layer: layer.update(shape=[32, True]), "shape.1"),
    "no metadata": (lambda layer: layer["tensors"].update(metadata=None), "metadata belongs"),
    "no scale": (lambda layer: layer["tensors"].update(scale=None), "scales belong"),
    "unknown scale": (lambda layer: layer["tensors"].update(scale="x"), "'x' is no scale"),
    "other scale": (
        lambda layer: layer["tensors"].update(scale="logits.bias"),
        "'logits.bias' is no scale",
    ),
    "twice": (
        lambda layer: layer["tensors"].update(values="logits.weight.values"),
        "'logits.weight.values' is named twice",
    ),
    "extra": (lambda layer: layer.update(more=1), "more: Extra inputs"),
    "missing": (lambda layer: layer.pop("shape"), "shape: Field required"),
}
OTHER: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "type": (lambda d: d["tensors"]["place"].update(dtype="nn"), "unknown type 'nn'"),
    "stored": (lambda d: d["tensors"]["place"].update(stored="int8"), "not its float32"),
    "parameter": (lambda d: d["parameters"].update({"place": [3]}), "parameter 'place'"),
    "part": (
        lambda d: d["parts"].update(place=[{"tensor": "stem.bias", "rows": [[0, 32]]}]),
        "'stem.bias' is no part of the parameter 'place'",
    ),
    "rows": (
        lambda d: d["parts"].update(
            {"stem.bias": [{"tensor": "stem.bias", "rows": [[0, 10**12]]}]}
        ),
        "'stem.bias' is no part",
    ),
    "range": (
        lambda d: d["parts"].update({"stem.bias": [{"tensor": "stem.bias", "rows": [[3]]}]}),
        "parts.stem.bias.0.rows.0",
    ),
    "turned": (
        lambda d: d.update(turned={"stem.weight": {"axes": [0, 0], "rows": 1}}),
        "'stem.weight' cannot be turned by [0, 0]",
    ),
    "turned rows": (
        lambda d: d.update(turned={"logits.weight": {"axes": [1, 0], "rows": 2}}),
        "'logits.weight' cannot have 2 of 2 axes for its rows",
    ),
    "turned, unknown": (
        lambda d: d.update(turned={"x": {"axes": [1, 0], "rows": 1}}),
        "'x' cannot be turned",
    ),
    "file": (lambda d: d["weights"].update(file="/etc/passwd"), "weights.file"),
    "nodes": (lambda d: d.update(nodes=[1]), "nodes.0"),
    "layers": (lambda d: d.update(layers={}), "layers"),
}


@pytest.mark.parametrize("name", LAYER)
def test_a_layer_that_cannot_be_is_named_whatever_the_digest(name: str, copy: Path) -> None:
    change, message = LAYER[name]
    rewrite(copy, lambda found: change(found["layers"][0]))
    error = refusal(copy)
    assert error.code == "packed-damaged"
    assert message in error.message


@pytest.mark.parametrize("name", OTHER)
def test_a_document_that_cannot_be_is_named_whatever_the_digest(name: str, copy: Path) -> None:
    change, message = OTHER[name]
    rewrite(copy, change)
    error = refusal(copy)
    assert error.code == "packed-damaged"
    assert message in error.message


@settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(st.data())
def test_no_changed_byte_goes_unseen(copy: Path, data: st.DataObject) -> None:
    name = data.draw(st.sampled_from([WEIGHTS, GRAPH]))
    whole = (copy / name).read_bytes()
    index = data.draw(st.integers(0, len(whole) - 1))
    byte = data.draw(st.integers(0, 255).filter(lambda value: value != whole[index]))
    before = document(copy)
    (copy / name).write_bytes(whole[:index] + bytes([byte]) + whole[index + 1 :])
    try:
        code = outcome(copy)
        # What may change is no content: a space for a line's end, 1E-5 for 1e-5.
        assert code is not None or (name == GRAPH and document(copy) == before)
    finally:
        (copy / name).write_bytes(whole)


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(st.data())
def test_no_document_leads_to_a_traceback(copy: Path, data: st.DataObject) -> None:
    """Any value in any place, under a digest that fits."""
    whole = (copy / GRAPH).read_bytes()
    found = document(copy)
    place: Any = found
    while True:
        keys = list(place) if isinstance(place, dict) else list(range(len(place)))
        key = data.draw(st.sampled_from(keys))
        inner = place[key]
        if not isinstance(inner, (dict, list)) or not inner or data.draw(st.integers(0, 3)) == 0:
            break
        place = inner
    simple: st.SearchStrategy[Any] = st.none() | st.booleans() | st.integers() | st.text()
    place[key] = data.draw(simple | st.just([]) | st.just({}))
    found["sha256"] = document_digest(found)
    (copy / GRAPH).write_text(json.dumps(found))
    try:
        outcome(copy)
    finally:
        (copy / GRAPH).write_bytes(whole)
