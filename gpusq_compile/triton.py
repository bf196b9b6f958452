"""A model repository for Triton Inference Server (`--emit triton`).

    triton/NAME/config.pbtxt            serves 1/model.onnx with the ONNX Runtime backend
    triton/NAME/configs/tensorrt.pbtxt  serves 1/model.plan with the TensorRT backend, chosen with
                                        tritonserver --model-config-name=tensorrt
    triton/NAME/1/model.onnx

Keys and types are those of ModelConfig in Triton's model_config.proto; its documentation, "Model
Configuration", says that the batch is no part of `dims` where `max_batch_size` is above 0. Where
the run built an engine with TensorRT itself, that is served in the first place. An engine of
TensorRT-RTX is not: Triton's backend loads those of TensorRT alone.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import onnx
from onnx import TensorProto

from gpusq_compile.engine.report import BatchRange

FOLDER = "triton"
ONNX_FILE, PLAN_FILE = "model.onnx", "model.plan"
VERSION = "1"
QUEUE_DELAY_US = 500
"""How long a request may wait for others to fill a batch with."""

TYPES = {
    "BOOL": "TYPE_BOOL",
    "UINT8": "TYPE_UINT8",
    "UINT16": "TYPE_UINT16",
    "UINT32": "TYPE_UINT32",
    "UINT64": "TYPE_UINT64",
    "INT8": "TYPE_INT8",
    "INT16": "TYPE_INT16",
    "INT32": "TYPE_INT32",
    "INT64": "TYPE_INT64",
    "FLOAT16": "TYPE_FP16",
    "BFLOAT16": "TYPE_BF16",
    "FLOAT": "TYPE_FP32",
    "DOUBLE": "TYPE_FP64",
}
"""ONNX's tensor types by name, as Triton calls them."""


@dataclass(frozen=True)
class Tensor:
    """An input or output of the file; -1 is a size that varies."""

    name: str
    type: str
    sizes: tuple[int, ...]


def repository_name(origin: str) -> str:
    """A model's name in the repository, from the file or library name that it came from."""
    stem = Path(origin).stem if origin.endswith(".py") else origin
    return re.sub(r"[^A-Za-z0-9_.-]+", "-", stem).strip("-.") or "model"


def write_repository(
    model: onnx.ModelProto,
    onnx_file: Path,
    folder: Path,
    name: str,
    batch: BatchRange,
    plan: Path | None = None,
) -> None:
    """Write `folder/NAME`.

    Args:
        model: the compiled model, for its inputs and outputs.
        onnx_file: the file of it, on the same file system.
        folder: the repository.
        batch: the sizes of requests together.
        plan: an engine that TensorRT built of it.
    """
    home = folder / name
    (home / VERSION).mkdir(parents=True)
    (home / "configs").mkdir()
    share(onnx_file, home / VERSION / ONNX_FILE)
    texts = {
        backend: config(model, name, backend, batch) for backend in ("onnxruntime", "tensorrt")
    }
    if plan is not None:
        share(plan, home / VERSION / PLAN_FILE)
    (home / "config.pbtxt").write_text(texts["onnxruntime" if plan is None else "tensorrt"])
    for backend, text in texts.items():
        (home / "configs" / f"{backend}.pbtxt").write_text(text)


def share(file: Path, place: Path) -> None:
    """The same file by another name; a copy where the file system knows no hard links."""
    try:
        os.link(file, place)
    except OSError:
        shutil.copyfile(file, place)


def config(model: onnx.ModelProto, name: str, backend: str, batch: BatchRange) -> str:
    """The text of a config.pbtxt. Requests are batched where every tensor has the batch first."""
    inputs = [described(value) for value in model.graph.input]
    outputs = [described(value) for value in model.graph.output]
    batched = all(tensor.sizes[:1] == (-1,) for tensor in (*inputs, *outputs))
    file = ONNX_FILE if backend == "onnxruntime" else PLAN_FILE
    lines = [
        f'name: "{name}"',
        f'backend: "{backend}"',
        f'default_model_filename: "{file}"',
        f"max_batch_size: {batch.max if batched else 0}",
        *_tensors("input", inputs, batched),
        *_tensors("output", outputs, batched),
    ]
    if batched:
        preferred = ", ".join(map(str, sorted({batch.opt, batch.max})))
        lines += [
            "dynamic_batching {",
            f"  preferred_batch_size: [ {preferred} ]",
            f"  max_queue_delay_microseconds: {QUEUE_DELAY_US}",
            "}",
        ]
    return "\n".join(lines) + "\n"


def described(value: onnx.ValueInfoProto) -> Tensor:
    tensor = value.type.tensor_type
    sizes = tuple(size.dim_value if size.HasField("dim_value") else -1 for size in tensor.shape.dim)
    return Tensor(value.name, TYPES[TensorProto.DataType.Name(tensor.elem_type)], sizes)


def _tensors(kind: str, tensors: Sequence[Tensor], batched: bool) -> list[str]:
    lines = []
    for tensor in tensors:
        sizes = tensor.sizes[1:] if batched else tensor.sizes
        # A tensor of one number a sample has no dims of its own, which Triton writes as [ 1 ]
        # and a reshape to nothing.
        shape = "" if sizes else "  reshape { shape: [ ] }\n"
        dims = ", ".join(str(size) for size in sizes or (1,))
        lines.append(
            f"{kind} {{\n"
            f'  name: "{tensor.name}"\n'
            f"  data_type: {tensor.type}\n"
            f"  dims: [ {dims} ]\n"
            f"{shape}}}"
        )
    return lines
