"""The weights of a folded graph under the names that they have in the user's model."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.fx

from gpusq_compile.graph.query import tensor_attribute
from gpusq_compile.plan import planned
from gpusq_compile.quantization.operators import DEQUANTIZE


def user_state_dict(
    graph_module: torch.fx.GraphModule, shapes: Mapping[str, torch.Size]
) -> dict[str, torch.Tensor]:
    """Float weights of the user's names and `shapes`, pruned and rounded as deployed.

    A layer that was split into parts is put together again. Parameters that the graph does not
    read are left out.
    """
    scales = {
        str(node.args[0].target): str(node.args[1].target)
        for node in graph_module.graph.nodes
        if node.target is DEQUANTIZE and node.args[0].op == "get_attr"
    }

    def value_of(path: str) -> torch.Tensor:
        value = tensor_attribute(graph_module, path).detach()
        if path in scales:
            dequantized: torch.Tensor = DEQUANTIZE(
                value, tensor_attribute(graph_module, scales[path]).detach()
            )
            return dequantized
        return value

    parts = parts_of(graph_module)
    state = {}
    for name, shape in shapes.items():
        if name in parts:
            whole = torch.empty(shape)
            for rows, path in parts[name]:
                whole[list(rows)] = value_of(path).float()
            state[name] = whole
            continue
        try:
            state[name] = value_of(name).reshape(shape)
        except AttributeError:
            continue
    return state


def parts_of(
    graph_module: torch.fx.GraphModule,
) -> dict[str, list[tuple[tuple[int, ...], str]]]:
    """For each tensor that was split, the rows and the path of each of its parts."""
    found: dict[str, list[tuple[tuple[int, ...], str]]] = {}
    for node, plan in planned(graph_module.graph):
        if plan.part is None:
            continue
        found.setdefault(plan.part.weight, []).append((plan.part.rows, plan.weight))
        if plan.part.bias is not None:
            bias = node.args[2]
            assert isinstance(bias, torch.fx.Node)
            found.setdefault(plan.part.bias, []).append((plan.part.rows, str(bias.target)))
    return found
