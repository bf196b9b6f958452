"""Initial scales: thresholds lie within the data's range, in one pass, however it is cut up."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from gpusq_compile.quantization.calibrate import BINS, SAMPLES, Observer, weight_scale
from gpusq_compile.quantization.fake_quantize import MIN_SCALE, WEIGHT_RANGES, FakeQuantize
from gpusq_compile.sparsity import PATTERNS, magnitude_mask

steady = settings(deadline=None)  # A busy machine is no failure.
QMAX = 127
FLOAT_ROUNDING = 1e-5


@st.composite
def tensors(draw: st.DrawFn) -> list[Tensor]:
    """What one activation shows over several batches, each with a range of its own."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    ranges = draw(st.lists(st.floats(1e-3, 1e3), min_size=1, max_size=5))
    return [scale * torch.randn(draw(st.integers(1, 200)), generator=generator) for scale in ranges]


def observed(values: list[Tensor]) -> Observer:
    observer = Observer()
    for value in values:
        observer.observe(value)
    return observer


def squared_error(values: Tensor, threshold: float) -> float:
    scale = threshold / QMAX
    restored = (values.double() / scale).round().clamp(-QMAX - 1, QMAX) * scale
    return float((restored - values.double()).square().sum())


@steady
@given(tensors(), st.floats(1, 100))
def test_every_threshold_lies_within_the_range_of_the_data(
    values: list[Tensor], percentile: float
) -> None:
    observer = observed(values)
    largest = max(float(value.abs().max()) for value in values)
    assert observer.threshold("max", percentile, QMAX) == largest
    assert 0 < observer.threshold("percentile", percentile, QMAX) <= largest
    # The search stops at a third: further in, clipping would only ever lose.
    assert largest / 3 * (1 - FLOAT_ROUNDING) <= observer.threshold("mse", percentile, QMAX)
    assert observer.threshold("mse", percentile, QMAX) <= largest * (1 + FLOAT_ROUNDING)


@steady
@given(tensors(), st.floats(1, 100))
def test_a_percentile_is_right_to_one_bin(values: list[Tensor], percentile: float) -> None:
    observer = observed(values)
    magnitudes = torch.cat(values).abs().double().numpy()
    true = float(np.quantile(magnitudes, percentile / 100, method="inverted_cdf"))
    width = observer.limit / BINS
    found = observer.threshold("percentile", percentile, QMAX)
    assert true - width * 1.01 <= found <= true + width * 1.01


@steady
@given(tensors())
def test_the_hundredth_percentile_is_the_maximum(values: list[Tensor]) -> None:
    observer = observed(values)
    assert observer.threshold("percentile", 100.0, QMAX) == observer.maximum


@steady
@given(tensors(), st.integers(1, 7))
def test_every_value_is_counted_once_and_the_range_holds_all_of_them(
    values: list[Tensor], pieces: int
) -> None:
    cut = [part for value in values for part in value.tensor_split(pieces)]
    observer = observed(cut)
    assert observer.counts.sum() == sum(value.numel() for value in values)
    assert observer.maximum <= observer.limit
    # The range grows by doubling, so it is never more than twice what was needed.
    first = float(next(part for part in cut if part.numel()).abs().max())
    assert observer.limit <= max(2 * observer.maximum, first)


@steady
@given(st.lists(st.integers(0, 8 * BINS - 1), min_size=1, max_size=300))
def test_doubling_the_range_leaves_the_histogram_that_one_pass_would_have_made(
    bins: list[int],
) -> None:
    """Values in the middle of the first range's bins: no bin edge is ever in doubt."""
    middles = (torch.tensor(bins).double() + 0.5) / BINS
    observer = observed([torch.ones(1), *middles.float().split(7)])
    everything = np.concatenate([[1.0], middles.numpy()])
    expected, _ = np.histogram(everything, bins=BINS, range=(0.0, observer.limit))
    found = observer.counts.numpy()
    if observer.limit == 1.0:
        assert found.tolist() == expected.tolist()
    else:
        # The one value 1.0 closes the first range's last bin, and opens the next of a wider one.
        opened = int(BINS / observer.limit)
        expected[opened] -= 1
        expected[opened - 1] += 1
        assert found.tolist() == expected.tolist()


def test_a_large_tensor_is_sampled_and_its_maximum_is_still_exact() -> None:
    """64 images of a ViT-Base show one GELU 39 million values; a sample tells its percentiles."""
    value = torch.randn(2**22 + 100, generator=torch.Generator().manual_seed(0))
    value[1] = 50.0
    observer = observed([value])
    assert observer.maximum == 50.0
    assert observer.threshold("max", 0, QMAX) == 50.0
    assert observer.threshold("percentile", 100.0, QMAX) == 50.0
    assert SAMPLES / 2 <= observer.counts.sum() <= 2 * SAMPLES
    true = float(value.abs().kthvalue(int(0.999 * len(value))).values)
    assert observer.threshold("percentile", 99.9, QMAX) == pytest.approx(true, rel=0.05)


@pytest.mark.parametrize("channels", [96, 192, 197, 384, 768, 1000, 1024])
@pytest.mark.parametrize("factor", [3.3, 5.7, 9.4])
def test_a_sample_sees_every_channel(channels: int, factor: float) -> None:
    """A few channels of a transformer's activations are far larger than all others."""
    rows = int(SAMPLES * factor) // channels
    for loud in (0, 1, 2, channels - 1):
        value = torch.full((rows, channels), 0.1)
        value[:, loud] = 10.0
        observer = observed([value])
        share = float(observer.counts[BINS // 2 :].sum() / observer.counts.sum())
        assert share == pytest.approx(1 / channels, rel=0.1)


def test_zeros_alone_give_threshold_zero() -> None:
    observer = observed([torch.zeros(8), torch.empty(0)])
    assert [observer.threshold(m, 99.0, QMAX) for m in ("max", "percentile", "mse")] == [0, 0, 0]
    assert observer.finite


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_a_value_that_is_not_finite_is_remembered(bad: float) -> None:
    assert not observed([torch.ones(4), torch.tensor([1.0, bad])]).finite


def test_an_outlier_is_clipped_where_that_costs_less() -> None:
    normal = torch.randn(100_000, generator=torch.Generator().manual_seed(0))
    outlier = torch.cat([normal, torch.tensor([12.0])])
    observer = observed([outlier])
    threshold = observer.threshold("mse", 0, QMAX)
    assert threshold < 9
    assert squared_error(outlier, threshold) < squared_error(outlier, observer.maximum)
    assert observer.threshold("percentile", 99.9, QMAX) < 4


# --- weights -------------------------------------------------------------------------------------


@st.composite
def weights(draw: st.DrawFn) -> Tensor:
    shape = (draw(st.integers(1, 6)), 4 * draw(st.integers(1, 8)))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    return torch.randn(shape, generator=generator) * draw(st.floats(1e-3, 10))


def channel_errors(weight: Tensor, scale: Tensor) -> Tensor:
    steps = scale.double().unsqueeze(1)
    restored = (weight.double() / steps).round().clamp(-QMAX, QMAX) * steps
    return (restored - weight.double()).square().sum(dim=1)


@steady
@given(weights())
def test_the_scale_of_the_maximum_maps_it_to_the_last_level(weight: Tensor) -> None:
    scale = weight_scale(weight, "max", QMAX)
    assert torch.equal(scale, weight.abs().amax(dim=1) / QMAX)


@steady
@given(weights())
def test_the_least_squares_scale_is_no_worse_than_the_maximum_in_any_channel(
    weight: Tensor,
) -> None:
    best = channel_errors(weight, weight_scale(weight, "mse", QMAX))
    simple = channel_errors(weight, weight_scale(weight, "max", QMAX))
    assert (best <= simple * (1 + 1e-3) + 1e-12).all()


@steady
@given(weights(), st.sampled_from(["max", "mse"]))
def test_pruned_weights_have_no_say_in_the_scale(weight: Tensor, method: str) -> None:
    mask = magnitude_mask(weight, PATTERNS["2:4"])
    survivors = weight[mask].reshape(len(weight), -1)
    torch.testing.assert_close(
        weight_scale(weight * mask, method, QMAX), weight_scale(survivors, method, QMAX)
    )


@pytest.mark.parametrize("method", ["max", "mse"])
def test_a_channel_of_zeros_gets_the_smallest_scale_and_stays_zero(method: str) -> None:
    weight = torch.stack([torch.zeros(8), torch.ones(8)])
    module = FakeQuantize(WEIGHT_RANGES["int8"], channels=2, scale_dtype=torch.float16)
    module.set_scale(weight_scale(weight, method, QMAX))
    assert module.scale[0].item() == pytest.approx(MIN_SCALE)
    assert not module(weight)[0].any()


def test_a_convolutions_channel_is_its_whole_kernel() -> None:
    weight = torch.randn(3, 4, 2, 2, generator=torch.Generator().manual_seed(0))
    for method in ("max", "mse"):
        assert torch.equal(
            weight_scale(weight, method, QMAX), weight_scale(weight.flatten(1), method, QMAX)
        )
