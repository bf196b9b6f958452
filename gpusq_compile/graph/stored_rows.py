"""Parameters whose rows the model gives to different layers, stored as one parameter per layer.

`nn.MultiheadAttention` keeps the projections of queries, keys and values in one parameter, and cuts
it where their inputs are not the same. A mask and a scale belong to the weight of one layer, so
each part becomes a parameter here, and one again where the user gets his weights (user_state.py).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.fx

from gpusq_compile.graph.cuts import CUTS, NotCut, pieces_of
from gpusq_compile.graph.edit import insert_get_attr, remove_tensor, replace, set_tensor
from gpusq_compile.graph.query import is_parameter, is_weighted, tensor_attribute

KINDS = ("weight", "bias")


@dataclass(frozen=True)
class StoredRows:
    """The `rows` of a parameter that was split, as the tensor of the graph that holds them."""

    tensor: str
    rows: tuple[int, ...]


Pieces = dict[torch.fx.Node, range]
"""The nodes that are parts of one parameter, with their rows."""


def store_rows_apart(graph_module: torch.fx.GraphModule) -> dict[str, list[StoredRows]]:
    """Give every layer that reads rows of a parameter a parameter of its own.

    A parameter is left whole where something reads all of it too, or where its parts overlap.

    Returns:
        For each parameter that is no more what became of its rows, in their order. Rows that
        nothing reads are in none of them.
    """
    readers: dict[str, list[torch.fx.Node]] = defaultdict(list)
    for node in graph_module.graph.find_nodes(op="get_attr"):
        if is_parameter(graph_module, node):
            readers[str(node.target)].append(node)
    found = {}
    for path, nodes in readers.items():
        pieces = _pieces(nodes, tensor_attribute(graph_module, path).shape)
        if pieces and any(_is_of_layer(piece) for piece in pieces):
            found[path] = _store_apart(graph_module, path, nodes, pieces)
    return found


def _pieces(nodes: Sequence[torch.fx.Node], size: torch.Size) -> Pieces | None:
    """The parts that the readers `nodes` of one parameter of this `size` make of its rows.

    None where one of them does something else, or where two different parts overlap.
    """
    pieces: Pieces = {}
    for user in (user for node in nodes for user in node.users):
        if user.target not in CUTS:
            return None
        try:
            parts = pieces_of(user, size)
        except NotCut:
            return None
        if any(axis != 0 or not kept for axis, kept, *_ in parts):
            return None
        pieces |= {piece: range(start, start + length) for _, _, start, length, piece in parts}
    distinct = sorted(set(pieces.values()), key=lambda rows: (rows.start, rows.stop))
    apart = all(a.stop <= b.start for a, b in pairwise(distinct))
    return pieces if apart and len(distinct) > 1 else None


def _is_of_layer(piece: torch.fx.Node) -> bool:
    """Whether a linear or a convolution has it for its weight or its bias."""
    return any(is_weighted(user) and piece in user.args[1:3] for user in piece.users)


def _store_apart(
    graph_module: torch.fx.GraphModule, path: str, readers: list[torch.fx.Node], pieces: Pieces
) -> list[StoredRows]:
    """Replace the pieces of a parameter by parameters, and remove it with its readers."""
    value = tensor_attribute(graph_module, path).detach()
    names: dict[range, str] = {}
    for rows in sorted(set(pieces.values()), key=lambda rows: rows.start):
        names[rows] = _free_name(graph_module, path, rows)
        set_tensor(graph_module, names[rows], value[rows.start : rows.stop].clone(), trainable=True)
    graph = graph_module.graph
    for piece, rows in pieces.items():
        with graph.inserting_before(piece):
            replace(piece, insert_get_attr(graph_module, names[rows], provenance=piece))
    for reader in readers:
        for split in list(reader.users):
            graph.erase_node(split)
        graph.erase_node(reader)
    remove_tensor(graph_module, path)
    return [StoredRows(name, tuple(rows)) for rows, name in names.items()]


def _free_name(graph_module: torch.fx.GraphModule, path: str, rows: range) -> str:
    """`a.in_proj_weight` -> `a.in_proj_rows_0_64_weight`: a weight's name ends in what it is."""
    owner, _, leaf = path.rpartition(".")
    stem, _, kind = leaf.rpartition("_")
    numbers = f"rows_{rows.start}_{rows.stop}"
    parts = [stem, numbers, kind] if kind in KINDS else [leaf, numbers]
    name = "_".join(part for part in parts if part)
    while hasattr(graph_module.get_submodule(owner), name):
        name = f"own_{name}"
    return f"{owner}.{name}".removeprefix(".")
