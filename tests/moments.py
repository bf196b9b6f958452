"""What follows from second moments alone, which stay as they are."""

from __future__ import annotations

from torch import Tensor

from gpusq_compile.second_moments import SecondMoments


def output_error(matrix: Tensor, changed: Tensor, moments: Tensor) -> float:
    """||X W^T - X W'^T|| / ||X W^T||; see `SecondMoments.output_errors`."""
    return SecondMoments(moments).output_errors(matrix, [changed])[0]


def inverse_factor(moments: Tensor, damping: float) -> Tensor:
    """U, upper triangular; see `SecondMoments.inverse_factor`, which may write over its moments."""
    return SecondMoments(moments.clone()).inverse_factor(damping).triu()
