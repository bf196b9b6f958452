"""What the marked attentions became, read from the builder's log.

A fused attention is one engine layer (`_gemm_mha_v2` of Myelin) that lists both of its products
among its ONNX nodes; otherwise each product is a layer of its own.
"""

from __future__ import annotations

from collections.abc import Sequence

from gpusq_compile.engine.builder_log import BuilderLog, EngineLayer
from gpusq_compile.engine.report import AttentionInEngine, MarkedAttention, Status

FLOATS = frozenset({"fp16", "bf16", "fp32"})
FACTORS = 3
"""Queries, keys and values; a mask comes as one more input."""


def find_attentions(
    log: BuilderLog, attentions: Sequence[MarkedAttention]
) -> tuple[AttentionInEngine, ...]:
    """What each marked attention became in the engine, in the order given."""
    return tuple(_find(log, attention) for attention in attentions)


def _find(log: BuilderLog, attention: MarkedAttention) -> AttentionInEngine:
    products = (f"{attention.name}/qk", f"{attention.name}/av")
    holders = [layer for layer in log.layers if any(name in layer.onnx_nodes for name in products)]
    whole = [layer for layer in holders if all(name in layer.onnx_nodes for name in products)]
    kernels = [layer for layer in whole if _is_attention(layer)]
    if len(kernels) == 1:
        actual = _type(kernels[0])
        shown = ", ".join(tensor.dtype for tensor in kernels[0].inputs)
        status: Status = "passed" if actual == attention.expected else "missed"
        reason = f"engine layer '{kernels[0].name}' takes {shown}"
        if actual == "unknown":
            status = "unknown"
        return _answer(attention, actual, status, kernels, reason)
    gemms = [layer for layer in holders if layer.is_gemm()]
    if gemms and not kernels:
        names = ", ".join(f"'{layer.name}'" for layer in gemms)
        return _answer(
            attention,
            "unfused",
            "missed",
            gemms,
            f"the builder made separate layers of it: {names}",
        )
    if not log.layers:
        reason = "the builder log lists no engine layers"
    elif log.unread:
        reason = f"{log.unread} layer lines of the builder log have an unknown form"
    elif kernels:
        reason = f"{len(kernels)} engine layers list both of its products"
    else:
        reason = f"no engine layer that multiplies lists {products[0]} or {products[1]}"
    return _answer(attention, "unknown", "unknown", holders, reason)


def _is_attention(layer: EngineLayer) -> bool:
    return "mha" in layer.name.lower() or "mha" in (layer.tactic or "").lower()


def _type(layer: EngineLayer) -> str:
    """The type of the factors: all three are INT8, or no input is."""
    types = [tensor.dtype for tensor in layer.inputs]
    if types.count("int8") == FACTORS:
        return "int8"
    floats = [name for name in dict.fromkeys(types) if name in FLOATS]
    return floats[0] if len(floats) == 1 and "int8" not in types else "unknown"


def _answer(
    attention: MarkedAttention,
    actual: str,
    status: Status,
    layers: Sequence[EngineLayer],
    reason: str,
) -> AttentionInEngine:
    return AttentionInEngine(
        name=attention.name,
        expected=attention.expected,
        actual=actual,
        status=status,
        layer=" | ".join(layer.name for layer in layers) or None,
        reason=None if status == "passed" else reason,
    )
