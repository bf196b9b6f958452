"""Errors of weights on data that is known by its second moments alone."""

from __future__ import annotations

from torch import Tensor

from gpusq_compile.second_moments import SecondMoments


def output_error(matrix: Tensor, changed: Tensor, moments: Tensor) -> float:
    """||X W^T - X W'^T|| / ||X W^T||; see `SecondMoments.output_errors`."""
    return SecondMoments(moments).output_errors(matrix, [changed])[0]
