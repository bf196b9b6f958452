"""Patches summed into a map (`nn.Fold`, `col2im`) in terms that an engine knows.

ONNX has `Col2Im`, which no TensorRT parser reads.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.fx

from gpusq_compile.graph.edit import (
    insert_call,
    insert_get_attr,
    inserted_path,
    replace,
    store_buffer,
)
from gpusq_compile.graph.query import aten, shape_of

MOST_MEGABYTES = 64
"""Largest constant that is made; patches of 14 x 14 of 384 channels take 56 in FP32."""


@dataclass(frozen=True)
class _Geometry:
    """How patches lie on the map, as [vertical, horizontal]; `places` counts them."""

    size: list[int]
    kernel: list[int]
    dilation: list[int]
    padding: list[int]
    stride: list[int]

    @property
    def free(self) -> list[int]:
        """Steps of one pixel that the first patch can go."""
        axes = zip(self.size, self.kernel, self.dilation, self.padding, strict=True)
        return [n + 2 * p - d * (k - 1) - 1 for n, k, d, p in axes]

    @property
    def places(self) -> list[int]:
        return [n // s + 1 for n, s in zip(self.free, self.stride, strict=True)]

    @property
    def left_over(self) -> list[int]:
        return [n % s for n, s in zip(self.free, self.stride, strict=True)]

    @property
    def tiles(self) -> bool:
        """Whether every pixel lies in one patch, and every patch on the map."""
        return (
            self.kernel == self.stride
            and not any(self.padding)
            and not any(self.left_over)
            and all(d == 1 or k == 1 for d, k in zip(self.dilation, self.kernel, strict=True))
        )


def spell_out_fold(graph_module: torch.fx.GraphModule, node: torch.fx.Node) -> str | None:
    """`col2im` [B, C * k * l, N] or [C * k * l, N] -> [B, C, H, W] or [C, H, W].

    Patches that tile the map are put into order, others summed by a transposed convolution of each
    channel. Its weights are constant: the one for place (i, j) of a patch puts the value there and
    adds it to what other patches put there. Its other weights are zero, so that this is exact for
    finite values alone: one that is not makes the rest of its patch NaN.

    Returns:
        None when rewritten, else the reason why not.

    Source: torch.nn.Fold; ONNX operators Col2Im and ConvTranspose.
    """
    columns, *numbers = node.args
    assert isinstance(columns, torch.fx.Node)
    pairs: Any = numbers
    shape = shape_of(columns)
    if not all(isinstance(n, int) for pair in pairs for n in pair):
        return "the size of the map is not static"
    if shape is None or not isinstance(shape[-2], int):
        return f"the number of channels is not static: {shape}"
    geometry = _Geometry(*(list(pair) for pair in pairs))
    patch = math.prod(geometry.kernel)
    channels = int(shape[-2]) // patch
    value = columns.meta["val"]
    megabytes = channels * patch**2 * value.dtype.itemsize / 2**20
    if not geometry.tiles and megabytes > MOST_MEGABYTES:
        return f"a convolution's weights would take {megabytes:.0f} MB, limit {MOST_MEGABYTES}"
    with node.graph.inserting_before(node):
        if geometry.tiles:
            result = _in_order(columns, channels, geometry, node)
        else:
            result = _summed(graph_module, columns, channels, geometry, node)
        if len(shape) == 2:
            unbatched = (result, [channels, *geometry.size])
            result = insert_call(node.graph, aten.reshape.default, unbatched, provenance=node)
    replace(node, result)
    return None


def _in_order(
    columns: torch.fx.Node, channels: int, geometry: _Geometry, node: torch.fx.Node
) -> torch.fx.Node:
    graph = node.graph
    grid = (columns, [-1, channels, *geometry.kernel, *geometry.places])
    patches = insert_call(graph, aten.reshape.default, grid, provenance=node)
    order = (patches, [0, 1, 4, 2, 5, 3])
    rows = insert_call(graph, aten.permute.default, order, provenance=node)
    whole = (rows, [-1, channels, *geometry.size])
    return insert_call(graph, aten.reshape.default, whole, provenance=node)


def _summed(
    graph_module: torch.fx.GraphModule,
    columns: torch.fx.Node,
    channels: int,
    geometry: _Geometry,
    node: torch.fx.Node,
) -> torch.fx.Node:
    graph, value = node.graph, columns.meta["val"]
    patch = math.prod(geometry.kernel)
    weight = torch.eye(patch, dtype=value.dtype, device=value.device)
    weight = weight.reshape(patch, 1, *geometry.kernel).repeat(channels, 1, 1, 1)
    path = inserted_path("fold", node.name)
    store_buffer(graph_module, path, weight)
    ones = insert_get_attr(graph_module, path, provenance=node)
    grid = (columns, [-1, channels * patch, *geometry.places])
    patches = insert_call(graph, aten.reshape.default, grid, provenance=node)
    steps = (geometry.stride, geometry.padding, geometry.dilation)
    arguments = (patches, ones, None, *steps, True, geometry.left_over, channels)
    return insert_call(graph, aten.convolution.default, arguments, provenance=node)
