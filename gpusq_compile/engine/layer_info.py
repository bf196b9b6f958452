"""Read the engine inspector's JSON, as `trtexec --exportLayerInfo` writes it.

The layers say what the builder's log says of them, and are the better source for
`HasSparseWeights` and the kernel's name. The types of a tensor are under `Format/Datatype` up to
TensorRT 10.x and under `Datatype` beside `Format` since; with dynamic shapes and no execution
context they read "N/A due to dynamic shapes", which stays unknown.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

from gpusq_compile.engine.builder_log import METADATA, EngineLayer, EngineTensor, dtype_of


def parse_layer_info(text: str) -> tuple[EngineLayer, ...]:
    """The layers of an engine.

    Raises:
        ValueError: the text is no JSON, has no list `Layers`, or its layers are names alone, as an
            engine built without `--profilingVerbosity=detailed` gives them.
    """
    try:
        document = json.loads(text)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    layers = document.get("Layers") if isinstance(document, dict) else None
    if not isinstance(layers, list):
        raise ValueError("it has no list 'Layers'")
    detailed = [layer for layer in layers if isinstance(layer, dict) and "Name" in layer]
    if layers and not detailed:
        raise ValueError("it has layer names alone: build with --profilingVerbosity=detailed")
    return tuple(_layer(layer) for layer in detailed)


def merged_layers(
    log: Iterable[EngineLayer], info: Iterable[EngineLayer]
) -> tuple[EngineLayer, ...]:
    """The layers of a log with what the inspector adds to them, then those it alone has."""
    by_name = {layer.name: layer for layer in info}
    result = []
    for layer in log:
        other = by_name.pop(layer.name, None)
        if other is not None:
            sparse = other.sparse_weights
            layer = replace(
                layer,
                tactic=other.tactic or layer.tactic,
                weight_dtype=layer.weight_dtype or other.weight_dtype,
                sparse_weights=layer.sparse_weights if sparse is None else sparse,
            )
        result.append(layer)
    return (*result, *by_name.values())


def _layer(entry: Mapping[str, Any]) -> EngineLayer:
    tactic = str(entry.get("TacticName") or "")
    weights = entry.get("Weights")
    counted = isinstance(weights, dict) and bool(weights.get("Count"))
    sparse = entry.get("HasSparseWeights")
    return EngineLayer(
        name=str(entry["Name"]),
        kind=str(entry.get("LayerType", "")),
        inputs=_tensors(entry.get("Inputs")),
        constants=_tensors(entry.get("Constants")),
        outputs=_tensors(entry.get("Outputs")),
        tactic=tactic if tactic and "STUB" not in tactic else None,
        onnx_nodes=tuple(METADATA.findall(str(entry.get("Metadata") or ""))),
        weight_dtype=dtype_of(str(weights.get("Type"))) if counted and weights else None,
        sparse_weights=bool(sparse) if sparse in (0, 1) else None,
    )


def _tensors(entries: Any) -> tuple[EngineTensor, ...]:
    found = []
    for entry in entries if isinstance(entries, list) else ():
        if not isinstance(entry, dict):
            continue
        by_key = {str(key).lower(): value for key, value in entry.items()}
        dims = by_key.get("dimensions")
        sizes = tuple(d for d in dims if isinstance(d, int)) if isinstance(dims, list) else ()
        dtype = dtype_of(str(by_key.get("datatype", by_key.get("format/datatype", ""))))
        found.append(EngineTensor(str(by_key.get("name", "")), sizes, dtype))
    return tuple(found)
