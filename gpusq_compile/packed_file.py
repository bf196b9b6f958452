"""Writing the compiled network in packed form: weights.safetensors and graph.json.

The safetensors file has the packed weights, their metadata and scales, and every other tensor in
its own type.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.fx

from gpusq_compile import __version__
from gpusq_compile.errors import InternalError
from gpusq_compile.finetune.checkpoint import save_tensors
from gpusq_compile.graph.as_json import dtype_name, graph_nodes, graph_tensors
from gpusq_compile.graph.edit import NAMESPACE
from gpusq_compile.output import digest
from gpusq_compile.packed_graph import (
    FORMAT,
    GRAPH,
    VERSION,
    WEIGHTS,
    FileRecord,
    LayerRecord,
    NodeRecord,
    PackedGraph,
    PartRecord,
    TensorNames,
    TensorRecord,
    ToolRecord,
    TurnedRecord,
    document_digest,
    packing_record,
    row_ranges,
    write_document,
)
from gpusq_compile.packing import choose_packing, pack
from gpusq_compile.plan import LayerPlan, first_readers, planned
from gpusq_compile.sparsity import REDUCTION_AXIS
from gpusq_compile.user_state import UserParameters, parts_of, weight_scales

HALF_MAX = torch.finfo(torch.float16).max

Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True)
class LayerBytes:
    """What one layer takes in weights.safetensors."""

    values: int
    metadata: int
    scales: int

    @property
    def total(self) -> int:
        return self.values + self.metadata + self.scales


@dataclass(frozen=True)
class PackedBytes:
    """Bytes of weights.safetensors, and of each packed layer in it by the layer's name."""

    file: int
    layers: dict[str, LayerBytes]


def write_packed(
    graph_module: torch.fx.GraphModule,
    folder: Path,
    *,
    model: str,
    scope: str | None,
    parameters: UserParameters,
    half: bool,
) -> PackedBytes:
    """Write the folded graph to `folder` as weights.safetensors and graph.json.

    Equal graphs give equal bytes.

    Args:
        model, scope: where the graph came from.
        parameters: the user's own, and how the graph holds them.
        half: store pruned float weights as float16, which is how they are deployed.

    Raises:
        InternalError: a weight breaks the pattern or the range that its plan claims.
    """
    tensors = graph_tensors(graph_module)
    scales = weight_scales(graph_module)
    layers: list[LayerRecord] = []
    stored: Tensors = {}
    first = first_readers(graph_module.graph)
    for node, plan in planned(graph_module.graph):
        # A weight that several layers read is packed once, under the name of the first.
        if first.get(plan.weight, node) is not node:
            continue
        if plan.applied.sparsity or plan.applied.weight:
            record, packed = _packed_layer(plan, tensors[plan.weight], scales, half=half)
            layers.append(record)
            stored |= packed
    packed_names = {layer.weight for layer in layers}
    others: dict[str, TensorRecord] = {}
    for name in sorted(tensors.keys() - packed_names):
        stored[name] = _narrow(name, tensors[name])
        types = dtype_name(tensors[name].dtype), dtype_name(stored[name].dtype)
        others[name] = TensorRecord(
            dtype=types[0], stored=types[1], shape=list(tensors[name].shape)
        )
    path = folder / WEIGHTS
    save_tensors(stored, path)
    graph = PackedGraph(
        format=FORMAT,
        version=VERSION,
        sha256="",
        tool=ToolRecord(name="gpusq-compile", version=__version__),
        model=model,
        scope=scope,
        weights=FileRecord(file=WEIGHTS, bytes=path.stat().st_size, sha256=digest(path)),
        layers=layers,
        tensors=others,
        parameters={name: list(shape) for name, shape in parameters.shapes.items()},
        tied=dict(parameters.tied),
        turned={
            name: TurnedRecord(axes=list(held.axes), rows=held.rows)
            for name, held in parameters.turned.items()
        },
        parts={
            name: [PartRecord(tensor=part.tensor, rows=row_ranges(part.rows)) for part in parts]
            for name, parts in parts_of(graph_module, parameters.apart).items()
        },
        nodes=[NodeRecord(**node) for node in graph_nodes(graph_module)],
    )
    document = graph.model_dump(mode="json")
    document["sha256"] = document_digest(document)
    write_document(document, folder / GRAPH)
    return packed_bytes(path, layers)


def _packed_layer(
    plan: LayerPlan, weight: torch.Tensor, scales: Mapping[str, str], *, half: bool
) -> tuple[LayerRecord, Tensors]:
    """The record of one layer, and its values and metadata by their names in the file."""
    kind = plan.applied.weight or ("float16" if half else dtype_name(weight.dtype))
    if kind == "float16":
        weight = weight.clamp(-HALF_MAX, HALF_MAX).half()
    packing = choose_packing(plan.applied.sparsity, kind, weight.shape[REDUCTION_AXIS])
    try:
        values, metadata = pack(weight.cpu(), packing)
    except ValueError as error:
        raise InternalError("cannot-pack", f"{plan.name}: {error}") from None
    names = TensorNames(
        values=f"{plan.weight}.values",
        metadata=None if metadata is None else f"{plan.weight}.metadata",
        scale=scales[plan.weight] if plan.applied.weight else None,
    )
    record = LayerRecord(
        name=plan.name,
        op=plan.op,
        roles=list(plan.roles),
        weight=plan.weight,
        shape=list(weight.shape),
        pattern=plan.applied.sparsity,
        activation=plan.applied.activation,
        output=plan.applied.output,
        packing=packing_record(packing, weight.ndim),
        tensors=names,
    )
    tensors = {names.values: values}
    if metadata is not None and names.metadata is not None:
        tensors[names.metadata] = metadata
    return record, tensors


def _narrow(name: str, tensor: torch.Tensor) -> torch.Tensor:
    """Scales as float16 where that loses nothing: with FP16 targets they were learned as such."""
    space, _, rest = name.partition(".")
    if space != NAMESPACE or "_scale." not in rest or tensor.dtype != torch.float32:
        return tensor
    half = tensor.half()
    return half if torch.equal(half.float(), tensor) else tensor


def packed_bytes(path: Path, layers: list[LayerRecord]) -> PackedBytes:
    """What the file holds for each layer, from the file's own header."""
    with path.open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        header = json.loads(file.read(length))

    def size(name: str | None) -> int:
        if name is None:
            return 0
        start, end = header[name]["data_offsets"]
        return int(end - start)

    return PackedBytes(
        path.stat().st_size,
        {
            layer.name: LayerBytes(
                size(layer.tensors.values), size(layer.tensors.metadata), size(layer.tensors.scale)
            )
            for layer in layers
        },
    )
