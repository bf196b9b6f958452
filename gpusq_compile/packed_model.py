"""Reading a packed network back: `load_packed`. Nothing that it reads can run code."""

from __future__ import annotations

import hashlib
import json
import math
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import torch
from pydantic import ValidationError
from safetensors import SafetensorError
from safetensors.torch import load

from gpusq_compile.errors import InputError, relative_to_cwd
from gpusq_compile.graph.as_json import dtype_name
from gpusq_compile.graph.stored_rows import StoredRows
from gpusq_compile.graph.stored_weights import Turned
from gpusq_compile.packed_graph import (
    FORMAT,
    GRAPH,
    VERSION,
    WEIGHTS,
    LayerRecord,
    PackedGraph,
    PartRecord,
    TensorRecord,
    TurnedRecord,
    document_digest,
    packing_record,
)
from gpusq_compile.packing import Packing, packed_tensors, unpack
from gpusq_compile.sparsity import REDUCTION_AXIS
from gpusq_compile.user_state import in_user_model, user_tensors

MAX_GRAPH_BYTES = 64 * 2**20
"""A graph.json beyond this is refused unread; that of a large transformer has about a megabyte."""

NARROWED = ("float16", "float32")
"""The one change of type that a file may ask for: scales that lose nothing in half precision."""

Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True)
class PackedModel:
    """A packed network, read back.

    `graph` is graph.json. `tensors` are those of the compiled graph by their names there, with the
    weights unpacked: int8 [out, in, ...] where they are quantized. `stored` are those of
    weights.safetensors as they are, packed.
    """

    graph: PackedGraph
    tensors: Tensors
    stored: Tensors

    def state_dict(self) -> Tensors:
        """Weights under the user's own names and shapes, pruned and rounded as deployed.

        Packed weights become float32, so that this goes into the user's module: the whole one,
        where a submodule of it was compiled.
        """
        graph = self.graph
        scales = {layer.weight: layer.tensors.scale for layer in graph.layers}
        parts = {
            name: [StoredRows(record.tensor, _rows(record)) for record in records]
            for name, records in graph.parts.items()
        }
        state = user_tensors(
            self.tensors,
            {n: s for n, s in scales.items() if s},
            parts,
            graph.parameters,
            {name: _turned(record) for name, record in graph.turned.items()},
            graph.tied,
        )
        state = {n: v.float() if graph.tied.get(n, n) in scales else v for n, v in state.items()}
        return in_user_model(state, graph.scope)


def _turned(record: TurnedRecord) -> Turned:
    return Turned(tuple(record.axes), record.rows)


def _rows(part: PartRecord) -> tuple[int, ...]:
    return tuple(row for first, end in part.rows for row in range(first, end))


def load_packed(folder: str | Path) -> PackedModel:
    """Read what a compile wrote as weights.safetensors and graph.json.

    Args:
        folder: the output folder of `compile_model` or `gpusq-compile -o`.

    Raises:
        InputError: a file is missing, cut short, changed, of another version, or says what cannot
            be; the code and the message say which.
    """
    folder = Path(folder)
    if folder.is_file():
        raise InputError(
            "packed-not-a-folder",
            f"{relative_to_cwd(folder)} is a file",
            hint=f"give the folder that holds {GRAPH} and {WEIGHTS}",
        )
    graph = _read_graph(folder / GRAPH)
    stored = _read_tensors(folder / WEIGHTS, graph)
    tensors = {
        name: stored[name].to(getattr(torch, record.dtype))
        for name, record in graph.tensors.items()
    }
    for layer in graph.layers:
        tensors[layer.weight] = _unpacked(layer, stored)
    return PackedModel(graph, tensors, stored)


def _read_graph(path: Path) -> PackedGraph:
    shown = relative_to_cwd(path)
    size = _size(path)
    if size > MAX_GRAPH_BYTES:
        raise InputError(
            "packed-too-large", f"{shown} has {size} bytes, at most {MAX_GRAPH_BYTES} are read"
        )
    try:
        document = json.loads(path.read_bytes().decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise InputError("packed-not-json", f"{shown} is no JSON: {error}") from None
    if not isinstance(document, dict) or document.get("format") != FORMAT:
        raise InputError("packed-format", f"{shown} does not say that its format is '{FORMAT}'")
    if document.get("version") != VERSION:
        raise InputError(
            "packed-version",
            f"{shown} has version {document.get('version')!r:.40}, expected {VERSION}",
            hint="another version of gpusq-compile wrote it; compile again with this one",
        )
    try:
        whole = document.get("sha256") == document_digest(document)
    except (ValueError, RecursionError):
        whole = False
    if not whole:
        raise InputError("packed-altered", f"{shown} was changed: its digest is not the one in it")
    try:
        graph = PackedGraph.model_validate(document)
    except ValidationError as error:
        problem = error.errors()[0]
        place = ".".join(str(part) for part in problem["loc"])
        raise InputError("packed-damaged", f"{shown}: {place}: {problem['msg']}") from None
    fault = _contradiction(graph)
    if fault is not None:
        raise InputError("packed-damaged", f"{shown}: {fault}")
    return graph


def _read_tensors(path: Path, graph: PackedGraph) -> Tensors:
    """The file's tensors, once it is the one that graph.json was written with."""
    shown = relative_to_cwd(path)
    size = _size(path)
    if size != graph.weights.bytes:
        raise InputError(
            "packed-altered",
            f"{shown} has {size} bytes, and {GRAPH} says {graph.weights.bytes}: it was cut short "
            "or belongs to another run",
        )
    data = path.read_bytes()
    if hashlib.sha256(data).hexdigest() != graph.weights.sha256:
        raise InputError("packed-altered", f"{shown} is not the file that {GRAPH} was written with")
    try:
        stored = load(data)
    except (SafetensorError, ValueError, LookupError, TypeError) as error:
        raise InputError("packed-damaged", f"{shown} is no safetensors file: {error}") from None
    wanted = _stored_tensors(graph)
    if unknown := sorted(stored.keys() - wanted.keys()):
        raise InputError("packed-tensor", f"{shown} holds '{unknown[0]}', which {GRAPH} does not")
    for name, expected in wanted.items():
        if name not in stored:
            raise InputError("packed-tensor", f"{shown} has no tensor '{name}'")
        found = dtype_name(stored[name].dtype), tuple(stored[name].shape)
        if found != expected:
            raise InputError(
                "packed-tensor",
                f"{shown}: '{name}' is {found[0]} {list(found[1])}, expected {expected[0]} "
                f"{list(expected[1])}",
            )
    return stored


def _size(path: Path) -> int:
    try:
        if path.is_file():
            return path.stat().st_size
        reason = "there is no such file"
    except (OSError, ValueError) as error:
        reason = str(error)
    raise InputError(
        "packed-missing",
        f"cannot read {path}: {reason}",
        hint=f"gpusq-compile -o FOLDER writes {GRAPH} and {WEIGHTS}",
    )


def _unpacked(layer: LayerRecord, stored: Tensors) -> torch.Tensor:
    names = layer.tensors
    metadata = None if names.metadata is None else stored[names.metadata]
    try:
        return unpack(stored[names.values], metadata, _packing(layer), tuple(layer.shape))
    except ValueError as error:
        raise InputError("packed-metadata", f"{WEIGHTS}: {layer.name}: {error}") from None


def _packing(layer: LayerRecord) -> Packing:
    return Packing(layer.packing.values, layer.packing.pattern)


def _stored_tensors(graph: PackedGraph) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Type and shape of each tensor that weights.safetensors must hold, and no other."""
    wanted = {name: (record.stored, tuple(record.shape)) for name, record in graph.tensors.items()}
    for layer in graph.layers:
        names = (layer.tensors.values, layer.tensors.metadata)
        kinds = packed_tensors(_packing(layer), tuple(layer.shape))
        for name, (dtype, shape) in zip(names, kinds, strict=False):
            wanted[str(name)] = dtype_name(dtype), shape
    return wanted


def _contradiction(graph: PackedGraph) -> str | None:
    """What in the document cannot be together, None where nothing is."""
    names = list(graph.tensors)
    shapes = {name: record.shape for name, record in graph.tensors.items()}
    for name, record in graph.tensors.items():
        if not isinstance(getattr(torch, record.dtype, None), torch.dtype):
            return f"tensor '{name}' has the unknown type '{record.dtype}'"
        if record.stored != record.dtype and (record.stored, record.dtype) != NARROWED:
            return f"tensor '{name}' is stored as {record.stored}, which is not its {record.dtype}"
    for layer in graph.layers:
        fits = layer.shape[REDUCTION_AXIS] % _packing(layer).group == 0
        if not fits or layer.packing != packing_record(_packing(layer), len(layer.shape)):
            return f"layer '{layer.name}': there is no such packing"
        if (layer.tensors.metadata is None) != (layer.packing.pattern is None):
            return f"layer '{layer.name}': metadata belongs to a pattern, and only to one"
        scale = layer.tensors.scale
        if (scale is None) == layer.packing.values.startswith("int"):
            return f"layer '{layer.name}': scales belong to integers, and only to them"
        if scale is not None and not _scales(graph.tensors.get(scale), layer.shape):
            return f"layer '{layer.name}': '{scale}' is no scale of its weight"
        names += [layer.weight, layer.tensors.values]
        names += [] if layer.tensors.metadata is None else [layer.tensors.metadata]
        shapes[layer.weight] = layer.shape
    twice = [name for name, count in Counter(names).items() if count > 1]
    if twice:
        return f"the tensor '{twice[0]}' is named twice"
    for name, turned in graph.turned.items():
        shape = graph.parameters.get(name)
        if shape is None or sorted(turned.axes) != list(range(len(shape))):
            return f"'{name}' cannot be turned by {turned.axes}: it is no parameter of so many axes"
        if not 0 < turned.rows < len(shape):
            return f"'{name}' cannot have {turned.rows} of {len(shape)} axes for its rows"
    for name, shape in graph.parameters.items():
        if name in shapes and math.prod(shape) != math.prod(shapes[name]):
            return f"parameter '{name}' has shape {shape}, and its tensor {shapes[name]}"
        for part in graph.parts.get(name, []):
            held = graph.turned.get(name)
            whole = shape if held is None else list(_turned(held).graph_shape(shape))
            if not _fits(part, shapes.get(part.tensor), whole):
                return f"'{part.tensor}' is no part of the parameter '{name}'"
    return None


def _fits(part: PartRecord, shape: list[int] | None, whole: list[int]) -> bool:
    """Whether a tensor of `shape` can be those rows of a parameter of the shape `whole`."""
    if not shape or not whole or shape[1:] != whole[1:]:
        return False
    if any(not first < end <= whole[0] for first, end in part.rows):
        return False
    return sum(end - first for first, end in part.rows) == shape[0]


def _scales(record: TensorRecord | None, shape: list[int]) -> bool:
    """Whether a tensor can be a weight's scale: of all of it, by channel, or by block of inputs."""
    if record is None or record.dtype not in ("float16", "float32"):
        return False
    size = record.shape
    if len(size) < 2:
        return size in ([], shape[:1])
    blocks = len(size) == len(shape) == 2 and size[0] == shape[0] and size[1] > 0
    return blocks and shape[REDUCTION_AXIS] % size[1] == 0
