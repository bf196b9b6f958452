"""Convolutions whose patches neither overlap nor leave gaps, as a GEMM over patches."""

from __future__ import annotations

import itertools
import math
from typing import Any

import torch
import torch.fx

from gpusq_compile.graph.edit import insert_call, insert_get_attr, replace, set_tensor
from gpusq_compile.graph.query import aten, shape_of, tensor_attribute

CONVOLUTIONS: dict[object, int] = {
    aten.conv1d.default: 1,
    aten.conv2d.default: 2,
    aten.conv3d.default: 3,
}
"""With the axes that each goes over."""
PADDED_BY_NAME: dict[object, Any] = {
    aten.conv1d.padding: aten.conv1d.default,
    aten.conv2d.padding: aten.conv2d.default,
    aten.conv3d.padding: aten.conv3d.default,
}
IMAGE_AXES = 2


def patchify(graph_module: torch.fx.GraphModule, node: torch.fx.Node) -> str | None:
    """Rewrite a convolution [B, C, H, W] -> [B, N, H/P, W/Q] as patches @ linear.

    Of one and of three axes (sequences, videos) likewise.

    Returns:
        None when rewritten, else the reason why not.
    """
    arguments = dict(enumerate(node.args))
    image, weight_node = arguments[0], arguments[1]
    bias = arguments.get(2)
    axes = CONVOLUTIONS[node.target]
    stride = _sizes(arguments.get(3, 1), axes)
    padding, dilation = arguments.get(4, 0), _sizes(arguments.get(5, 1), axes)
    groups = arguments.get(6, 1)
    assert isinstance(image, torch.fx.Node)
    if not isinstance(weight_node, torch.fx.Node) or weight_node.op != "get_attr":
        return "the weight is computed in the graph"
    if len(weight_node.users) > 1:
        return "the weight is shared with another operator"
    weight = tensor_attribute(graph_module, str(weight_node.target))
    out_channels, channels, *kernel = weight.shape
    if kernel == [1, 1] and axes == IMAGE_AXES:
        return "a 1x1 convolution is a GEMM as it is"
    if tuple(kernel) != stride:
        return f"patches overlap or leave gaps: kernel {tuple(kernel)}, stride {stride}"
    if isinstance(padding, str) or any(_sizes(padding, axes)):
        return f"padded by {padding}"
    if set(dilation) != {1} or groups != 1:
        return f"dilation {dilation}, groups {groups}"
    shape = shape_of(image)
    if shape is None or len(shape) != 2 + axes or not all(isinstance(n, int) for n in shape[1:]):
        return f"image size is not static: {shape}"
    sizes = [int(size) for size in shape[2:]]
    if any(size % part for size, part in zip(sizes, kernel, strict=True)):
        given, patch = ("x".join(map(str, numbers)) for numbers in (sizes, kernel))
        return f"image {given} is no multiple of the patch {patch}"
    grid = [size // part for size, part in zip(sizes, kernel, strict=True)]
    path = str(weight_node.target)
    trainable = isinstance(weight, torch.nn.Parameter)
    set_tensor(graph_module, path, weight.detach().flatten(1), trainable=trainable)
    graph = graph_module.graph
    with graph.inserting_before(node):
        flat_weight = insert_get_attr(graph_module, path, provenance=weight_node)
        patches = insert_call(
            graph,
            aten.reshape.default,
            (image, [-1, channels, *itertools.chain(*zip(grid, kernel, strict=True))]),
            provenance=node,
        )
        places, pixels = range(2, 2 + 2 * axes, 2), range(3, 3 + 2 * axes, 2)
        ordered = insert_call(
            graph, aten.permute.default, (patches, [0, *places, 1, *pixels]), provenance=node
        )
        tokens = insert_call(
            graph,
            aten.reshape.default,
            (ordered, [-1, math.prod(grid), channels * math.prod(kernel)]),
            provenance=node,
        )
        arguments_of_linear = (tokens, flat_weight) if bias is None else (tokens, flat_weight, bias)
        linear = insert_call(graph, aten.linear.default, arguments_of_linear, provenance=node)
        channels_first = insert_call(
            graph, aten.permute.default, (linear, [0, 2, 1]), provenance=node
        )
        picture = insert_call(
            graph,
            aten.reshape.default,
            (channels_first, [-1, out_channels, *grid]),
            provenance=node,
        )
    replace(node, picture)
    graph.erase_node(weight_node)
    return None


def pad_numerically(node: torch.fx.Node) -> None:
    """`conv2d(padding="valid" | "same")` -> `conv2d` with the padding as numbers, where it is even;
    `conv1d` and `conv3d` likewise.

    An uneven "same" (an even kernel) pads one side more, which numbers cannot say: left as it is.
    """
    if node.target not in PADDED_BY_NAME:
        return
    numerically = PADDED_BY_NAME[node.target]
    axes = CONVOLUTIONS[numerically]
    arguments = [*node.args, *([None, 1, "valid", 1, 1][len(node.args) - 2 :])]
    weight = arguments[1]
    assert isinstance(weight, torch.fx.Node)
    kernel = [int(size) for size in (shape_of(weight) or ())[2:]]
    dilation = _sizes(arguments[5], axes)
    reach = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
    if arguments[4] == "same" and any(total % 2 for total in reach):
        return
    padding = [total // 2 if arguments[4] == "same" else 0 for total in reach]
    stride = list(_sizes(arguments[3], axes))
    node.target = numerically
    node.args = (*arguments[:3], stride, padding, list(dilation), arguments[6])


def _sizes(value: Any, axes: int) -> tuple[int, ...]:
    """A convolution's argument for each axis: one number, or a list of one, stands for all."""
    given = (
        tuple(int(size) for size in value) if isinstance(value, (list, tuple)) else (int(value),)
    )
    return given * axes if len(given) == 1 else given
