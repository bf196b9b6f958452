"""The IR as JSON: every node with its operator, arguments, shapes and the user's module."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.fx

from gpusq_compile.graph.query import module_path, tensor_attribute


def graph_nodes(graph_module: torch.fx.GraphModule) -> list[dict[str, Any]]:
    """Every node in graph order, as JSON values that say all of the computation.

    `op` is torch.fx's: placeholder, get_attr (`target` is a tensor's name), call_function (`target`
    is an operator such as `aten.linear.default`) and output. Among the arguments numbers, strings,
    null and lists stand for themselves; `{"node": NAME}` is another node's value, and what else
    JSON has not is `{"float": "-inf"}`, `{"dtype": "float32"}`, `{"device": "cpu"}`,
    `{"slice": [start, stop, step]}`, `{"dict": {...}}` or `{"constant": TEXT}`. `outputs` has the
    dtype and shape of each tensor that the node gives; dynamic sizes are null.
    """
    return [
        {
            "name": node.name,
            "op": node.op,
            "target": _target(node),
            "args": [_argument(argument) for argument in node.args],
            "kwargs": {name: _argument(value) for name, value in node.kwargs.items()},
            "outputs": _outputs(node),
            "module": module_path(node),
        }
        for node in graph_module.graph.nodes
    ]


def graph_tensors(graph_module: torch.fx.GraphModule) -> dict[str, torch.Tensor]:
    """Every parameter, buffer and constant that the graph holds, by its name there.

    The state dict lacks the buffers that a module does not save, and constants.
    """
    tensors = {name: value.detach() for name, value in graph_module.state_dict().items()}
    for node in graph_module.graph.nodes:
        if node.op == "get_attr" and node.target not in tensors:
            tensors[str(node.target)] = tensor_attribute(graph_module, str(node.target)).detach()
    return tensors


def _target(node: torch.fx.Node) -> str:
    target: str | Callable[..., Any] = node.target
    if isinstance(target, (str, torch._ops.OpOverload)):
        return str(target)
    return f"{target.__module__}.{target.__qualname__}"


def _argument(value: Any) -> Any:
    if isinstance(value, torch.fx.Node):
        return {"node": value.name}
    if isinstance(value, float) and not math.isfinite(value):
        return {"float": str(value)}
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, (list, tuple)):
        return [_argument(item) for item in value]
    if isinstance(value, dict):
        return {"dict": {str(key): _argument(item) for key, item in value.items()}}
    if isinstance(value, slice):
        return {"slice": [_argument(part) for part in (value.start, value.stop, value.step)]}
    if isinstance(value, torch.dtype):
        return {"dtype": dtype_name(value)}
    if isinstance(value, torch.device):
        return {"device": str(value)}
    return {"constant": str(value)}


def _outputs(node: torch.fx.Node) -> list[dict[str, Any]]:
    value = node.meta.get("val")
    values = value if isinstance(value, (list, tuple)) else [value]
    return [
        {
            "dtype": dtype_name(item.dtype),
            "shape": [size if isinstance(size, int) else None for size in item.shape],
        }
        for item in values
        if isinstance(item, torch.Tensor)
    ]


def dtype_name(dtype: torch.dtype) -> str:
    """`float32` and its like, as the name of a type in a file."""
    return str(dtype).removeprefix("torch.")
