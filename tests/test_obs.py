"""The compensating sweep: legal masks, values on the grid, and less output error than without."""

from __future__ import annotations

import math
from itertools import combinations
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from gpusq_compile.obs import BLOCK, Grid, sweep
from gpusq_compile.quantization.calibrate import weight_scale
from gpusq_compile.quantization.fake_quantize import FakeQuantize, IntegerRange
from gpusq_compile.second_moments import (
    LayerInputs,
    SecondMoments,
    as_matrix,
    as_weight,
    input_rows,
    mean_squares,
    second_moments,
    thinned,
)
from gpusq_compile.sparsity import PATTERNS, Pattern, magnitude_mask, violations
from tests.compilations import begin, make_rules, node_and_plan, run_until
from tests.models import Convolution, Perceptron, noise, seeded
from tests.moments import inverse_factor, output_error

steady = settings(deadline=None)  # A busy machine is no failure.
TWO_OF_FOUR = PATTERNS["2:4"]
patterns = st.sampled_from(list(PATTERNS.values()))
every_pattern = pytest.mark.parametrize("pattern", PATTERNS.values(), ids=PATTERNS)
INT8 = IntegerRange("int8", -127, 127)
COARSE = IntegerRange("three bits", -3, 3)
DAMPING = 0.01


def correlated(rows: int, columns: int, seed: int) -> Tensor:
    """Inputs [rows, columns] whose columns share directions, as real activations do."""
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(rows, max(columns // 3, 1), generator=generator)
    mixing = torch.randn(hidden.shape[1], columns, generator=generator)
    return hidden @ mixing + 0.3 * torch.randn(rows, columns, generator=generator)


@st.composite
def problems(draw: st.DrawFn) -> tuple[Tensor, Tensor]:
    """A weight [out, columns] and second moments [columns, columns] of any rank and size.

    Some inputs are dead, some weights are zero or alike, and there may be fewer rows than columns.
    """
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    out, columns = draw(st.integers(1, 5)), 8 * draw(st.integers(1, 5))
    weight = torch.randn(out, columns, generator=generator)
    if draw(st.booleans()):
        weight = weight.round()
    rows = torch.randn(draw(st.integers(1, 40)), columns, generator=generator)
    if draw(st.booleans()):
        rows = rows @ torch.randn(columns, columns, generator=generator)
    rows[:, torch.rand(columns, generator=generator) < draw(st.sampled_from([0.0, 0.3, 1.0]))] = 0
    rows *= 10.0 ** draw(st.integers(-12, 12))
    return weight * 10.0 ** draw(st.integers(-6, 4)), second_moments([rows])


def grid_of(weight: Tensor, levels: IntegerRange = INT8) -> Grid:
    quantizer = FakeQuantize(levels, channels=len(weight), scale_dtype=torch.float32)
    quantizer.set_scale(weight_scale(weight, "max", levels.qmax))
    return Grid(quantizer.exported_scale().detach(), levels)


@steady
@given(problems(), patterns, st.sampled_from([1e-12, 0.01, 1.0]))
def test_a_swept_weight_is_legal_finite_and_zero_where_masked(
    problem: tuple[Tensor, Tensor], pattern: Pattern, damping: float
) -> None:
    weight, moments = problem
    found, mask = sweep(weight, inverse_factor(moments, damping), pattern=pattern)
    assert (found.dtype, found.shape) == (weight.dtype, weight.shape)
    units = mask.reshape(len(weight), -1, pattern.units, pattern.unit)
    assert torch.equal(units.all(dim=-1), units.any(dim=-1))
    assert units.all(dim=-1).sum(dim=2).eq(pattern.keep).all()
    assert violations(found, pattern) == 0
    assert torch.equal(found * mask, found)
    assert found.isfinite().all()


@steady
@given(problems(), st.sampled_from([INT8, COARSE]), st.sampled_from([*PATTERNS, "mask", "dense"]))
def test_kept_weights_are_exactly_on_the_grid_and_masked_ones_exactly_zero(
    problem: tuple[Tensor, Tensor], levels: IntegerRange, how: str
) -> None:
    weight, moments = problem
    quantizer = FakeQuantize(levels, channels=len(weight), scale_dtype=torch.float16)
    quantizer.set_scale(weight_scale(weight, "max", levels.qmax))
    grid = Grid(quantizer.exported_scale().detach(), levels)
    given_mask = torch.rand(weight.shape, generator=torch.Generator().manual_seed(0)) < 0.6
    choices: dict[str, dict[str, Any]] = {
        **{name: {"pattern": pattern} for name, pattern in PATTERNS.items()},
        "mask": {"mask": given_mask},
        "dense": {},
    }
    found, mask = sweep(weight, inverse_factor(moments, DAMPING), grid=grid, **choices[how])
    with torch.no_grad():
        assert torch.equal(quantizer(found), found)
    assert torch.equal(found * mask, found)
    if how == "mask":
        assert torch.equal(mask, given_mask)
    if how == "dense":
        assert mask.all()
    if how in PATTERNS:
        assert violations(mask, PATTERNS[how]) == 0


@steady
@given(problems(), patterns, st.floats(1e-6, 1e6))
def test_inputs_without_correlation_keep_the_energy_of_magnitude_and_move_nothing(
    problem: tuple[Tensor, Tensor], pattern: Pattern, size: float
) -> None:
    weight, _ = problem
    moments = size * torch.eye(weight.shape[1])
    found, mask = sweep(weight, inverse_factor(moments, DAMPING), pattern=pattern)
    assert torch.equal(found, weight * mask)
    by_magnitude = magnitude_mask(weight, pattern)
    if pattern.unit == 1:
        assert torch.equal(mask, by_magnitude)
    # Of units of equal energy the sum over several columns may round either way.
    energies = [
        (weight.double() * kept).square().reshape(len(weight), -1, pattern.group).sum(dim=2)
        for kept in (mask, by_magnitude)
    ]
    torch.testing.assert_close(*energies, rtol=1e-9, atol=0)
    grid = grid_of(weight)
    rounded, _ = sweep(weight, inverse_factor(moments, DAMPING), mask=mask, grid=grid)
    assert torch.equal(rounded, grid.nearest(weight) * mask)


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("pattern", [*PATTERNS.values(), Pattern(keep=1, group=3)])
def test_the_first_group_gets_the_mask_of_least_error_that_compensation_can_reach(
    pattern: Pattern, seed: int
) -> None:
    """Brute force: each legal mask of the group, everything else refitted by least squares."""
    columns = 4 * pattern.group
    weight = noise(3, columns, seed=seed).double()
    rows = correlated(200, columns, seed).double()
    _, mask = sweep(weight, inverse_factor(rows.T @ rows, 1e-9), pattern=pattern)
    for row, chosen in zip(weight, mask, strict=True):
        errors = {}
        for units in combinations(range(0, pattern.group, pattern.unit), pattern.keep):
            kept = tuple(start + i for start in units for i in range(pattern.unit))
            free = [*kept, *range(pattern.group, columns)]
            solution = torch.linalg.lstsq(rows[:, free], (rows @ row).unsqueeze(1)).solution
            errors[kept] = float((rows[:, free] @ solution.squeeze(1) - rows @ row).norm())
        best = min(errors, key=errors.__getitem__)
        assert tuple(chosen[: pattern.group].nonzero().flatten().tolist()) == best


@every_pattern
def test_the_last_group_is_settled_by_the_best_refit_of_its_kept_weights(pattern: Pattern) -> None:
    """With one group alone the sweep is exact: no legal weight has less error."""
    weight, rows = noise(5, pattern.group).double(), correlated(100, pattern.group, 1).double()
    found, mask = sweep(weight, inverse_factor(rows.T @ rows, 1e-12), pattern=pattern)
    for old, new, kept in zip(weight, found, mask, strict=True):
        best = torch.linalg.lstsq(rows[:, kept], (rows @ old).unsqueeze(1)).solution
        torch.testing.assert_close(new[kept], best.squeeze(1))


@every_pattern
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("columns", [24, BLOCK + 24])
def test_correlated_inputs_make_the_sweep_better_than_masking_and_rounding(
    columns: int, seed: int, pattern: Pattern
) -> None:
    """On other rows than those that it was fitted to; across blocks of columns too."""
    weight = noise(16, columns, seed=seed)
    rows = correlated(20 * columns, columns, seed)
    shown, held_out = (second_moments([part]) for part in rows.chunk(2))
    magnitude = weight * magnitude_mask(weight, pattern)
    pruned, mask = sweep(weight, inverse_factor(shown, DAMPING), pattern=pattern)
    plain = output_error(weight, magnitude, held_out)
    assert output_error(weight, pruned, held_out) < 0.7 * plain
    grid = grid_of(pruned, COARSE)
    rounded, _ = sweep(pruned, inverse_factor(shown, DAMPING), mask=mask, grid=grid)
    nearest = output_error(pruned, grid.nearest(pruned), held_out)
    assert output_error(pruned, rounded, held_out) < nearest
    joint, _ = sweep(weight, inverse_factor(shown, DAMPING), pattern=pattern, grid=grid)
    plain = output_error(weight, grid.nearest(magnitude), held_out)
    assert output_error(weight, joint, held_out) < 0.8 * plain


@every_pattern
def test_blocks_change_nothing(pattern: Pattern, monkeypatch: pytest.MonkeyPatch) -> None:
    weight, moments = noise(4, 64).double(), second_moments([correlated(99, 64, 2)])
    whole, mask = sweep(weight, inverse_factor(moments, DAMPING), pattern=pattern)
    monkeypatch.setattr("gpusq_compile.obs.BLOCK", 10)
    blocked, same = sweep(weight, inverse_factor(moments, DAMPING), pattern=pattern)
    assert torch.equal(mask, same)
    torch.testing.assert_close(blocked, whole)


@every_pattern
@pytest.mark.parametrize("levels", [None, INT8])
def test_a_wide_weight_in_float32_gets_the_mask_and_error_of_float64(
    pattern: Pattern, levels: IntegerRange | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    weight, moments = noise(16, 192), second_moments([correlated(2000, 192, 2)])
    grid = None if levels is None else grid_of(weight, levels)
    exact, mask = sweep(weight, inverse_factor(moments, DAMPING), pattern=pattern, grid=grid)
    for module in ("obs", "inverse_factor"):
        monkeypatch.setattr(f"gpusq_compile.{module}.EXACT_COLUMNS", 100)
    assert inverse_factor(moments, DAMPING).dtype == torch.float32
    found, other = sweep(weight, inverse_factor(moments, DAMPING), pattern=pattern, grid=grid)
    assert mask.eq(other).float().mean() > 0.999
    expected = output_error(weight, exact, moments)
    assert output_error(weight, found, moments) == pytest.approx(expected, rel=1e-3)
    if grid is not None:
        assert torch.equal(grid.nearest(found), found)


def test_a_factor_in_blocks_is_the_one_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    moments = second_moments([correlated(500, 72, 2)])
    whole = inverse_factor(moments, DAMPING)
    monkeypatch.setattr("gpusq_compile.inverse_factor.BLOCK", 16)
    factor = inverse_factor(moments, DAMPING)
    torch.testing.assert_close(factor, whole)
    assert torch.equal(factor, factor.triu())
    found, mask = sweep(weight := noise(4, 72), factor, pattern=TWO_OF_FOUR)
    # What is below the diagonal is somebody else's.
    other, same = sweep(weight, factor + torch.ones(72, 72).tril(-1), pattern=TWO_OF_FOUR)
    assert torch.equal(found, other)
    assert torch.equal(mask, same)


@pytest.mark.parametrize("block", [16, 384])
def test_one_square_holds_the_moments_and_their_factor(
    block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gpusq_compile.inverse_factor.BLOCK", block)
    monkeypatch.setattr("gpusq_compile.second_moments.WIDE", 24)
    square = second_moments([correlated(500, 72, 2).double()])
    weight, below = noise(4, 72), square.tril(-1)
    changed = [weight.round(), weight * 0.5]
    expected = inverse_factor(square, DAMPING)
    moments = SecondMoments(square)
    errors = moments.output_errors(weight, changed)
    for damping in (DAMPING, 10 * DAMPING, DAMPING):
        factor = moments.inverse_factor(damping)
        assert factor.data_ptr() == square.data_ptr()
        assert factor is moments.inverse_factor(damping)
        assert torch.equal(square.tril(-1), below)
        assert moments.output_errors(weight, changed) == errors
    torch.testing.assert_close(factor.triu(), expected)


def test_moments_in_float32_that_need_float64_get_a_factor_of_their_own(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("gpusq_compile.second_moments.WIDE", 24)
    square = second_moments([correlated(500, 72, 2)])
    held = square.clone()
    factor = SecondMoments(square).inverse_factor(DAMPING)
    assert (square.dtype, factor.dtype) == (torch.float32, torch.float64)
    assert torch.equal(square, held)
    torch.testing.assert_close(factor.triu(), inverse_factor(held, DAMPING))


def test_a_dead_input_is_pruned_first_and_disturbs_nobody() -> None:
    rows = noise(50, 8)
    rows[:, [0, 5]] = 0
    weight = torch.ones(6, 8)
    _, mask = sweep(weight, inverse_factor(second_moments([rows]), DAMPING), pattern=TWO_OF_FOUR)
    assert not mask[:, [0, 5]].any()
    for pattern in PATTERNS.values():
        weight = noise(6, 8)
        found, mask = sweep(weight, inverse_factor(torch.zeros(8, 8), DAMPING), pattern=pattern)
        assert torch.equal(found, weight * magnitude_mask(weight, pattern))


@pytest.mark.parametrize("name", ["pair4:8", "portable"])
def test_a_pair_of_dead_inputs_is_pruned_first(name: str) -> None:
    rows = noise(50, 8)
    rows[:, [2, 3, 4, 5]] = 0
    _, mask = sweep(
        torch.ones(6, 8), inverse_factor(second_moments([rows]), DAMPING), pattern=PATTERNS[name]
    )
    assert mask.tolist() == [[True] * 2 + [False] * 4 + [True] * 2] * 6


def test_moments_that_are_not_quite_definite_are_damped_until_they_are() -> None:
    moments = torch.ones(4, 4) - 0.02 * torch.eye(4)
    factor = inverse_factor(moments, 1e-9)
    assert factor.isfinite().all()
    assert torch.equal(factor, factor.triu())


@steady
@given(problems())
def test_the_factor_is_that_of_the_damped_inverse(problem: tuple[Tensor, Tensor]) -> None:
    _, moments = problem
    factor = inverse_factor(moments, DAMPING)
    scaled = moments / moments.diagonal().mean() if moments.any() else moments
    damped = scaled + DAMPING * torch.eye(len(moments), dtype=torch.float64)
    identity = factor.T @ factor @ damped
    torch.testing.assert_close(identity, torch.eye(len(moments), dtype=torch.float64))


def test_what_cannot_be_swept_is_refused() -> None:
    weight, moments = torch.ones(2, 6), torch.eye(6)
    for pattern in PATTERNS.values():
        with pytest.raises(ValueError, match=f"6 columns are not a multiple of {pattern.group}"):
            sweep(weight, inverse_factor(moments, DAMPING), pattern=pattern)
    with pytest.raises(ValueError, match="either chosen or given"):
        sweep(
            weight,
            inverse_factor(moments, DAMPING),
            pattern=TWO_OF_FOUR,
            mask=torch.ones(2, 6).bool(),
        )
    with pytest.raises(ValueError, match="not finite"):
        sweep(weight, inverse_factor(moments * torch.nan, DAMPING), mask=torch.ones(2, 6).bool())


# --- second moments ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments",
    [
        {"kernel_size": 3},
        {"kernel_size": (2, 3), "stride": (1, 2), "padding": (1, 0)},
        {"kernel_size": 3, "padding": 2, "dilation": 2},
        {"kernel_size": 1, "bias": False},
    ],
)
def test_a_convolution_is_its_rows_times_its_matrix(
    arguments: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    kernel = math.prod(nn.Conv2d(8, 4, **arguments).kernel_size)
    strides = math.prod(nn.Conv2d(8, 4, **arguments).stride)
    limit = 8 * 8 * 6 * 7 * kernel // strides
    monkeypatch.setattr("gpusq_compile.second_moments.PATCHES_AT_ONCE", limit)
    inputs = noise(10, 8, 6, 7)
    model = seeded(Convolution, 8, 4, **arguments)
    rules = make_rules({"id": "s", "match": {"op": "conv2d"}, "sparsity": {"pattern": "2:4"}})
    node, _ = node_and_plan(run_until(begin(model, inputs, rules), "mark"), "conv")
    weight = model.conv.weight.detach()
    parts = list(input_rows(node, inputs))
    assert len(parts) == 2
    rows, expected = torch.cat(parts), F.conv2d(inputs, weight, None, *convolution(arguments))
    product = (rows @ as_matrix(weight).T).reshape(10, *expected.shape[2:], 4)
    torch.testing.assert_close(product.permute(0, 3, 1, 2), expected)
    assert torch.equal(as_weight(as_matrix(weight), weight.shape), weight)
    # The pattern's groups along the input channels are runs of columns.
    for pattern in PATTERNS.values():
        mask = magnitude_mask(weight, pattern)
        assert torch.equal(as_matrix(mask), magnitude_mask(as_matrix(weight), pattern))


def convolution(arguments: dict[str, Any]) -> tuple[Any, Any, Any]:
    return (
        arguments.get("stride", 1),
        arguments.get("padding", 0),
        arguments.get("dilation", 1),
    )


def test_the_output_error_from_moments_is_the_one_from_the_data() -> None:
    rows, weight = correlated(60, 12, 3), noise(5, 12)
    changed = weight + 0.1 * noise(5, 12, seed=1)
    expected = (rows @ (weight - changed).T).norm() / (rows @ weight.T).norm()
    found = output_error(weight, changed, second_moments(rows.split(7)))
    assert found == pytest.approx(float(expected), rel=1e-4)
    assert output_error(weight, weight, second_moments([rows])) == 0
    assert output_error(weight, changed, torch.zeros(12, 12)) == 0


@pytest.mark.parametrize("rows_at_once", [1, 20, 1000])
def test_wide_moments_and_errors_in_blocks_are_those_at_once(
    rows_at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows, weight = correlated(60, 40, 3), noise(5, 40)
    changed = [weight + size * noise(5, 40, seed=1) for size in (0.1, 0.5)]
    moments = second_moments(rows.split(7))
    errors = SecondMoments(moments).output_errors(weight, changed)
    monkeypatch.setattr("gpusq_compile.second_moments.WIDE", 16)
    monkeypatch.setattr("gpusq_compile.second_moments.ROWS_AT_ONCE", rows_at_once)
    wide = second_moments(rows.split(7))
    assert (moments.dtype, wide.dtype) == (torch.float64, torch.float32)
    assert torch.equal(wide, wide.T)
    torch.testing.assert_close(wide.double(), moments, rtol=1e-4, atol=1e-5)
    assert SecondMoments(wide).output_errors(weight, changed) == pytest.approx(errors, rel=1e-4)


@pytest.mark.parametrize("tokens", [1, 4, 6, 49, 196])
def test_of_many_rows_every_token_of_the_images_is_among_those_taken(tokens: int) -> None:
    token = torch.arange(600 * tokens).unsqueeze(1) % tokens
    taken = thinned(token, 4)
    assert len(taken) == len(token) // 4
    shares = taken.flatten().bincount() / len(taken)
    assert shares.tolist() == pytest.approx([1 / tokens] * tokens, rel=0.05)
    assert torch.equal(thinned(token, 1), token)


def test_the_moments_of_a_layer_come_from_a_bounded_number_of_rows(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    inputs = [noise(8, 32, seed=seed) for seed in range(4)]
    compilation = run_until(begin(seeded(Perceptron), inputs[0], make_rules(), data=inputs), "mark")
    node, plan = node_and_plan(compilation, "first")

    def factor() -> Tensor:
        return LayerInputs(compilation, "a test").moments(node, plan.name).inverse_factor(DAMPING)

    expected = inverse_factor(second_moments(inputs), DAMPING)
    torch.testing.assert_close(factor().triu(), expected)
    monkeypatch.setattr("gpusq_compile.second_moments.MOST_ROWS", 16)
    expected = inverse_factor(second_moments([thinned(x, 2) for x in inputs]), DAMPING)
    torch.testing.assert_close(factor().triu(), expected)


def test_mean_squares_are_the_diagonal_of_the_second_moments() -> None:
    parts = correlated(60, 12, 3).split(11)
    torch.testing.assert_close(
        mean_squares(parts), second_moments(parts).diagonal(), rtol=1e-5, atol=0
    )
