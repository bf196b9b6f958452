"""What cannot be compiled is refused at the model's own line, and nothing was done in vain."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir
import pytest
import torch
import torch.nn.functional as F
from onnx import TensorProto, helper
from onnx_ir.passes.common import TopologicalSortPass
from onnxruntime.transformers.float16 import convert_float_to_float16
from torch import Tensor, nn

from gpusq_compile.driver import run_passes
from gpusq_compile.errors import CheckFailed, InputError, Location
from gpusq_compile.graph.query import place_in
from gpusq_compile.lowering.precision import float32_only, to_half
from gpusq_compile.lowering.runtime import open_session, placed, run_session
from gpusq_compile.pass_base import Pass, PassResult
from gpusq_compile.passes.build_engine import WAY_OUT
from tests.compilations import begin, make_rules, outputs, run_until, targets
from tests.models import noise, seeded

NOTHING: dict[str, Any] = {"id": "all", "match": {"op": "linear"}, "quantize": "none"}


class Odd(nn.Module):
    """Two linears with `odd` between them."""

    def __init__(self, odd: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(32, 32), nn.Linear(32, 32)
        self.odd = odd

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.odd(self.first(x)))


def by_svd(x: Tensor) -> Tensor:
    return torch.linalg.svd(x, full_matrices=False)[2]


def by_solving(x: Tensor) -> Tensor:
    return torch.linalg.solve(torch.eye(32) * 2, x.mT).mT


def by_bessel(x: Tensor) -> Tensor:
    return torch.special.bessel_j0(x)


def by_distances(x: Tensor) -> Tensor:
    return torch.cdist(x, x) @ x


def by_a_number(x: Tensor) -> Tensor:
    return x / x.abs().max().item()


def by_a_branch(x: Tensor) -> Tensor:
    return -x if x.mean() > 0 else x


def by_a_loop(x: Tensor) -> Tensor:
    for _ in range(int(x.abs().max())):
        x = x + 1
    return x


def by_numpy(x: Tensor) -> Tensor:
    return torch.from_numpy(x.numpy() + 1)


def by_a_histogram(x: Tensor) -> Tensor:
    return x * torch.histc(x, bins=8).softmax(0)[0]


ORDER = torch.tensor([0, 2, 1, 0])


def by_adding(x: Tensor) -> Tensor:
    return torch.zeros_like(x).index_add(1, ORDER, x)


def by_scattering(reduce: str, includes_self: bool) -> Callable[[Tensor], Tensor]:
    def scatter(x: Tensor) -> Tensor:
        index = ORDER[None, :, None].expand_as(x)
        return x.scatter_reduce(1, index, 2 * x - 1, reduce, include_self=includes_self)

    return scatter


def by_sample(x: Tensor) -> Tensor:
    return torch.stack([row * 2 for row in x])


CASES: list[tuple[Callable[[Tensor], Tensor], str, str, str]] = [
    (by_svd, "operator-unsupported", "'linalg_svd'", "--scope"),
    (by_solving, "operator-unsupported", "'linalg_solve'", "--scope"),
    (by_bessel, "operator-unsupported", "'special_bessel_j0'", "--scope"),
    (by_distances, "operator-unsupported", "'cdist'", "--scope"),
    (by_a_histogram, "operator-unsupported", "'histc'", "--scope"),
    (by_a_number, "operator-unsupported", "a Python number of a tensor's value", ".item()"),
    (by_a_branch, "export-failed", "Python control flow", "torch.where"),
    (by_a_loop, "export-failed", "Python control flow", "--scope"),
    (by_numpy, "export-failed", "numpy", "--scope"),
    (by_sample, "export-failed", "one batch size alone", "x.shape[0]"),
]


def lines_of(function: Callable[..., Any]) -> set[int]:
    """The lines of a function. A trace keeps those of `forward` methods, an error all."""
    lines, start = inspect.getsourcelines(function)
    return set(range(start, start + len(lines)))


@pytest.mark.parametrize(
    ("odd", "code", "message", "hint"), CASES, ids=[case[0].__name__ for case in CASES]
)
def test_it_names_the_operator_the_line_and_the_way_out(
    odd: Callable[[Tensor], Tensor], code: str, message: str, hint: str
) -> None:
    with pytest.raises(InputError) as caught:
        run_until(begin(seeded(Odd, odd), noise(2, 4, 32), make_rules()), "canonicalize")
    error = caught.value
    assert error.code == code
    assert message in error.message
    assert hint in (error.hint or "")
    if odd is by_sample:
        return  # The batch is met everywhere.
    assert error.location is not None
    assert error.location.file.endswith(Path(__file__).name)
    assert error.location.line in lines_of(odd) | lines_of(Odd.forward)


def test_a_line_of_the_model_is_preferred_to_one_of_a_library(tmp_path: Path) -> None:
    own = tmp_path / "model.py"
    library = "/usr/lib/python3/site-packages/vision/layers.py"
    inner = "/usr/lib/python3/site-packages/torch/nn/modules/linear.py"

    def trace(*files: Any) -> str:
        return "\n".join(f'  File "{f}", line {i}, in forward' for i, f in enumerate(files, 1))

    assert place_in(trace(own, library, inner)) == Location(str(own), 1)
    assert place_in(trace(library, library, inner)) == Location(library, 2)
    assert place_in("") is None


def test_an_error_of_the_builder_gets_the_line_that_its_node_is_from() -> None:
    places = {"node_DFT": Location("m.py", 3), "node_DFT_1": Location("m.py", 4)}
    for text, line in (("at node 'node_DFT_1' (DFT)", 4), ("node_DFT_1_35 has no runners", 4)):
        found = placed(CheckFailed("engine-parse-failed", text), places, WAY_OUT)
        assert (found.location, found.code) == (Location("m.py", line), "engine-parse-failed")
        assert "--engine none" in (found.hint or "")
    unknown = CheckFailed("engine-build-failed", "out of memory", hint="buy more")
    assert placed(unknown, places, WAY_OUT) is unknown


def halve_blindly(compilation: Any) -> PassResult:
    """The conversion without what it knows of scatters."""
    half = ir.from_proto(convert_float_to_float16(compilation.onnx_model, keep_io_types=True))
    TopologicalSortPass()(half)
    compilation.onnx_model = ir.to_proto(half)
    return PassResult(changed=1)


def test_what_the_runtime_cannot_run_after_a_pass_fails_at_the_line_it_is_from() -> None:
    compilation = run_until(begin(seeded(Odd, by_adding), noise(2, 4, 32), make_rules()), "surgery")
    halve = Pass(name="halve", summary="halve", run=halve_blindly, rewrites_onnx=True)
    with pytest.raises(CheckFailed) as caught:
        run_passes(compilation, [halve])
    error = caught.value
    assert (error.code, error.exit_code) == ("onnxruntime", 1)
    assert "reduction is 'add'" in error.message
    assert "\n" not in error.message
    assert error.location is not None
    assert error.location.line in lines_of(by_adding) | lines_of(Odd.forward)
    assert "--scope" in (error.hint or "")


def resizing() -> onnx.ModelProto:
    """Two Resize nodes that share their scales."""
    nodes = [
        helper.make_node("Resize", ["x", "", "scales"], ["a"], name="one", mode="linear"),
        helper.make_node("Resize", ["a", "", "scales"], ["y"], name="two", mode="linear"),
    ]
    scales = helper.make_tensor("scales", TensorProto.FLOAT, [4], [1.0, 1.0, 2.0, 2.0])
    ends = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, 1, size, size])
        for name, size in (("x", 2), ("y", 8))
    ]
    graph = helper.make_graph(nodes, "resizing", ends[:1], ends[1:], [scales])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)])


def test_two_that_share_their_scales_are_both_converted_to_fp16() -> None:
    half = to_half(resizing())
    onnx.checker.check_model(half, full_check=True)
    resizes = [node for node in half.graph.node if node.op_type == "Resize"]
    assert len({node.input[2] for node in resizes}) == 2


def test_zeros_of_a_shape_become_half_where_no_value_is_said() -> None:
    nodes = [
        helper.make_node("Shape", ["x"], ["sizes"]),
        helper.make_node("ConstantOfShape", ["sizes"], ["zeros"], name="zeros"),
        helper.make_node("Add", ["x", "zeros"], ["y"]),
    ]
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [2, 3]) for name in "xy"]
    known = [helper.make_tensor_value_info("zeros", TensorProto.FLOAT, None)]
    graph = helper.make_graph(nodes, "zeros", ends[:1], ends[1:], value_info=known)
    half = to_half(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)]))
    onnx.checker.check_model(half, full_check=True)
    (fill,) = [node for node in half.graph.node if node.op_type == "ConstantOfShape"]
    assert fill.attribute[0].t.data_type == TensorProto.FLOAT16


REDUCTIONS = [
    (reduce, includes_self)
    for reduce in ("sum", "mean", "prod", "amax", "amin")
    for includes_self in (True, False)
]


@pytest.mark.parametrize(("reduce", "includes_self"), REDUCTIONS)
def test_what_a_scatter_combines_is_the_same_in_the_file(
    reduce: str, includes_self: bool, tmp_path: Path
) -> None:
    model = seeded(Odd, by_scattering(reduce, includes_self))
    images = noise(2, 4, 32)
    expected = model(images)
    given = begin(model, images, make_rules(NOTHING, precision="fp16"), tmp_path)
    compilation = run_until(given, "set_precision")
    assert compilation.onnx_model is not None
    [found] = run_session(open_session(compilation.onnx_model.SerializeToString()), [images])
    torch.testing.assert_close(found, expected, rtol=2e-2, atol=2e-2)


def test_a_mean_whose_sum_half_has_no_room_for_is_finite_at_every_step(tmp_path: Path) -> None:
    def mean(x: Tensor) -> Tensor:
        large = 4500.0 + x.flatten(1)
        index = torch.zeros_like(large, dtype=torch.int64)[:, 1:]
        start = torch.zeros_like(x[:, :, 0])
        found = start.scatter_reduce(1, index, large, "mean", include_self=False)
        return x + found.unsqueeze(-1) / 4500.0

    check_halves(mean, tmp_path)


def by_hand(x: Tensor) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt()


SQUARES: dict[str, Callable[[Tensor], Tensor]] = {
    "RMSNorm": nn.RMSNorm(32),
    "a variance": by_hand,
    "a norm": lambda x: F.normalize(x, dim=-1),
    "a norm with a root": lambda x: x / (x * x).sum(-1, keepdim=True).sqrt(),
}


@pytest.mark.parametrize("how", SQUARES)
def test_squares_that_half_has_no_room_for_are_finite_at_every_step(
    how: str, tmp_path: Path
) -> None:
    def large(x: Tensor) -> Tensor:
        return SQUARES[how](400.0 * x)

    check_halves(large, tmp_path)


def check_halves(compute: Callable[[Tensor], Tensor], workdir: Path) -> None:
    """Compile to FP16, and look whether each value in half is finite and the output right."""
    pixels = noise(2, 4, 32)
    given = begin(seeded(Odd, compute), pixels, make_rules(NOTHING, precision="fp16"), workdir)
    expected = given.network.root(pixels)
    model = run_until(given, "set_precision").onnx_model
    assert model is not None
    kinds = {v.name: v.type.tensor_type.elem_type for v in model.graph.value_info}
    halves = [
        name
        for node in model.graph.node
        for name in node.output
        if kinds.get(name) == TensorProto.FLOAT16
    ]
    assert halves
    # Asked for as an output, a value has the type that the file says.
    for name in halves:
        model.graph.output.append(helper.make_tensor_value_info(name, TensorProto.FLOAT16, None))
    session = open_session(model.SerializeToString(), runs=1)
    result, *steps = run_session(session, [pixels])
    torch.testing.assert_close(result, expected, rtol=1e-2, atol=1e-2)
    for found in steps:
        assert bool(found.isfinite().all())


@pytest.mark.parametrize("reduce", ["amax", "amin"])
def test_the_largest_of_nothing_but_infinities_is_one_in_the_file_too(
    reduce: str, tmp_path: Path
) -> None:
    lost = -torch.inf if reduce == "amax" else torch.inf

    def segments(x: Tensor) -> Tensor:
        index = torch.zeros_like(x, dtype=torch.int64)
        source = x.masked_fill(x > -torch.inf, lost)
        found = x.scatter_reduce(2, index, source, reduce, include_self=False)
        return torch.where(found == lost, 2.0, found)

    model = seeded(Odd, segments)
    pixels = noise(2, 4, 32)
    compilation = run_until(begin(model, pixels, make_rules(NOTHING), tmp_path), "trace")
    expected = outputs(compilation)[0]
    run_until(compilation, "canonicalize")
    assert "aten.where.self" in targets(compilation)
    assert torch.equal(outputs(compilation)[0], expected)


@pytest.mark.parametrize("how", ["scatter", "scatter_add", "scatter_reduce"])
def test_a_source_larger_than_its_index_is_cut(how: str, tmp_path: Path) -> None:
    def scatter(x: Tensor) -> Tensor:
        index = torch.arange(16).expand(2, 3, 16)
        rest = ("amax",) if how == "scatter_reduce" else ()
        return getattr(x, how)(2, index, 2 * x, *rest)

    model = seeded(Odd, scatter)
    pixels = noise(2, 4, 32)
    compilation = run_until(begin(model, pixels, make_rules(NOTHING), tmp_path), "set_precision")
    assert compilation.onnx_model is not None
    [found] = run_session(open_session(compilation.onnx_model.SerializeToString()), [pixels])
    torch.testing.assert_close(found, model(pixels), rtol=1e-4, atol=1e-4)


def test_a_mean_of_integers_is_refused_with_its_line() -> None:
    def mean(x: Tensor) -> Tensor:
        whole = (100 * x[:, :, 0]).long()
        index = torch.zeros_like(whole)
        return x + whole.scatter_reduce(1, index, whole, "mean").unsqueeze(-1)

    with pytest.raises(InputError) as caught:
        run_until(begin(seeded(Odd, mean), noise(2, 4, 32), make_rules(NOTHING)), "canonicalize")
    assert caught.value.code == "operator-unsupported"
    assert "no mean of torch.int64 values" in caught.value.message
    assert "test_exportable.py:" in str(caught.value.location)


def test_sums_of_what_meets_at_one_place_stay_in_float32(tmp_path: Path) -> None:
    given = begin(
        seeded(Odd, by_adding), noise(2, 4, 32), make_rules(NOTHING, precision="fp16"), tmp_path
    )
    model = run_until(given, "set_precision").onnx_model
    assert model is not None
    makers = {name: node for node in model.graph.node for name in node.output}
    [scatter] = [node for node in model.graph.node if node.op_type == "ScatterND"]
    for name in (scatter.input[0], scatter.input[2]):
        assert makers[name].op_type == "Cast"
        assert helper.get_attribute_value(makers[name].attribute[0]) == TensorProto.FLOAT


def test_a_tensor_that_two_float32_operators_read_is_cast_once() -> None:
    nodes = [
        helper.make_node("Mul", ["x", "x"], ["y"]),
        helper.make_node("ScatterElements", ["y", "i", "y"], ["a"], axis=0, reduction="add"),
        helper.make_node("ScatterElements", ["y", "i", "a"], ["z"], axis=0, reduction="mul"),
    ]
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [2]) for name in "xzya"]
    index = helper.make_tensor("i", TensorProto.INT64, [2], [1, 1])
    graph = helper.make_graph(nodes, "sums", ends[:1], ends[1:2], [index], value_info=ends[2:])
    opset = [helper.make_opsetid("", 21)]
    half = to_half(helper.make_model(graph, opset_imports=opset, ir_version=10))
    onnx.checker.check_model(half, full_check=True)
    [found] = run_session(open_session(half.SerializeToString()), [torch.tensor([1.0, 2.0])])
    # y = [1, 4], a = [1, 4 + 1 + 4], z = [1, 4 * 1 * 9].
    assert found.tolist() == [1.0, 36.0]


def test_operators_without_fp16_are_known_from_the_standard() -> None:
    found = float32_only({"NonMaxSuppression", "MatMul", "Resize", "Gather", "NoSuchOperator"})
    assert found == ["NonMaxSuppression"]
