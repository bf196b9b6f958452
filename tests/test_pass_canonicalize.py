"""canonicalize: each rewrite keeps the function, and what is not rewritten has its reason."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gpusq_compile.compilation import Compilation
from gpusq_compile.graph.query import tensor_attribute
from gpusq_compile.passes import canonicalize
from gpusq_compile.remarks import Kind
from tests.compilations import begin, make_rules, remarks_of, run_until, targets
from tests.models import Convolution, Perceptron, noise, seeded

TOLERANCE: dict[str, Any] = {"rtol": 1e-5, "atol": 1e-5}


def canonical(model: nn.Module, *inputs: Tensor) -> Compilation:
    """The graph after the pass, whose outputs are compared with the eager model's."""
    compilation = run_until(begin(model.eval(), inputs, make_rules()), "canonicalize")
    with torch.no_grad():
        torch.testing.assert_close(compilation.ir(*inputs), model(*inputs), **TOLERANCE)
    return compilation


def convolution(*args: Any, size: tuple[int, int] = (8, 8), **kwargs: Any) -> Compilation:
    model = seeded(Convolution, *args, **kwargs)
    return canonical(model, noise(2, args[0], *size))


# --- identities and views ------------------------------------------------------------------------


class Identities(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.drop = nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        y = self.drop(x).detach().transpose(0, 1).contiguous()
        return F.relu(y).transpose(0, 1)


def test_dropout_detach_and_contiguous_are_removed() -> None:
    found = targets(canonical(Identities(), noise(4, 6)))
    assert found == ["aten.transpose.int", "aten.relu.default", "aten.transpose.int"]


def test_a_dropout_that_drops_is_kept() -> None:
    """Monte-Carlo dropout is part of the function: only an inactive dropout is an identity."""
    compilation = run_until(begin(seeded(Perceptron), noise(2, 32), make_rules()), "trace")
    graph = compilation.ir.graph
    last = next(node for node in reversed(graph.nodes) if node.op == "call_function")
    with graph.inserting_after(last):
        drop = graph.call_function(torch.ops.aten.dropout.default, (last, 0.5, True))
    assert not canonicalize.remove_identity(compilation.ir, drop)
    assert drop in graph.nodes


class Views(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.view(x.shape[0], 2, -1).transpose(1, 2)


def test_a_view_becomes_a_reshape_which_is_legal_for_any_strides() -> None:
    compilation = canonical(Views(), noise(4, 6))
    assert "aten.view.default" not in targets(compilation)
    assert "aten.reshape.default" in targets(compilation)


# --- patch embeddings ----------------------------------------------------------------------------

PATCHES: dict[str, tuple[tuple[Any, ...], dict[str, Any], tuple[int, int]]] = {
    "square": ((2, 8, 4), {"stride": 4}, (8, 8)),
    "wide image": ((2, 8, 4), {"stride": 4}, (4, 12)),
    "oblong patch": ((2, 8, (2, 4)), {"stride": (2, 4)}, (8, 8)),
    "without bias": ((2, 8, 2), {"stride": 2, "bias": False}, (8, 4)),
    "explicitly unpadded": ((2, 8, 4), {"stride": 4, "padding": "valid"}, (8, 8)),
}


@pytest.mark.parametrize("name", PATCHES)
def test_a_convolution_over_patches_becomes_a_linear(name: str) -> None:
    args, kwargs, size = PATCHES[name]
    compilation = convolution(*args, size=size, **kwargs)
    assert not any("conv" in target for target in targets(compilation))
    assert "aten.linear.default" in targets(compilation)
    [remark] = remarks_of(compilation, "canonicalize", Kind.PASSED)
    assert (remark.code, remark.layer) == ("patchify", "conv")
    weight = tensor_attribute(compilation.ir, "conv.weight")
    height, width = torch.zeros(1, 1, *_pair(args[2])).shape[2:]
    assert weight.shape == (args[1], args[0] * height * width)
    assert isinstance(weight, nn.Parameter)


def _pair(value: int | tuple[int, int]) -> tuple[int, int]:
    return value if isinstance(value, tuple) else (value, value)


@pytest.mark.parametrize(
    ("kind", "kernel", "size"),
    [
        (nn.Conv3d, (2, 4, 4), (3, 4, 8, 12)),
        (nn.Conv3d, 2, (3, 2, 4, 6)),
        (nn.Conv1d, 4, (3, 16)),
        (nn.Conv1d, 1, (3, 16)),
    ],
)
@pytest.mark.parametrize("bias", [True, False])
def test_patches_of_videos_and_of_sequences_become_a_linear_too(
    kind: Any, kernel: Any, size: tuple[int, ...], bias: bool
) -> None:
    model = seeded(lambda: nn.Sequential(kind(3, 8, kernel, stride=kernel, bias=bias)))
    compilation = canonical(model, noise(2, *size))
    assert "aten.linear.default" in targets(compilation)
    assert not any("conv" in target for target in targets(compilation))
    [patches] = [n for n in compilation.ir.graph.nodes if n.target is torch.ops.aten.linear.default]
    assert list(tensor_attribute(compilation.ir, str(patches.args[1].target)).shape) == [
        8,
        model[0].weight[0].numel(),
    ]


def test_a_convolution_of_overlapping_cubes_stays_and_says_why() -> None:
    model = seeded(lambda: nn.Sequential(nn.Conv3d(3, 8, 3, padding=1)))
    compilation = canonical(model, noise(2, 3, 4, 4, 4))
    [remark] = remarks_of(compilation, "canonicalize", Kind.ANALYSIS)
    assert (remark.code, remark.layer) == ("patchify", "0")
    assert "kernel (3, 3, 3), stride (1, 1, 1)" in remark.reason


def test_the_rewritten_patch_embedding_takes_any_batch() -> None:
    model = seeded(Convolution, 2, 8, 4, stride=4)
    compilation = canonical(model, noise(2, 2, 8, 8))
    for count in (1, 5):
        batch = noise(count, 2, 8, 8)
        with torch.no_grad():
            torch.testing.assert_close(compilation.ir(batch), model(batch), **TOLERANCE)


REFUSED: dict[str, tuple[tuple[Any, ...], dict[str, Any], str]] = {
    "pointwise": ((4, 8, 1), {}, "a 1x1 convolution is a GEMM as it is"),
    "overlapping": (
        (2, 8, 3),
        {"stride": 2},
        "patches overlap or leave gaps: kernel (3, 3), stride (2, 2)",
    ),
    "with gaps": (
        (2, 8, 2),
        {"stride": 4},
        "patches overlap or leave gaps: kernel (2, 2), stride (4, 4)",
    ),
    "padded": ((2, 8, 4), {"stride": 4, "padding": 2}, "padded by [2, 2]"),
    "dilated": (
        (2, 8, 2),
        {"stride": 2, "dilation": 2},
        "dilation (2, 2), groups 1",
    ),
    "grouped": ((2, 8, 4), {"stride": 4, "groups": 2}, "dilation (1, 1), groups 2"),
    "with a rest": (
        (2, 8, 3),
        {"stride": 3},
        "image 8x8 is no multiple of the patch 3x3",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_another_convolution_stays_and_says_why(name: str) -> None:
    args, kwargs, reason = REFUSED[name]
    compilation = convolution(*args, **kwargs)
    assert "aten.conv2d.default" in targets(compilation)
    [remark] = remarks_of(compilation, "canonicalize", Kind.ANALYSIS)
    assert (remark.code, remark.layer) == ("patchify", "conv")
    assert remark.reason == f"left a convolution: {reason}"
    record = compilation.records[-1]
    assert (record.name, record.skipped) == ("canonicalize", 1)


class Computed(Convolution):
    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.conv.weight.tanh(), stride=4)


class Shared(Convolution):
    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x) + self.conv(2 * x)


def test_a_computed_weight_is_left_alone() -> None:
    compilation = canonical(seeded(Computed, 2, 8, 4, stride=4), noise(2, 2, 8, 8))
    [remark] = remarks_of(compilation, "canonicalize", Kind.ANALYSIS)
    assert remark.reason == "left a convolution: the weight is computed in the graph"


def test_a_shared_weight_is_left_alone_for_both_that_read_it() -> None:
    compilation = canonical(seeded(Shared, 2, 8, 4, stride=4), noise(2, 2, 8, 8))
    reasons = [remark.reason for remark in remarks_of(compilation, "canonicalize", Kind.ANALYSIS)]
    assert reasons == ["left a convolution: the weight is shared with another operator"] * 2


@pytest.mark.parametrize(("kind", "size"), [(nn.Conv1d, (3, 16)), (nn.Conv3d, (3, 4, 8, 12))])
def test_patches_padded_by_name_become_a_linear_on_any_axes(
    kind: Any, size: tuple[int, ...]
) -> None:
    model = seeded(lambda: nn.Sequential(kind(3, 8, 2, stride=2, padding="valid")))
    compilation = canonical(model, noise(2, *size))
    assert "aten.linear.default" in targets(compilation)
    assert not any("conv" in target for target in targets(compilation))


def test_a_convolution_that_pads_by_name_is_known_as_a_convolution() -> None:
    compilation = convolution(4, 8, 3, padding="same")
    assert "aten.conv2d.default" in targets(compilation)
    [remark] = remarks_of(compilation, "canonicalize", Kind.ANALYSIS)
    assert remark.reason.endswith("patches overlap or leave gaps: kernel (3, 3), stride (1, 1)")


def test_an_image_of_any_size_is_left_alone() -> None:
    model = seeded(Convolution, 2, 8, 4, stride=4)
    compilation = begin(model, noise(2, 2, 8, 8), make_rules())
    # Only the divisible sizes are legal inputs of this graph, so that torch can trace it.
    height = 4 * torch.export.Dim("rows", min=1, max=64)
    compilation.source.dynamic_shapes = ({0: torch.export.Dim("batch"), 2: height},)
    run_until(compilation, "canonicalize")
    [remark] = remarks_of(compilation, "canonicalize", Kind.ANALYSIS)
    assert "image size is not static" in remark.reason


# --- what a model makes and does not use ---------------------------------------------------------


class Answers(nn.Module):
    """One answer for each of three layers, stacked; of these one is returned."""

    def __init__(self, index: Any, axis: int = 0) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(6, 6) for _ in range(3))
        self.index, self.axis = index, axis

    def forward(self, x: Tensor) -> Tensor:
        answers = torch.stack([layer(x) for layer in self.layers], dim=self.axis)
        return answers[self.index]


@pytest.mark.parametrize(
    ("index", "axis", "left"),
    [
        (-1, 0, "layers.2"),
        ((slice(None), 1), 1, "layers.1"),
        ((slice(None), slice(None), 0), -2, "layers.0"),
    ],
)
def test_one_part_of_a_stack_needs_no_other(index: Any, axis: int, left: str) -> None:
    compilation = canonical(seeded(Answers, index, axis), noise(2, 5, 6))
    assert targets(compilation) == ["aten.linear.default"]
    weights = {name for name, _ in compilation.ir.named_parameters()}
    assert f"{left}.weight" in weights
    read = {str(node.target) for node in compilation.ir.graph.nodes if node.op == "get_attr"}
    assert read == {f"{left}.weight", f"{left}.bias"}


def test_a_selection_across_the_parts_of_a_stack_keeps_them() -> None:
    found = targets(canonical(seeded(Answers, (slice(None), 0), 0), noise(2, 5, 6)))
    assert found.count("aten.linear.default") == 3
    assert "aten.stack.default" in found


def test_a_slice_of_a_part_is_kept() -> None:
    class Cut(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x[:, :3] + x[:, -3:]

    found = targets(canonical(Cut(), noise(2, 6)))
    assert found == ["aten.slice.Tensor", "aten.slice.Tensor", "aten.add.Tensor"]


class Overwrites(nn.Module):
    """`x[...] = y`, with the form of `x` and with another."""

    def forward(self, x: Tensor) -> Tensor:
        y = x * 2
        y[:, :2] = x[:, 2:4]
        z = torch.zeros(4, 6, dtype=torch.float64)
        z.copy_(x[0])
        return y + z.float().sum()


def test_what_is_copied_takes_the_place_of_the_copy() -> None:
    found = targets(canonical(Overwrites(), noise(3, 6)))
    assert not any("copy" in target for target in found)
    assert "aten.expand_as.default" in found
