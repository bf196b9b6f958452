"""The weights of a compiled graph under the names that they have in the user's model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
import torch.fx

from gpusq_compile.graph.as_json import graph_tensors
from gpusq_compile.graph.stored_rows import StoredRows
from gpusq_compile.graph.stored_weights import Turned
from gpusq_compile.plan import planned
from gpusq_compile.quantization.operators import DEQUANTIZE


@dataclass
class UserParameters:
    """The user's own parameters, and how the graph holds those that it holds otherwise.

    `shapes` are theirs, by name. `tied` has for each further name of a parameter the first, which
    the graph reads it by; `turned` those that it holds with their axes in another order, and
    `apart` those whose rows it holds as parameters of their own.
    """

    shapes: dict[str, torch.Size] = field(default_factory=dict)
    tied: dict[str, str] = field(default_factory=dict)
    turned: dict[str, Turned] = field(default_factory=dict)
    apart: dict[str, list[StoredRows]] = field(default_factory=dict)


def in_user_model(state: Mapping[str, torch.Tensor], scope: str | None) -> dict[str, torch.Tensor]:
    """A compiled submodule's tensors under their names in the model around it."""
    return {name if scope is None else f"{scope}.{name}": value for name, value in state.items()}


def user_state_dict(
    graph_module: torch.fx.GraphModule, parameters: UserParameters
) -> dict[str, torch.Tensor]:
    """Float weights of the user's names and shapes, pruned and rounded as deployed.

    A layer that was split into parts is put together again, and so are rows that are stored apart;
    what was turned is turned back, and what is tied has all of its names. Parameters that the graph
    does not read are left out.
    """
    return user_tensors(
        graph_tensors(graph_module),
        weight_scales(graph_module),
        parts_of(graph_module, parameters.apart),
        parameters.shapes,
        parameters.turned,
        parameters.tied,
    )


def user_tensors(
    tensors: Mapping[str, torch.Tensor],
    scales: Mapping[str, str],
    parts: Mapping[str, Sequence[StoredRows]],
    shapes: Mapping[str, Sequence[int]],
    turned: Mapping[str, Turned],
    tied: Mapping[str, str],
) -> dict[str, torch.Tensor]:
    """`user_state_dict` of a graph's tensors by name.

    `scales` names the scale of each integer weight. Rows of a split parameter that no part holds
    were read by nothing; they are zero.
    """

    def value_of(name: str) -> torch.Tensor:
        value = tensors[name]
        return DEQUANTIZE(value, tensors[scales[name]]) if name in scales else value

    state = {}
    for name, shape in shapes.items():
        held = turned.get(name)
        if name in parts:
            value = torch.zeros(tuple(shape) if held is None else held.graph_shape(shape))
            for part in parts[name]:
                value[list(part.rows)] = value_of(part.tensor).float()
        elif name in tensors:
            value = value_of(name)
        else:
            continue
        state[name] = value.reshape(tuple(shape)) if held is None else held.to_user(value, shape)
    return state | {name: state[first] for name, first in tied.items() if first in state}


def weight_scales(graph_module: torch.fx.GraphModule) -> dict[str, str]:
    """The name of each stored integer weight's scale, by the weight's name."""
    return {
        str(node.args[0].target): str(node.args[1].target)
        for node in graph_module.graph.nodes
        if node.target is DEQUANTIZE and node.args[0].op == "get_attr"
    }


def parts_of(
    graph_module: torch.fx.GraphModule, apart: Mapping[str, Sequence[StoredRows]]
) -> dict[str, list[StoredRows]]:
    """For each parameter that was split, its parts in graph order.

    `apart` are those whose rows the graph stores apart. Where a layer of such rows was split in
    turn, its parts are those of the whole parameter.
    """
    found: dict[str, list[StoredRows]] = {}
    for node, plan in planned(graph_module.graph):
        if plan.part is None:
            continue
        weights = found.setdefault(plan.part.weight, [])
        weights.append(StoredRows(plan.weight, plan.part.rows))
        if plan.part.bias is not None:
            bias = node.args[2]
            assert isinstance(bias, torch.fx.Node)
            biases = found.setdefault(plan.part.bias, [])
            biases.append(StoredRows(str(bias.target), plan.part.rows))
    for name, pieces in apart.items():
        found[name] = [
            StoredRows(part.tensor, tuple(piece.rows[row] for row in part.rows))
            for piece in pieces
            for part in found.pop(piece.tensor, [whole(piece)])
        ]
    return found


def whole(piece: StoredRows) -> StoredRows:
    """A piece as its only part."""
    return StoredRows(piece.tensor, tuple(range(len(piece.rows))))
