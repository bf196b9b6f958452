"""The Cholesky factor of the inverse of damped second moments, in one triangle of one square.

The moments of a wide layer are the largest thing that a sweep needs: 64 MiB of 4096 columns in
float32. They are symmetric and their factor is triangular, so both fit where the moments were.
LAPACK reads one triangle as well, but its inverse overwrites the other one, and so the work is done
here in blocks, of which LAPACK solves those on the diagonal and products do the rest.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

BLOCK = 384
"""Rows and columns of the blocks that LAPACK factorizes."""

EXACT_COLUMNS = 512
"""Wider weights are swept in float32, and their moments factorized in it where damping allows."""


def precision(columns: int, damping: float) -> torch.dtype:
    """float64, or where its rounding errors are small beside the damping, float32.

    The largest eigenvalue is at most the sum of the diagonal, whose mean is 1.
    """
    small = 10.0 * columns * torch.finfo(torch.float32).eps < damping
    return torch.float32 if columns > EXACT_COLUMNS and small else torch.float64


def write_inverse_factor(square: torch.Tensor, diagonal: torch.Tensor, damping: float) -> None:
    """Write U with `U.T @ U` the inverse of the damped moments over a square's upper triangle.

    The moments are first divided by the mean of their diagonal: U's own scale means nothing to
    the sweep. Damping grows by factors of ten where rounding errors leave the moments indefinite.

    Args:
        square: [columns, columns], float32 or float64, with the moments below its diagonal. What
            is there stays; what is on the diagonal and above it is not read.
        diagonal: [columns], that of the moments.
        damping: share of the diagonal's mean that is added to the diagonal, above 0.

    Raises:
        ValueError: the diagonal is not finite.
    """
    if not bool(torch.isfinite(diagonal).all()):
        raise ValueError("the moments are not finite")
    mean = float(diagonal.double().mean()) or 1.0
    while True:
        for first, last in _blocks(len(square)):
            square[first:last, last:] = square[last:, first:last].T
            square[first:last, last:].div_(mean)
            tile = square[first:last, first:last]
            own = (diagonal[first:last] / mean + damping).to(square.dtype)
            _write_upper(tile, tile.tril(-1).T / mean + own.diag())
        if _factorize(square):
            break
        damping *= 10.0
    _invert(square)


def _blocks(size: int) -> Iterator[tuple[int, int]]:
    """Where each block begins and ends."""
    return ((first, min(first + BLOCK, size)) for first in range(0, size, BLOCK))


def _write_upper(tile: torch.Tensor, upper: torch.Tensor) -> None:
    """Write an upper triangular block over a block's upper triangle."""
    tile.tril_(-1).add_(upper)


def _factorize(square: torch.Tensor) -> bool:
    """Replace A, in the upper triangle, by the upper triangular R with `R @ R.T = A`.

    Returns:
        Whether A is positive definite; where it is not the triangle means nothing afterwards.
    """
    for first, last in reversed(list(_blocks(len(square)))):
        # To the right of this block and above there is R by now.
        beside, above = square[first:last, last:], square[:first, first:last]
        own = square[first:last, first:last].triu()
        own = own + own.triu(1).T - beside @ beside.T
        # Reversed, the lower factor of Cholesky is the upper one.
        lower, failed = torch.linalg.cholesky_ex(own.flip(0, 1))
        if int(failed):
            return False
        factor = lower.flip(0, 1)
        _write_upper(square[first:last, first:last], factor)
        above.addmm_(square[:first, last:], beside.T, alpha=-1)
        above.copy_(torch.linalg.solve_triangular(factor.T, above, upper=False, left=False))
    return True


def _invert(square: torch.Tensor) -> None:
    """Replace the upper triangle by its inverse."""
    for first, last in _blocks(len(square)):
        own = square[first:last, first:last].triu()
        identity = torch.eye(last - first, dtype=square.dtype, device=square.device)
        own = torch.linalg.solve_triangular(own, identity, upper=True)
        # The blocks to the left are the inverse's by now. A row of them needs those rows of this
        # column that are not above it, and so from the first one on each can be replaced.
        for top, bottom in _blocks(first):
            product = square[top:bottom, top:bottom].triu() @ square[top:bottom, first:last]
            product.addmm_(square[top:bottom, bottom:first], square[bottom:first, first:last])
            square[top:bottom, first:last] = (product @ own).neg_()
        _write_upper(square[first:last, first:last], own)
