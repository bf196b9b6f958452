"""Scales for blocks of input channels: the same arithmetic as one per channel, block by block."""

from __future__ import annotations

import numpy as np
import onnxruntime
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor

from gpusq_compile.lowering.int4 import store_as_int4
from gpusq_compile.obs import Grid, sweep
from gpusq_compile.quantization.calibrate import weight_scale
from gpusq_compile.quantization.fake_quantize import (
    MIN_SCALE,
    WEIGHT_RANGES,
    FakeQuantize,
    broadcastable,
    quantize_values,
)
from gpusq_compile.quantization.operators import DEQUANTIZE
from gpusq_compile.sparsity import PATTERNS, magnitude_mask, violations
from tests.models import noise
from tests.moments import inverse_factor, output_error

steady = settings(deadline=None)  # A busy machine is no failure.
GRID = WEIGHT_RANGES["int4"]


def quantizer(scale: Tensor, dtype: torch.dtype = torch.float32) -> FakeQuantize:
    module = FakeQuantize(GRID, channels=len(scale), blocks=scale.shape[1], scale_dtype=dtype)
    module.set_scale(scale)
    return module


@st.composite
def weights(draw: st.DrawFn) -> tuple[Tensor, int]:
    """(weight [out, in], number of blocks), some blocks and entries zero, some far larger."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    out, blocks, block = draw(st.integers(1, 4)), draw(st.integers(1, 5)), draw(st.integers(1, 6))
    weight = torch.randn(out, blocks, block, generator=generator)
    weight *= 10.0 ** torch.randint(-3, 3, (out, blocks, 1), generator=generator)
    weight[torch.rand(out, blocks, generator=generator) < 0.2] = 0.0
    weight[torch.rand(weight.shape, generator=generator) < 0.2] = 0.0
    return weight.reshape(out, blocks * block), blocks


@steady
@given(weights(), st.sampled_from(["max", "mse"]), st.sampled_from([torch.float16, torch.float32]))
def test_each_block_is_quantized_as_a_weight_of_its_own(
    case: tuple[Tensor, int], method: str, dtype: torch.dtype
) -> None:
    weight, blocks = case
    scale = weight_scale(weight, method, GRID.qmax, blocks)
    assert scale.shape == (len(weight), blocks)
    found = quantizer(scale, dtype)(weight)
    for index, part in enumerate(weight.chunk(blocks, dim=1)):
        alone = FakeQuantize(GRID, channels=len(weight), scale_dtype=dtype)
        alone.set_scale(weight_scale(part, method, GRID.qmax))
        assert torch.equal(found.chunk(blocks, dim=1)[index], alone(part))


@steady
@given(weights(), st.sampled_from([torch.float16, torch.float32]))
def test_levels_and_scales_give_what_was_trained_with_every_error_below_half_a_step(
    case: tuple[Tensor, int], dtype: torch.dtype
) -> None:
    weight, blocks = case
    module = quantizer(weight_scale(weight, "max", GRID.qmax, blocks), dtype)
    scale = module.exported_scale()
    levels = quantize_values(weight, scale, GRID)
    assert levels.dtype == torch.int8
    assert int(levels.abs().max()) <= 7
    assert torch.equal(DEQUANTIZE(levels, scale), module(weight))
    assert not levels[weight == 0].any()
    steps = broadcastable(scale, weight)
    assert steps.shape == weight.shape
    # A scale rounded down to FP16 clips the largest value by as little.
    error = (module(weight) - weight).abs() / steps
    assert error.max() <= 0.5 + 7 * 2.0**-10 + 1e-3


def test_a_dead_block_gets_the_smallest_scale_and_its_neighbours_their_own() -> None:
    weight = noise(3, 8)
    weight[1, 4:] = 0.0
    module = quantizer(weight_scale(weight, "mse", GRID.qmax, 2), torch.float16)
    scale = module.exported_scale()
    assert scale.shape == (3, 2)
    assert scale[1, 1].item() == pytest.approx(MIN_SCALE)
    assert bool((scale > 0).all())
    assert scale.half().float().equal(scale)
    assert not module(weight)[1, 4:].any()
    assert scale[1, 0] > 100 * MIN_SCALE


def plain(value: Tensor, log_scale: Tensor, exported: Tensor) -> Tensor:
    """LSQ with a scale for each block, in plain operators for autograd to differentiate."""
    out, size = value.shape
    blocks = log_scale.shape[1]
    scale = log_scale.exp()
    scale = scale * (exported / scale).detach()
    share = (size / blocks * GRID.qmax) ** -0.5
    scale = scale * share + (scale * (1 - share)).detach()
    divisor = scale.unsqueeze(2).expand(out, blocks, size // blocks).reshape(out, size)
    clipped = (value / divisor).clamp(GRID.qmin, GRID.qmax)
    return (clipped + (clipped.round() - clipped).detach()) * divisor


@steady
@given(weights(), st.integers(0, 2**32), st.sampled_from([torch.float16, torch.float32]))
def test_gradients_equal_those_of_plain_operators_in_float64(
    case: tuple[Tensor, int], seed: int, dtype: torch.dtype
) -> None:
    weight, blocks = case
    generator = torch.Generator().manual_seed(seed % 2**32)
    value = weight.double()
    upstream = torch.randn(value.shape, generator=generator, dtype=torch.float64)
    # Narrower than the weights, so that some of them lie outside of the range.
    module = quantizer(0.6 * weight_scale(weight, "max", GRID.qmax, blocks), dtype).double()
    ours, theirs = value.clone().requires_grad_(), value.clone().requires_grad_()
    log_scale = module.log_scale.detach().clone().requires_grad_()
    found = module(ours)
    expected = plain(theirs, log_scale, module.exported_scale())
    (found * upstream).sum().backward()
    (expected * upstream).sum().backward()
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)
    assert module.log_scale.grad is not None
    assert log_scale.grad is not None
    assert module.log_scale.grad.shape == (len(weight), blocks)
    torch.testing.assert_close(module.log_scale.grad, log_scale.grad, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-9, atol=1e-12)


# --- GPTQ ----------------------------------------------------------------------------------------


def correlated(rows: int, columns: int, seed: int = 0) -> Tensor:
    hidden = noise(rows, columns // 4, seed=seed) @ noise(columns // 4, columns, seed=99)
    return hidden + 0.3 * noise(rows, columns, seed=seed + 1000)


@pytest.mark.parametrize(("pruned", "share"), [(False, 0.8), (True, 1.0)])
@torch.no_grad()
def test_gptq_puts_each_column_onto_the_grid_of_its_block_and_loses_less_at_the_output(
    pruned: bool, share: float
) -> None:
    weight, inputs = noise(16, 256), correlated(1024, 256)
    weight[:, 128:] *= 20.0
    mask = magnitude_mask(weight, PATTERNS["2:4"]) if pruned else None
    kept = weight if mask is None else weight * mask
    module = quantizer(weight_scale(kept, "mse", GRID.qmax, 4))
    grid = Grid(module.exported_scale(), GRID)
    moments = inputs.T @ inputs
    result, _ = sweep(kept, inverse_factor(moments, 0.01), mask=mask, grid=grid)
    assert torch.equal(module(result), result)
    assert torch.equal(grid.nearest(result), result)
    if mask is not None:
        assert violations(result, PATTERNS["2:4"]) == 0
    nearest = output_error(kept, module(kept), moments)
    assert output_error(kept, result, moments) < share * nearest


def test_gptq_with_a_scale_for_all_blocks_alike_is_gptq_with_one_per_channel() -> None:
    weight, inputs = noise(8, 64), correlated(256, 64)
    scale = weight_scale(weight, "max", GRID.qmax)
    moments = inputs.T @ inputs
    one, _ = sweep(weight, inverse_factor(moments, 0.01), grid=Grid(scale, GRID))
    same, _ = sweep(
        weight, inverse_factor(moments, 0.01), grid=Grid(scale.unsqueeze(1).repeat(1, 4), GRID)
    )
    assert torch.equal(one, same)


# --- the ONNX file -------------------------------------------------------------------------------


@steady
@given(weights(), st.booleans(), st.sampled_from([TensorProto.FLOAT, TensorProto.FLOAT16]))
def test_onnx_runtime_computes_the_packed_blocks_bit_for_bit(
    case: tuple[Tensor, int], transposed: bool, dtype: int
) -> None:
    """[out, in] as in a Gemm with blocks along axis 1, and [K, N] as in a MatMul along axis 0."""
    weight, blocks = case
    half = torch.float16 if dtype == TensorProto.FLOAT16 else torch.float32
    scale = weight_scale(weight, "max", GRID.qmax, blocks).clamp_min(MIN_SCALE).to(half)
    levels = quantize_values(weight, scale.float(), GRID)
    expected = DEQUANTIZE(levels, scale)
    stored, scales = (levels.T, scale.T) if transposed else (levels, scale)
    node = helper.make_node(
        "DequantizeLinear",
        ["w", "s"],
        ["y"],
        axis=0 if transposed else 1,
        block_size=weight.shape[1] // blocks,
    )
    model = helper.make_model(
        helper.make_graph(
            [node],
            "blocks",
            [],
            [helper.make_tensor_value_info("y", dtype, list(stored.shape))],
            [
                numpy_helper.from_array(np.ascontiguousarray(stored.numpy()), "w"),
                numpy_helper.from_array(np.ascontiguousarray(scales.numpy()), "s"),
            ],
        ),
        opset_imports=[helper.make_opsetid("", 21)],
        ir_version=10,
    )
    store_as_int4(model, ["w"])
    packed = model.graph.initializer[0]
    assert packed.data_type == TensorProto.INT4
    assert len(packed.raw_data) == (levels.numel() + 1) // 2
    first = int(levels.flatten()[0])
    assert packed.raw_data[0] & 15 == first & 15
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    [found] = session.run(None, {})
    assert np.array_equal(found, expected.T.numpy() if transposed else expected.numpy())


def test_values_that_four_bits_cannot_hold_are_refused() -> None:
    graph = helper.make_graph(
        [], "g", [], [], [numpy_helper.from_array(np.array([[7, 8]], dtype=np.int8), "w")]
    )
    with pytest.raises(ValueError, match="w has values outside of the range of INT4"):
        store_as_int4(helper.make_model(graph), ["w"])
