"""Overlapping patches summed into a map (`nn.Fold`, `col2im`) in terms that an engine knows."""

from __future__ import annotations

from typing import Any

import torch
import torch.fx

from gpusq_compile.graph.edit import insert_call, insert_get_attr, inserted_path, store_buffer
from gpusq_compile.graph.query import aten, shape_of


def fold_to_convolution(graph_module: torch.fx.GraphModule, node: torch.fx.Node) -> bool:
    """`col2im` [B, C * k * l, N] -> [B, C, H, W] as a transposed convolution of each channel.

    Its weights are constant: the one for place (i, j) of a patch puts the value there and adds it
    to what other patches put there. ONNX has `Col2Im`, which no TensorRT parser reads.

    Source: torch.nn.Fold; ONNX operators Col2Im and ConvTranspose.
    """
    if node.target is not aten.col2im.default:
        return False
    columns, size, kernel, dilation, padding, stride = node.args
    assert isinstance(columns, torch.fx.Node)
    shape = shape_of(columns)
    numbers: Any = (size, kernel, dilation, padding, stride)
    if shape is None or not all(isinstance(n, int) for pair in numbers for n in pair):
        return False
    height_width, kernel, dilation, padding, stride = (list(pair) for pair in numbers)
    reach = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
    free = [n + 2 * p - r - 1 for n, p, r in zip(height_width, padding, reach, strict=True)]
    places = [n // s + 1 for n, s in zip(free, stride, strict=True)]
    left_over = [n % s for n, s in zip(free, stride, strict=True)]
    patch = kernel[0] * kernel[1]
    rows = int(shape[-2])
    groups = rows // patch
    value = columns.meta["val"]
    weight = torch.eye(patch, dtype=value.dtype, device=value.device)
    path = inserted_path("fold", node.name)
    store_buffer(graph_module, path, weight.reshape(patch, 1, *kernel).repeat(groups, 1, 1, 1))
    graph = node.graph
    with graph.inserting_before(node):
        ones = insert_get_attr(graph_module, path, provenance=node)
        grid = (columns, [-1, rows, *places])
        patches = insert_call(graph, aten.reshape.default, grid, provenance=node)
        arguments = (patches, ones, None, stride, padding, dilation, True, left_over, groups)
        result = insert_call(graph, aten.convolution.default, arguments, provenance=node)
        if len(shape) == 2:
            unbatched = (result, [groups, *height_width])
            result = insert_call(graph, aten.reshape.default, unbatched, provenance=node)
    node.replace_all_uses_with(result)
    graph.erase_node(node)
    return True
