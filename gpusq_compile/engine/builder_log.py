"""Read TensorRT's VERBOSE builder log: the layers of the engine and what each GEMM became.

With `ProfilingVerbosity.DETAILED` the builder ends its log with one line a layer: name, type,
tensors with their data types, kernel, and the ONNX nodes the layer came from. Without a GPU this
is the only view into an engine, since an engine cannot be deserialized there. The same lines come
from TensorRT 8.x to 11.x and TensorRT-RTX, in two spellings of the data type (`Format/Datatype:`
up to 10.x, `Datatype:` and `Format:` since).
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from gpusq_compile.engine.report import Answer, GemmInEngine, MarkedGemm, Status
from gpusq_compile.engine.sparsity_statements import (
    ELIGIBLE,
    PICKED,
    SparsityNames,
    read_statement,
)

_LAYER = re.compile(
    r"Name: (?P<name>.+?), LayerType: (?P<kind>[^,]+), "
    r"Inputs: \[(?P<inputs>.*?)\](?:, Constants: \[(?P<constants>.*?)\])?"
    r", Outputs: \[(?P<outputs>.*?)\]"
    r"(?P<rest>|, (?:ParameterType|Origin|TacticName|TacticValue|StreamId|Metadata)\b.*)$"
)
_TENSOR = re.compile(r"\{ Name: (?P<name>.*?), .*?Dimensions: \[(?P<dims>[^\]]*)\](?P<rest>.*?)\}")
_DATATYPE = re.compile(r"Datatype: (?P<text>[^,}]*)")
METADATA = re.compile(r"\[ONNX Layer: (.*?)\](?=\s*(?:\x1e|\x1f|\[ONNX Layer: |$))")
_PARSED_NODE = re.compile(r"Parsing node: (?P<name>.*) \[(?P<op>\w+)\]$")
_TACTIC = re.compile(r"TacticName: ([^,]*)")
_WEIGHTS = re.compile(r'Weights: \{"Type": "(\w+)", "Count": (\d+)\}')
_SPARSE_WEIGHTS = re.compile(r"HasSparseWeights: ([01])")
_LOG_PREFIX = re.compile(r"^\[\d\d/\d\d/\d{4}-\d\d:\d\d:\d\d\] \[\w\] (?:\[TRT\] )?")

_DATATYPES = (
    ("int8", re.compile(r"\bint8\b", re.I)),
    ("bf16", re.compile(r"\b(?:bf16|bfloat16)\b", re.I)),
    ("fp8", re.compile(r"\bfp8\b", re.I)),
    ("fp4", re.compile(r"\bfp4\b", re.I)),
    ("int4", re.compile(r"\bint4\b", re.I)),
    ("fp16", re.compile(r"\b(?:half|fp16)\b", re.I)),
    ("fp32", re.compile(r"\b(?:float|fp32)\b", re.I)),
    ("int32", re.compile(r"\bint32\b", re.I)),
    ("int64", re.compile(r"\bint64\b", re.I)),
    ("bool", re.compile(r"\bbool\b", re.I)),
)
# Kernel names give the types of operand and output first: sm80_xmma_gemm_i8i8_i8i32_f32_tn_n_...
_KERNEL_OPERANDS = re.compile(r"_(i8i8|i8f16|i8f32|f16f16|bf16bf16|tf32tf32|f32f32|e4m3e4m3)_")
_KERNEL_TYPES = {
    "i8i8": "int8",
    "i8f16": "int8",
    "i8f32": "int8",
    "f16f16": "fp16",
    "bf16bf16": "bf16",
    "tf32tf32": "fp32",
    "f32f32": "fp32",
    "e4m3e4m3": "fp8",
}
_GEMM_KINDS = (
    "gemm",
    "correlation",
    "convolution",
    "convactpool",
    "matrixmultiply",
    "matmul",
    "fullyconnected",
)
_GEMM_OPS = frozenset({"MatMul", "Gemm", "Conv"})
_WIDTH = {"int4": 0, "fp4": 0, "int8": 1, "fp8": 1, "fp16": 2, "bf16": 2, "fp32": 4}


@dataclass(frozen=True)
class EngineTensor:
    """A tensor of an engine layer; dynamic dimensions are -1, `dtype` is "int8", "fp16", ..."""

    name: str
    dims: tuple[int, ...]
    dtype: str

    def is_matrix(self) -> bool:
        """Whether it has more than one dimension that is not 1."""
        return sum(d != 1 for d in self.dims) > 1

    def size(self) -> int:
        return math.prod(abs(d) for d in self.dims)


@dataclass(frozen=True)
class EngineLayer:
    """A layer of the engine, as the log prints it.

    `onnx_nodes` are the ONNX nodes it came from; `weight_dtype` is set where the layer line itself
    names the type of its weights. `sparse_weights` is None where the line does not tell.
    """

    name: str
    kind: str
    inputs: tuple[EngineTensor, ...]
    constants: tuple[EngineTensor, ...]
    outputs: tuple[EngineTensor, ...]
    tactic: str | None
    onnx_nodes: tuple[str, ...]
    weight_dtype: str | None = None
    sparse_weights: bool | None = None

    def fused_ops(self) -> tuple[str, ...]:
        """The operations of a Myelin fusion in order: `__myl_CastMulFc_myl0_5` -> Cast, Mul, Fc."""
        match = re.match(r"__myl_(\w+?)_myl\d", self.name)
        return tuple(re.findall(r"[A-Z][a-z0-9]*", match[1])) if match else ()

    def has_sparse_kernel(self) -> bool:
        """Whether the name of its kernel says that it multiplies sparse weights."""
        return self.tactic is not None and "sparse" in self.tactic

    def is_gemm(self) -> bool:
        kind = self.kind.replace("_", "").lower()
        return (
            any(word in kind for word in _GEMM_KINDS)
            or "Fc" in self.fused_ops()
            or self.name.startswith("_gemm_")
        )


@dataclass(frozen=True)
class BuilderLog:
    """What the end of a builder log says about the engine.

    `onnx_ops` maps the name of each parsed ONNX node to its operator. `eligible` and `picked` are
    None where the log has no sparsity lines. `unread` counts layer lines in an unknown form.
    """

    layers: tuple[EngineLayer, ...]
    onnx_ops: dict[str, str]
    eligible: SparsityNames | None
    picked: SparsityNames | None
    unread: int = 0


def parse_builder_log(messages: Iterable[str]) -> BuilderLog:
    """Read a builder log: the messages of a logger, or the lines that trtexec printed.

    Statements that the builder repeats (it may select tactics more than once) count by their last
    occurrence.
    """
    layers: dict[str, EngineLayer] = {}
    onnx_ops: dict[str, str] = {}
    eligible: SparsityNames | None = None
    picked: SparsityNames | None = None
    unread = 0
    for line in _lines(messages):
        if line.startswith("Name: ") and ", LayerType: " in line:
            layer = _layer(line)
            if layer is None:
                unread += 1
            else:
                layers[layer.name] = layer
        elif "(Sparsity)" in line:
            eligible = read_statement(line, ELIGIBLE) or eligible
            picked = read_statement(line, PICKED) or picked
        elif match := _PARSED_NODE.search(line):
            onnx_ops[match["name"]] = match["op"]
    return BuilderLog(tuple(layers.values()), onnx_ops, eligible, picked, unread)


def find_gemms(log: BuilderLog, gemms: Sequence[MarkedGemm]) -> tuple[GemmInEngine, ...]:
    """What each marked GEMM became in the engine, in the order given."""
    return tuple(_find(log, gemm) for gemm in gemms)


def _lines(messages: Iterable[str]) -> Iterable[str]:
    for message in messages:
        for line in message.split("\n"):
            yield _LOG_PREFIX.sub("", line).strip(" \r")


def dtype_of(text: str) -> str:
    """The type that a tensor's format names, "int8", "fp16", ..., or "unknown"."""
    for name, pattern in _DATATYPES:
        if pattern.search(text):
            return name
    return "unknown"


def _tensors(text: str | None) -> tuple[EngineTensor, ...]:
    found = []
    for match in _TENSOR.finditer(text or ""):
        datatype = _DATATYPE.search(match["rest"])
        dims = tuple(int(d) for d in match["dims"].split(",") if d.strip())
        found.append(
            EngineTensor(match["name"], dims, dtype_of(datatype["text"]) if datatype else "unknown")
        )
    return tuple(found)


def _layer(line: str) -> EngineLayer | None:
    match = _LAYER.search(line)
    if match is None:
        return None
    rest = match["rest"]
    tactic = _TACTIC.search(rest)
    # TensorRT-RTX picks its kernels on the user's machine and prints a placeholder here.
    named = tactic[1].strip() if tactic and "STUB" not in tactic[1] else ""
    weights = _WEIGHTS.search(rest)
    sparse = _SPARSE_WEIGHTS.search(rest)
    _, _, metadata = rest.partition("Metadata: ")
    return EngineLayer(
        name=match["name"],
        kind=match["kind"],
        inputs=_tensors(match["inputs"]),
        constants=_tensors(match["constants"]),
        outputs=_tensors(match["outputs"]),
        tactic=named or None,
        onnx_nodes=tuple(METADATA.findall(metadata)),
        weight_dtype=dtype_of(weights[1]) if weights and int(weights[2]) else None,
        sparse_weights=sparse[1] == "1" if sparse else None,
    )


def _all_sparse_kernels_named(log: BuilderLog) -> bool:
    """Whether kernel names tell of as many sparse layers as the builder says that it chose."""
    named = sum(layer.has_sparse_kernel() for layer in log.layers)
    return log.picked is not None and named == log.picked.count


def name_parts(layer: str) -> tuple[str, ...]:
    """The parts of a fused name, without Myelin's suffix: `fc1 + act`, `attn.qkv_myl0_4`."""
    own = re.sub(r"_myl\d+_\d+$", "", layer)
    return tuple(part.strip() for part in own.split(" + "))


def _holders(log: BuilderLog, name: str) -> list[EngineLayer]:
    """The engine layers that multiply the weight of `name`.

    Myelin lists an ONNX node at every layer that got a piece of it, so the layers that carry the
    node's name come first, then those that hold no other GEMM.
    """
    listed = [
        layer
        for layer in log.layers
        if layer.is_gemm() and (name in layer.onnx_nodes or name in name_parts(layer.name))
    ]
    named = [layer for layer in listed if name in name_parts(layer.name)]
    if named:
        return named
    alone = [
        layer
        for layer in listed
        if all(log.onnx_ops.get(n) not in _GEMM_OPS for n in layer.onnx_nodes if n != name)
    ]
    return alone or listed


def _reduction_axes(layer: EngineLayer) -> tuple[int, int]:
    """The axis summed over, in the input and in the weight: channels of NCHW, rows of [K, N]."""
    return (1, 1) if "correlation" in layer.kind else (-1, -2)


def _weight(layer: EngineLayer) -> EngineTensor | None:
    """The constant factor. A table that is only added may be a larger constant of the layer."""
    axis, weight_axis = _reduction_axes(layer)
    lengths = {t.dims[axis] for t in layer.inputs if len(t.dims) > 1}
    matrices = [c for c in layer.constants if c.is_matrix() and c.dtype != "unknown"]
    fitting = [c for c in matrices if c.dims[weight_axis] in lengths]
    return max(fitting or matrices, key=EngineTensor.size, default=None)


def _weight_type(layer: EngineLayer) -> str | None:
    """The type in which a GEMM layer reads its weight; None where that is no constant of it."""
    if layer.weight_dtype is not None:
        return layer.weight_dtype
    weight = _weight(layer)
    return weight.dtype if weight is not None else None


def _common(types: Iterable[str | None]) -> str | None:
    """The type that all have; None where they differ."""
    different = set(types)
    return different.pop() if len(different) == 1 else None


def _operands(layer: EngineLayer) -> tuple[str, ...]:
    """The types of the two factors of a GEMM layer, before any cast inside it."""
    data = [t for t in layer.inputs if len(t.dims) > 1]
    if layer.weight_dtype is not None:
        return (*(t.dtype for t in data[:1]), layer.weight_dtype)
    weight = _weight(layer)
    if weight is None:
        return tuple(t.dtype for t in data[:2])
    axis, weight_axis = _reduction_axes(layer)
    fitting = [t for t in data if t.dims[axis] == weight.dims[weight_axis]]
    return (*(t.dtype for t in (fitting or data)[:1]), weight.dtype)


def _casts_before_product(layer: EngineLayer) -> bool:
    ops = layer.fused_ops()
    return "Fc" in ops and "Cast" in ops[: ops.index("Fc")]


def _compute_type(layer: EngineLayer) -> str:
    """The type in which a GEMM layer multiplies; "unknown" where its line does not tell."""
    if layer.tactic and (kernel := _KERNEL_OPERANDS.search(layer.tactic)):
        return _KERNEL_TYPES[kernel[1]]
    operands = _operands(layer)
    if len(operands) < 2 or "unknown" in operands:
        return "unknown"
    if _casts_before_product(layer):
        # An integer factor is dequantized inside the fusion: what is left beside the integers, the
        # other factor, the scales and the product, tells to which type.
        around = (*operands, *(t.dtype for t in (*layer.constants, *layer.outputs)))
        floats = {t for t in around if t in ("fp16", "bf16", "fp32")}
        return floats.pop() if len(floats) == 1 else "unknown"
    if len(set(operands)) > 1:
        return "unknown"
    # A fusion of integer factors without a cast has not been seen: its log would not tell.
    if operands[0] == "int8" and layer.fused_ops():
        return "unknown"
    return operands[0]


def _find(log: BuilderLog, gemm: MarkedGemm) -> GemmInEngine:
    holders = _holders(log, gemm.name)
    eligible = _sparsity_answer(log, log.eligible, gemm.name, holders)
    picked = _sparsity_answer(log, log.picked, gemm.name, holders)
    if eligible == "unknown":
        flags = {layer.sparse_weights for layer in holders}
        if flags == {True}:
            eligible = "yes"
        elif flags == {False}:
            eligible = "no"
    if picked == "unknown" and any(layer.has_sparse_kernel() for layer in holders):
        picked = "yes"
    elif picked == "unknown" and holders and _all_sparse_kernels_named(log):
        picked = "no"
    types = [_compute_type(layer) for layer in holders]
    actual = "unknown" if not types or "unknown" in types else max(types, key=_width)
    status, reason = _judge(log, gemm, holders, types, actual)
    return GemmInEngine(
        name=gemm.name,
        expected=gemm.expected,
        actual=actual,
        status=status,
        layer=" | ".join(layer.name for layer in holders) or None,
        tactic=" | ".join(dict.fromkeys(t for h in holders if (t := h.tactic))) or None,
        eligible=eligible,
        picked=picked,
        reason=reason,
        weight=_common(_weight_type(layer) for layer in holders),
    )


def _width(dtype: str) -> int:
    return _WIDTH.get(dtype, 8)


def _judge(
    log: BuilderLog,
    gemm: MarkedGemm,
    holders: Sequence[EngineLayer],
    types: Sequence[str],
    actual: str,
) -> tuple[Status, str | None]:
    if not holders:
        return _not_found(log, gemm.name)
    if actual == "unknown":
        index = list(types).index("unknown")
        layer = holders[index]
        shown = ", ".join(_operands(layer)) or "none"
        return "unknown", (
            f"engine layer '{layer.name}' ({layer.kind}) has operands of type {shown}; "
            "the log does not tell in which type it multiplies"
        )
    if actual == gemm.expected:
        reason = _weight_missed(log, gemm, holders)
        return ("passed", None) if reason is None else ("missed", reason)
    layer = holders[list(types).index(actual)]
    return "missed", _why(log, gemm, layer, actual)


def _weight_missed(log: BuilderLog, gemm: MarkedGemm, holders: Sequence[EngineLayer]) -> str | None:
    """Why a weight that should be small until it is multiplied is not; None where it is."""
    for layer in holders:
        found = _weight_type(layer)
        if gemm.weight is None or found == gemm.weight:
            continue
        if found is not None:
            return f"engine layer '{layer.name}' holds its weight as {found}, not as {gemm.weight}"
        read = {tensor.name for tensor in layer.inputs}
        for other in log.layers:
            weight = _weight(other)
            if weight is None or weight.dtype != gemm.weight:
                continue
            if any(tensor.name in read and tensor.dims == weight.dims for tensor in other.outputs):
                return (
                    f"engine layer '{other.name}' dequantizes the whole weight ahead of the "
                    f"product, in a kernel of its own{_scales_of(other, weight)}"
                )
        return f"engine layer '{layer.name}' has no constant weight"
    return None


def _scales_of(layer: EngineLayer, weight: EngineTensor) -> str:
    one = any(constant.dims == (1, weight.dims[-1]) for constant in layer.constants)
    why = " (its one block is one scale per output channel; smaller blocks stay with the GEMM)"
    return why if one else ""


def _not_found(log: BuilderLog, name: str) -> tuple[Status, str]:
    if not log.layers:
        return "unknown", "the builder log lists no engine layers"
    if log.unread:
        return "unknown", f"{log.unread} layer lines of the builder log have an unknown form"
    listing = [layer.name for layer in log.layers if name in layer.onnx_nodes]
    if listing:
        return "unknown", (
            f"only engine layers that are not known to be GEMMs list it: {', '.join(listing)}"
        )
    if log.onnx_ops and name not in log.onnx_ops:
        return "missed", f"the builder read no ONNX node named '{name}'"
    return "missed", "no engine layer lists it: the builder removed or folded it"


def _why(log: BuilderLog, gemm: MarkedGemm, layer: EngineLayer, actual: str) -> str:
    """The cause of a wrong type, as far as the log shows one."""
    if gemm.expected == "int8":
        for other in log.layers:
            if other.is_gemm() or gemm.name not in other.onnx_nodes:
                continue
            if any(c.dtype == "int8" and c.is_matrix() for c in other.constants) and any(
                t.dtype == actual for t in other.outputs
            ):
                slices = other.fused_ops().count("Slic")
                split = (
                    f", where the builder cuts it into {slices} parts (a per-tensor Q/DQ on the"
                    " layer's output keeps it whole)"
                    if slices > 1
                    else ""
                )
                return (
                    f"engine layer '{other.name}' dequantizes the weight to {actual} ahead of the "
                    f"product{split}"
                )
        weight = _weight(layer)
        if _casts_before_product(layer) and "int8" in _operands(layer):
            along = weight is not None and any(
                c.dims == (weight.dims[-2], 1) for c in layer.constants
            )
            where = "; its weight scales lie along the reduction axis" if along else ""
            return f"engine layer '{layer.name}' casts to {actual} before the product{where}"
    shown = " x ".join(_operands(layer)) or actual
    return f"engine layer '{layer.name}' multiplies {shown}"


def _sparsity_answer(
    log: BuilderLog, said: SparsityNames | None, name: str, holders: Sequence[EngineLayer]
) -> Answer:
    if said is None:
        return "unknown"
    if said.names is None:
        return "no" if said.count == 0 else "unknown"
    own = {layer.name for layer in holders}
    for entry in said.names:
        if entry in own or name in name_parts(entry):
            return "yes"
    known = {layer.name for layer in log.layers} | set(log.onnx_ops)
    readable = all(e in known or known.intersection(name_parts(e)) for e in said.names)
    return "no" if readable and said.count == len(said.names) else "unknown"
