"""An attention in the ONNX graph: its products, what they multiply, and their names."""

from __future__ import annotations

from collections.abc import Callable

import onnx_graphsurgeon as gs
import torch
import torch.fx

from gpusq_compile.errors import InternalError
from gpusq_compile.lowering.wiring import GEMM_OPS, producer
from gpusq_compile.quantization.operators import DEQUANTIZE

MOVES = frozenset(
    {
        "Cast",
        "Concat",
        "Expand",
        "Flatten",
        "Gather",
        "Identity",
        "Pad",
        "Reshape",
        "Slice",
        "Split",
        "Squeeze",
        "Transpose",
        "Unsqueeze",
    }
)
"""Operators whose elements are elements of their inputs; only the first one of most is data."""


def softmax_scale(product: torch.fx.Node) -> str:
    """The path of the scale of what a folded attention's second product reads first."""
    weights = product.args[0]
    assert isinstance(weights, torch.fx.Node)
    if weights.target is not DEQUANTIZE:
        raise InternalError("attention-lost", f"{product}: its softmax is not quantized any more")
    scale = weights.args[1]
    assert isinstance(scale, torch.fx.Node)
    return str(scale.target)


def name_attention(scale: gs.Tensor | None, name: str, own: str) -> None:
    """Name the nodes of an attention after it, found from the scale of its softmax output.

    The products are `NAME/qk` and `NAME/av` and the softmax between them `NAME/softmax`; Q/DQ
    whose scales' names begin with `own` are `NAME/query_q`, `NAME/query_dq` and so on.

    Raises:
        InternalError: the export changed the attention's form.
    """
    users = [] if scale is None else list(scale.outputs)
    quantize = next((node for node in users if node.op == "QuantizeLinear"), None)
    dequantize = next((node for node in users if node.op == "DequantizeLinear"), None)
    readers = list(dequantize.outputs[0].outputs) if dequantize is not None else []
    if quantize is None or len(readers) != 1 or readers[0].op != "MatMul":
        raise InternalError("attention-lost", f"no product reads the softmax of {name} any more")
    second = readers[0]
    softmax = _first_upstream(quantize, lambda node: node.op == "Softmax")
    first = None if softmax is None else _first_upstream(softmax, _multiplies_activations)
    if softmax is None or first is None:
        raise InternalError("attention-lost", f"the export lost the first product of {name}")
    second.name, first.name, softmax.name = f"{name}/av", f"{name}/qk", f"{name}/softmax"
    factors = (("query", first, 0), ("key", first, 1), ("softmax", second, 0), ("value", second, 1))
    for what, product, index in factors:
        _name_quantizer(product.inputs[index], f"{name}/{what}", own)
    for reader in second.outputs[0].outputs:
        if reader.op == "QuantizeLinear" and reader.inputs[1].name.startswith(own):
            reader.name = f"{name}/output_q"
            for after in reader.outputs[0].outputs:
                after.name = f"{name}/output_dq"


def _name_quantizer(factor: gs.Tensor, name: str, own: str) -> None:
    dequantize = producer(factor)
    if dequantize is None or dequantize.op != "DequantizeLinear":
        return
    quantize = producer(dequantize.inputs[0])
    if quantize is not None and dequantize.inputs[1].name.startswith(own):
        dequantize.name, quantize.name = f"{name}_dq", f"{name}_q"


def _first_upstream(start: gs.Node, found: Callable[[gs.Node], bool]) -> gs.Node | None:
    """The nearest node upstream that `found` accepts; a MatMul that it does not is not passed."""
    queue = [start]
    seen = {id(start)}
    while queue:
        node = queue.pop(0)
        if node is not start and found(node):
            return node
        if node.op in GEMM_OPS:
            continue
        for source in filter(None, map(producer, node.inputs)):
            if id(source) not in seen:
                seen.add(id(source))
                queue.append(source)
    return None


def _multiplies_activations(node: gs.Node) -> bool:
    """Whether a MatMul has two factors that were quantized on the way, and no stored weight."""
    return node.op == "MatMul" and all(_quantized(tensor) for tensor in node.inputs)


def _quantized(tensor: gs.Tensor) -> bool:
    node = producer(tensor)
    while node is not None and node.op in MOVES:
        node = producer(node.inputs[0])
    if node is None or node.op != "DequantizeLinear":
        return False
    return producer(node.inputs[0]) is not None
