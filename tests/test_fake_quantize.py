"""Fake quantization computes what ONNX computes, bit for bit, and its scale learns as in LSQ."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper
from torch import Tensor

from gpusq_compile.quantization.fake_quantize import (
    ACTIVATION_RANGES,
    MIN_SCALE,
    WEIGHT_RANGES,
    FakeQuantize,
    IntegerRange,
    broadcastable,
    quantize_values,
)
from gpusq_compile.quantization.operators import DEQUANTIZE, QUANTIZE
from tests.models import noise

steady = settings(deadline=None)  # A busy machine is no failure.
WEIGHT = WEIGHT_RANGES["int8"]
ACTIVATION = ACTIVATION_RANGES["int8"]
FLOATS = st.floats(-300, 300, width=32, allow_subnormal=False)
SCALES = st.floats(2**-10, 4, width=32, allow_subnormal=False)


@lru_cache(maxsize=2)
def onnx_round_trip(per_channel: bool) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """QuantizeLinear and DequantizeLinear of opset 21 in ONNX Runtime: (levels, values)."""
    axis: dict[str, Any] = {"axis": 0} if per_channel else {}
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "s", "z"], ["levels"], **axis),
        helper.make_node("DequantizeLinear", ["levels", "s", "z"], ["values"], **axis),
    ]
    vector = ["n"] if per_channel else []
    float32, int8 = TensorProto.FLOAT, TensorProto.INT8
    graph = helper.make_graph(
        nodes,
        "round_trip",
        [
            helper.make_tensor_value_info("x", float32, ["n", "m"]),
            helper.make_tensor_value_info("s", float32, vector),
            helper.make_tensor_value_info("z", int8, vector),
        ],
        [
            helper.make_tensor_value_info("levels", int8, ["n", "m"]),
            helper.make_tensor_value_info("values", float32, ["n", "m"]),
        ],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), providers=["CPUExecutionProvider"]
    )

    def run(value: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
        zero = np.zeros(tuple(scale.shape), dtype=np.int8)
        found = session.run(None, {"x": value.numpy(), "s": scale.numpy(), "z": zero})
        return torch.from_numpy(found[0]), torch.from_numpy(found[1])

    return run


def quantizer(
    grid: IntegerRange, scale: Tensor, dtype: torch.dtype = torch.float32
) -> FakeQuantize:
    channels = scale.shape[0] if scale.ndim else None
    module = FakeQuantize(grid, channels=channels, scale_dtype=dtype)
    module.set_scale(scale)
    return module


@st.composite
def values_with_ties(draw: st.DrawFn, scale: float) -> Tensor:
    """[rows, columns]: arbitrary values, exact halves of a step, and far beyond the range."""
    rows, columns = draw(st.integers(1, 4)), draw(st.integers(1, 8))
    half_steps = st.integers(-300, 300).map(lambda k: (k + 0.5) * scale)
    entry = st.one_of(FLOATS, half_steps, st.sampled_from([0.0, -0.0, 1e30, -1e30]))
    row = st.lists(entry, min_size=columns, max_size=columns)
    return torch.tensor(draw(st.lists(row, min_size=rows, max_size=rows)), dtype=torch.float32)


def reference(value: float, scale: float, grid: IntegerRange) -> float:
    """The definition, in plain Python over float32: Python's `round` is half to even."""
    scaled = np.float32(value) / np.float32(scale)
    level = min(max(round(float(scaled)), grid.qmin), grid.qmax)
    return float(np.float32(level) * np.float32(scale))


@steady
@given(st.data(), SCALES)
def test_an_activation_is_rounded_as_defined(data: st.DataObject, scale: float) -> None:
    module = quantizer(ACTIVATION, torch.tensor(scale))
    step = module.exported_scale().item()
    value = data.draw(values_with_ties(step))
    found = module(value)
    for ours, original in zip(found.flatten().tolist(), value.flatten().tolist(), strict=True):
        assert ours == reference(original, step, ACTIVATION)


@steady
@given(st.data(), SCALES)
def test_an_activation_equals_onnx_runtime_bit_for_bit(data: st.DataObject, scale: float) -> None:
    module = quantizer(ACTIVATION, torch.tensor(scale))
    step = module.exported_scale().detach()
    value = data.draw(values_with_ties(step.item()))
    levels, values = onnx_round_trip(False)(value, step)
    assert torch.equal(QUANTIZE(value, step), levels)
    assert torch.equal(DEQUANTIZE(levels, step), values)
    assert torch.equal(module(value), values)


@steady
@given(st.data())
def test_a_weight_equals_onnx_runtime_bit_for_bit(data: st.DataObject) -> None:
    value = data.draw(values_with_ties(0.25))
    rows = len(value)
    module = quantizer(
        WEIGHT, torch.tensor(data.draw(st.lists(SCALES, min_size=rows, max_size=rows)))
    )
    scale = module.exported_scale().detach()
    # The symmetric range leaves out -128, which ONNX would use.
    inside = value.clamp(-127 * scale.unsqueeze(1), 127 * scale.unsqueeze(1))
    levels, values = onnx_round_trip(True)(inside, scale)
    assert torch.equal(quantize_values(inside, scale, WEIGHT), levels)
    assert torch.equal(DEQUANTIZE(levels, scale), values)
    assert torch.equal(module(inside), values)


def test_halves_are_rounded_to_even() -> None:
    value = torch.tensor([-2.5, -1.5, -0.5, 0.5, 1.5, 2.5])
    assert QUANTIZE(value, torch.tensor(1.0)).tolist() == [-2, -2, 0, 0, 2, 2]


def test_a_weight_never_reaches_minus_128_and_an_activation_does() -> None:
    low = torch.tensor([[-1000.0]])
    assert quantize_values(low, torch.tensor([1.0]), WEIGHT).item() == -127
    assert quantizer(ACTIVATION, torch.tensor(1.0))(low).item() == -128.0
    assert QUANTIZE(low, torch.tensor(1.0)).item() == -128


@steady
@given(st.lists(SCALES, min_size=1, max_size=8))
def test_zero_stays_zero_so_that_pruned_weights_stay_pruned(scales: list[float]) -> None:
    scale = torch.tensor(scales)
    zeros = torch.zeros(len(scales), 4)
    assert not quantizer(WEIGHT, scale, torch.float16)(zeros).any()
    assert not quantize_values(zeros, scale, WEIGHT).any()


@steady
@given(SCALES)
def test_what_trains_is_what_is_exported_a_scale_in_the_target_type(scale: float) -> None:
    module = quantizer(ACTIVATION, torch.tensor(scale), torch.float16)
    exported = module.exported_scale().detach()
    assert exported.item() == exported.half().float().item()
    assert exported.item() == pytest.approx(scale, rel=2**-10)
    value = torch.linspace(-1, 1, 64)
    assert torch.equal(module(value), DEQUANTIZE(QUANTIZE(value, exported), exported))


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_a_scale_is_always_positive_in_the_exported_type(dtype: torch.dtype) -> None:
    module = quantizer(ACTIVATION, torch.tensor(1.0), dtype)
    for dead in (0.0, 1e-30, -0.5):
        module.set_scale(torch.tensor(dead))
        assert module.scale.item() == pytest.approx(MIN_SCALE)
        assert module.exported_scale().to(dtype).item() > 0
    # However far a fine-tune takes it.
    with torch.no_grad():
        module.log_scale.fill_(-1000.0)
    assert module.exported_scale().to(dtype).item() > 0


def test_until_calibrated_values_pass_through() -> None:
    module = FakeQuantize(ACTIVATION, channels=None, scale_dtype=torch.float32)
    value = noise(3, 4)
    assert module(value) is value
    module.set_scale(torch.tensor(0.5))
    assert not torch.equal(module(value), value)


# --- gradients -----------------------------------------------------------------------------------


@st.composite
def gradient_cases(draw: st.DrawFn) -> tuple[FakeQuantize, Tensor, Tensor]:
    """(quantizer, value, weights of a linear loss); some values lie outside the range."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    rows, columns = draw(st.integers(1, 5)), draw(st.integers(1, 6))
    value = 3.0 * torch.randn(rows, columns, generator=generator)
    upstream = torch.randn(rows, columns, generator=generator)
    if draw(st.booleans()):
        scale = 0.005 + 0.05 * torch.rand(rows, generator=generator)
        return quantizer(WEIGHT, scale), value, upstream
    scale = 0.005 + 0.05 * torch.rand((), generator=generator)
    return quantizer(ACTIVATION, scale), value, upstream


def backward(module: FakeQuantize, value: Tensor, upstream: Tensor) -> tuple[Tensor, Tensor]:
    value = value.clone().requires_grad_()
    module.zero_grad()
    (module(value) * upstream).sum().backward()
    assert value.grad is not None
    assert module.log_scale.grad is not None
    # The parameter is the scale's logarithm: d(scale) = scale * d(log scale).
    return value.grad, module.log_scale.grad / module.scale.detach()


@steady
@given(gradient_cases())
def test_the_gradient_of_a_value_passes_inside_the_range_and_stops_outside(
    case: tuple[FakeQuantize, Tensor, Tensor],
) -> None:
    module, value, upstream = case
    found, _ = backward(module, value, upstream)
    scaled = value / broadcastable(module.scale.detach(), value)
    inside = (scaled >= module.grid.qmin) & (scaled <= module.grid.qmax)
    assert torch.equal(found, torch.where(inside, upstream, torch.zeros(())))


@steady
@given(gradient_cases())
def test_the_gradient_of_a_scale_is_that_of_learned_step_size_quantization(
    case: tuple[FakeQuantize, Tensor, Tensor],
) -> None:
    module, value, upstream = case
    _, found = backward(module, value, upstream)
    grid = module.grid
    scales = module.scale.detach()
    for index in range(max(1, scales.numel())):
        rows = slice(index, index + 1) if scales.ndim else slice(None)
        scale = float(scales[index] if scales.ndim else scales)
        total = 0.0
        for x, g in zip(
            value[rows].flatten().tolist(), upstream[rows].flatten().tolist(), strict=True
        ):
            position = float(np.float32(x) / np.float32(scale))
            if position < grid.qmin:
                slope = float(grid.qmin)
            elif position > grid.qmax:
                slope = float(grid.qmax)
            else:
                slope = round(position) - position
            total += g * slope
        # A weight's step serves its channel; an activation's, the features of one sample.
        elements = value.shape[1]
        expected = total / (elements * grid.qmax) ** 0.5
        assert found.flatten()[index].item() == pytest.approx(expected, rel=1e-3, abs=1e-4)


@steady
@given(gradient_cases())
def test_the_gradient_of_a_scale_agrees_with_finite_differences(
    case: tuple[FakeQuantize, Tensor, Tensor],
) -> None:
    """With the levels held, the output's derivative by the scale is the level; the straight-through
    estimator takes from it `x / scale` for every value inside the range."""
    module, value, upstream = case
    _, found = backward(module, value, upstream)
    scale = module.scale.detach()
    levels = (value / broadcastable(scale, value)).round().clamp(module.grid.qmin, module.grid.qmax)

    def loss(step: Tensor) -> Tensor:
        return (
            (levels.double() * broadcastable(step, value) * upstream)
            .reshape(max(1, scale.numel()), -1)
            .sum(dim=1)
        )

    width = 1e-6
    numeric = (loss(scale.double() + width) - loss(scale.double() - width)) / (2 * width)
    scaled = value / broadcastable(scale, value)
    inside = (scaled >= module.grid.qmin) & (scaled <= module.grid.qmax)
    through = (upstream * scaled * inside).reshape(max(1, scale.numel()), -1).sum(dim=1)
    expected = (numeric - through) / (value.shape[1] * module.grid.qmax) ** 0.5
    torch.testing.assert_close(found.flatten(), expected.float().flatten(), rtol=1e-2, atol=1e-3)


def test_rounding_the_scale_to_its_exported_type_keeps_its_gradient() -> None:
    value = torch.linspace(-2, 2, 32).reshape(4, 8)
    upstream = torch.arange(32.0).reshape(4, 8)
    exact = backward(quantizer(ACTIVATION, torch.tensor(0.125)), value, upstream)[1]
    rounded = backward(quantizer(ACTIVATION, torch.tensor(0.125), torch.float16), value, upstream)[
        1
    ]
    assert exact.item() != 0.0
    assert rounded.item() == exact.item()


def straight_through(module: FakeQuantize, value: Tensor, log_scale: Tensor) -> Tensor:
    """The definition of LSQ in plain operators, for autograd to differentiate."""
    scale = log_scale.exp()
    # The scale's type rounds it in the forward pass and passes its gradient through.
    scale = scale * (module.exported_scale() / scale).detach()
    elements = value[0].numel()
    share = (elements * module.grid.qmax) ** -0.5
    scale = scale * share + (scale * (1 - share)).detach()
    divisor = broadcastable(scale, value)
    clipped = (value / divisor).clamp(module.grid.qmin, module.grid.qmax)
    return (clipped + (clipped.round() - clipped).detach()) * divisor


@st.composite
def layers(draw: st.DrawFn) -> tuple[FakeQuantize, Tensor, Tensor]:
    """(quantizer of any grid, value [2 to 4 axes], upstream gradient); values in float64."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    shape = draw(st.lists(st.integers(1, 4), min_size=2, max_size=4))
    value = 3.0 * torch.randn(shape, generator=generator, dtype=torch.float64)
    upstream = torch.randn(shape, generator=generator, dtype=torch.float64)
    dtype = draw(st.sampled_from([torch.float16, torch.float32]))
    bits = draw(st.sampled_from(["int8", "int4"]))
    steps = {"int8": 0.02, "int4": 0.4}[bits]
    if draw(st.booleans()):
        scale = steps * (0.1 + torch.rand(shape[0], generator=generator))
        return quantizer(WEIGHT_RANGES[bits], scale, dtype), value, upstream
    scale = steps * (0.1 + torch.rand((), generator=generator))
    return quantizer(ACTIVATION_RANGES[bits], scale, dtype), value, upstream


@steady
@given(layers())
def test_output_and_gradients_equal_plain_operators_with_straight_through_rounding(
    layer: tuple[FakeQuantize, Tensor, Tensor],
) -> None:
    module, value, upstream = layer
    ours, theirs = value.clone().requires_grad_(), value.clone().requires_grad_()
    log_scale = module.log_scale.detach().double().requires_grad_()
    found, expected = module(ours), straight_through(module, theirs, log_scale)
    (found * upstream).sum().backward()
    (expected * upstream).sum().backward()
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-9)
    assert ours.grad is not None
    assert theirs.grad is not None
    assert module.log_scale.grad is not None
    assert log_scale.grad is not None
    torch.testing.assert_close(module.log_scale.grad.double(), log_scale.grad, rtol=1e-4, atol=1e-5)


@steady
@given(layers(), st.sampled_from([torch.float16, torch.bfloat16]))
def test_half_types_get_the_levels_and_gradients_of_the_float32_computation(
    layer: tuple[FakeQuantize, Tensor, Tensor], dtype: torch.dtype
) -> None:
    module, value, upstream = layer
    half, grad = value.to(dtype), upstream.to(dtype)
    found = module(half.requires_grad_())
    assert found.dtype == dtype
    found.backward(grad)
    scale_gradient = module.log_scale.grad
    wide = half.detach().float().requires_grad_()
    module.zero_grad()
    expected = module(wide)
    expected.backward(grad.float())
    assert wide.grad is not None
    assert half.grad is not None
    assert torch.equal(found, expected.to(dtype))
    assert half.grad.dtype == dtype
    assert torch.equal(half.grad, wide.grad.to(dtype))
    assert scale_gradient is not None
    assert module.log_scale.grad is not None
    assert scale_gradient.dtype == torch.float32
    torch.testing.assert_close(scale_gradient, module.log_scale.grad, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_autocast_leaves_levels_and_gradients_as_they_are(dtype: torch.dtype) -> None:
    for module in (
        quantizer(ACTIVATION, torch.tensor(0.02)),
        quantizer(WEIGHT, torch.tensor([0.01, 0.02, 0.03])),
    ):
        value, upstream = noise(3, 64), noise(3, 64)
        plain = [module(value), *backward(module, value, upstream)]
        with torch.autocast("cpu", dtype):
            cast = [module(value), *backward(module, value, upstream)]
        for without, under in zip(plain, cast, strict=True):
            assert torch.equal(without, under)


@steady
@given(SCALES, st.integers(-4, 4), st.sampled_from(["int8", "int4"]), st.booleans())
def test_the_range_ends_exactly_where_the_quotient_leaves_it(
    scale: float, ulps: int, bits: str, above: bool
) -> None:
    """Within a few units in the last place of either end, on either side."""
    module = quantizer(ACTIVATION_RANGES[bits], torch.tensor(scale))
    step = module.exported_scale()
    end = step * (module.grid.qmax if above else module.grid.qmin)
    for _ in range(abs(ulps)):
        end = torch.nextafter(end, torch.tensor(math.copysign(math.inf, ulps)))
    value = end.reshape(1, 1)
    found, _ = backward(module, value, torch.ones(1, 1))
    quotient = value / step
    inside = (quotient >= module.grid.qmin) & (quotient <= module.grid.qmax)
    assert torch.equal(found, inside.float())


def test_a_scale_learns_without_a_gradient_of_the_value_and_the_other_way_round() -> None:
    module = quantizer(ACTIVATION, torch.tensor(0.02))
    value, upstream = noise(4, 32), noise(4, 32)
    both = backward(module, value, upstream)
    module.zero_grad()
    (module(value) * upstream).sum().backward()
    assert module.log_scale.grad is not None
    assert torch.equal(module.log_scale.grad / module.scale.detach(), both[1])
    module.requires_grad_(False)
    trained = value.clone().requires_grad_()
    (module(trained) * upstream).sum().backward()
    assert trained.grad is not None
    assert torch.equal(trained.grad, both[0])


def test_the_layout_of_a_value_in_memory_does_not_matter() -> None:
    module = quantizer(ACTIVATION, torch.tensor(0.02))
    value, upstream = noise(4, 6, 8), noise(4, 6, 8)
    turned = value.transpose(1, 2).contiguous().transpose(1, 2)
    assert not turned.is_contiguous()
    plain, other = backward(module, value, upstream), backward(module, turned, upstream)
    assert torch.equal(module(value), module(turned))
    assert torch.equal(plain[0], other[0])
    torch.testing.assert_close(plain[1], other[1])


def test_torch_compile_takes_it_without_a_graph_break() -> None:
    for module in (
        quantizer(ACTIVATION, torch.tensor(0.02)),
        quantizer(WEIGHT, torch.tensor([0.01, 0.02, 0.03])),
    ):
        value, upstream = noise(3, 64), noise(3, 64)
        plain = backward(module, value, upstream)
        module.compile(backend="aot_eager", fullgraph=True)
        compiled = backward(module, value, upstream)
        torch.testing.assert_close(compiled, plain)


def test_a_scale_below_the_smallest_still_learns() -> None:
    module = quantizer(ACTIVATION, torch.tensor(MIN_SCALE))
    with torch.no_grad():
        module.log_scale.sub_(1.0)
    value = MIN_SCALE * noise(2, 32)
    (module(value) * value).sum().backward()
    assert module.log_scale.grad is not None
    assert module.log_scale.grad.item() != 0.0


# --- the integer operators -----------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(3,), (2, 3, 4), (0, 4)])
def test_the_operators_keep_torchs_contract_for_custom_operators(shape: tuple[int, ...]) -> None:
    checks = ("test_schema", "test_faketensor")
    value = noise(*shape)
    levels = torch.zeros(shape, dtype=torch.int8)
    torch.library.opcheck(QUANTIZE, (value, torch.tensor(0.5)), test_utils=checks)
    torch.library.opcheck(DEQUANTIZE, (levels, torch.tensor(0.5)), test_utils=checks)
    torch.library.opcheck(DEQUANTIZE, (levels, torch.ones(shape[0])), test_utils=checks)


def test_dequantize_gives_values_in_the_scales_type() -> None:
    levels = torch.tensor([[1, -2], [3, 4]], dtype=torch.int8)
    scale = torch.tensor([0.5, 2.0], dtype=torch.float16)
    found = DEQUANTIZE(levels, scale)
    assert found.dtype == torch.float16
    assert found.tolist() == [[0.5, -1.0], [6.0, 8.0]]
