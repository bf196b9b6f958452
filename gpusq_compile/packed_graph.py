"""graph.json: what weights.safetensors holds for each layer, and every node of the graph.

The document carries its own digest and that of the other file, so that a changed byte is found in
either.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt

from gpusq_compile.packing import Packing

WEIGHTS: Literal["weights.safetensors"] = "weights.safetensors"
GRAPH = "graph.json"
FORMAT = "gpusq-packed"
VERSION = 1


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class TensorNames(_Record):
    """Names in weights.safetensors; `scale` is null for a float weight, `metadata` for a dense."""

    values: str
    metadata: str | None
    scale: str | None


class PackingRecord(_Record):
    """How the values and metadata are packed; `axes` is the order of the stored rows."""

    values: Literal["int8", "int4", "float16", "float32"]
    pattern: Literal["2:4", "pair4:8"] | None
    group: NonNegativeInt
    bits_per_group: NonNegativeInt
    axes: list[str]


class LayerRecord(_Record):
    """One packed weight. `weight` is its name in the graph, `shape` its shape there.

    `pattern` is the pattern that the rules asked for, `activation` and `output` the integer types
    of its input and its output, null for float.
    """

    name: str
    op: str
    roles: list[str]
    weight: str
    shape: list[NonNegativeInt] = Field(min_length=2)
    pattern: str | None
    activation: str | None
    output: str | None
    packing: PackingRecord
    tensors: TensorNames


class TensorRecord(_Record):
    """A tensor that is not packed: its type in the graph, and in the file."""

    dtype: str
    stored: str
    shape: list[NonNegativeInt]


class ValueRecord(_Record):
    """Type and shape of a tensor that a node gives; dynamic sizes are null."""

    dtype: str
    shape: list[NonNegativeInt | None]


class NodeRecord(_Record):
    """One node of the graph, as `graph.as_json.graph_nodes` says it."""

    name: str
    op: str
    target: str
    args: list[Any]
    kwargs: dict[str, Any]
    outputs: list[ValueRecord]
    module: str


class PartRecord(_Record):
    """A tensor that holds some rows of a parameter that was split, as ranges [first, end)."""

    tensor: str
    rows: list[Annotated[list[NonNegativeInt], Field(min_length=2, max_length=2)]]


class TurnedRecord(_Record):
    """How the graph holds a parameter: with its `axes` in this order, the first `rows` of them
    flattened into the output features and the others into the input features."""

    axes: list[NonNegativeInt]
    rows: NonNegativeInt


class ToolRecord(_Record):
    name: str
    version: str


class FileRecord(_Record):
    file: Literal["weights.safetensors"]
    bytes: NonNegativeInt
    sha256: str


class PackedGraph(_Record):
    """The content of graph.json.

    `sha256` is the digest of the document without it, as JSON in ASCII with sorted keys and no
    spaces. `tensors` are those that are not packed, `parameters` the user's own, with their shapes,
    `tied` other names of some of them, `turned` those whose axes the graph holds in another order,
    and `parts` what became of those that were split.
    """

    format: str
    version: int
    sha256: str
    tool: ToolRecord
    model: str
    scope: str | None
    weights: FileRecord
    layers: list[LayerRecord]
    tensors: dict[str, TensorRecord]
    parameters: dict[str, list[NonNegativeInt]]
    tied: dict[str, str] = {}
    turned: dict[str, TurnedRecord] = {}
    parts: dict[str, list[PartRecord]]
    nodes: list[NodeRecord]


def packing_record(packing: Packing, dimensions: int) -> PackingRecord:
    axes = {2: ["out", "in"], 4: ["out", "kh", "kw", "in"]}
    middle = [f"axis{axis}" for axis in range(2, dimensions)]
    return PackingRecord(
        values=packing.values,  # type: ignore[arg-type]
        pattern=packing.pattern,  # type: ignore[arg-type]
        group=packing.group,
        bits_per_group=packing.bits_per_group,
        axes=axes.get(dimensions, ["out", *middle, "in"]),
    )


def document_digest(document: Mapping[str, Any]) -> str:
    """SHA-256 of the document without its own digest, however its text is laid out."""
    content = {name: value for name, value in document.items() if name != "sha256"}
    text = json.dumps(content, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode("ascii")).hexdigest()


def write_document(document: Mapping[str, Any], path: Path) -> None:
    """One line for each layer, tensor and node: short, and readable in a diff."""

    def lines(value: Any) -> str:
        if isinstance(value, list) and value:
            items = [json.dumps(item, allow_nan=False) for item in value]
            return "[\n    " + ",\n    ".join(items) + "\n  ]"
        if isinstance(value, dict) and any(
            isinstance(item, (dict, list)) for item in value.values()
        ):
            items = [f"{json.dumps(k)}: {json.dumps(v, allow_nan=False)}" for k, v in value.items()]
            return "{\n    " + ",\n    ".join(items) + "\n  }"
        return json.dumps(value, allow_nan=False)

    text = ",\n  ".join(f"{json.dumps(name)}: {lines(value)}" for name, value in document.items())
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(f"{{\n  {text}\n}}\n", encoding="ascii")
    os.replace(temporary, path)


def row_ranges(rows: Sequence[int]) -> list[list[int]]:
    """Row numbers as ranges [first, end), in their order."""
    ranges: list[list[int]] = []
    for row in rows:
        if ranges and ranges[-1][1] == row:
            ranges[-1][1] += 1
        else:
            ranges.append([row, row + 1])
    return ranges
