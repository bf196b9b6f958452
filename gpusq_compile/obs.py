"""The optimal brain surgeon's sweep: prune and round a weight, and let what is left make up for it.

Layer by layer, as in "SparseGPT" (Frantar and Alistarh, ICML 2023) and "GPTQ" (Frantar et al.,
ICLR 2023): columns are settled from left to right, and the error of each is spread over the
columns to its right so that the layer's output on the calibration data changes least. With H the
damped second moments of the inputs and H^-1 = U^T U (U upper triangular), the trailing block of U
is the factor of the inverse for the columns that are not settled yet, so one factorization serves
the whole sweep.

Where a pattern is asked for, a whole group of columns is settled at once: of every legal mask the
one of least error, after the best compensation by everything not settled yet, the kept weights of
the group included (SparseGPT judges each weight by itself, and does not move the kept ones).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from gpusq_compile.inverse_factor import EXACT_COLUMNS
from gpusq_compile.quantization.fake_quantize import IntegerRange, broadcastable
from gpusq_compile.sparsity import Pattern, group_masks

BLOCK = 128
"""Columns after which the errors so far are spread over all that follow, in one product."""


@dataclass(frozen=True)
class Grid:
    """The values that a weight may take: integers of `levels` times `scale`, float.

    `scale` is [out], or [out, blocks] for equal blocks of columns.
    """

    scale: torch.Tensor
    levels: IntegerRange

    def of_column(self, index: int, columns: int) -> Grid:
        """The grid of one column of a weight that has `columns`."""
        if self.scale.ndim == 1:
            return self
        return Grid(self.scale[:, index * self.scale.shape[1] // columns], self.levels)

    def nearest(self, values: torch.Tensor) -> torch.Tensor:
        """`values` [out, ...] rounded half to even, as fake quantization rounds."""
        scale = broadcastable(self.scale.to(values.dtype), values)
        return (values / scale).round().clamp(self.levels.qmin, self.levels.qmax) * scale


def sweep(
    weight: torch.Tensor,
    factor: torch.Tensor,
    *,
    pattern: Pattern | None = None,
    mask: torch.Tensor | None = None,
    grid: Grid | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Prune a weight, round it, or both, with compensation.

    Args:
        weight: [out, columns], any float dtype.
        factor: [columns, columns], the `SecondMoments.inverse_factor` of the inputs. What is below
            its diagonal is not read.
        pattern: the mask is chosen, in this pattern along the columns.
        mask: bool [out, columns], the mask to keep to. With neither the weight stays dense.
        grid: kept weights are rounded onto it.

    Returns:
        The new weight, exactly zero where masked and exactly on the grid where kept, in the
        dtype of the old one, and the mask.

    Raises:
        ValueError: both a pattern and a mask, or columns that are no multiple of the group.
    """
    if pattern is not None and mask is not None:
        raise ValueError("a mask is either chosen or given")
    columns = weight.shape[1]
    group = 1 if pattern is None else pattern.group
    if columns % group:
        raise ValueError(f"{columns} columns are not a multiple of {group}")
    solvers = _diagonal_blocks(factor, group).triu()
    choices = None if pattern is None else _Choices.of(solvers, pattern)
    identity = torch.eye(group, dtype=factor.dtype, device=factor.device)
    solvers = torch.linalg.solve_triangular(solvers, identity, upper=True)
    if columns > EXACT_COLUMNS:
        factor, solvers = factor.float(), solvers.float()
        choices = choices and choices.float()
    # Columns are the rows of what is swept, so that all that is done to one is done to a run of
    # memory.
    left = weight.T.to(factor.dtype, copy=True, memory_format=torch.contiguous_format)
    found = torch.ones_like(left, dtype=torch.bool) if mask is None else mask.T.contiguous()
    block = max(BLOCK // group, 1) * group
    for first in range(0, columns, block):
        last = min(first + block, columns)
        errors = torch.empty_like(left[first:last])
        for start in range(first, last, group):
            end = start + group
            values = left[start:end]
            if choices is None:
                settled = values * found[start:end]
            else:
                settled, found[start:end] = choices.best(values, start // group)
            if grid is not None:
                upper = factor[start:end, start:end]
                grids = [grid.of_column(index, columns) for index in range(start, end)]
                settled = _round(settled, found[start:end], upper, grids)
            error = errors[start - first : end - first]
            torch.mm(solvers[start // group].T, values - settled, out=error)
            left[start:end] = settled
            left[end:last].addmm_(factor[start:end, end:last].T, error, alpha=-1)
        left[last:].addmm_(factor[first:last, last:].T, errors, alpha=-1)
    return left.T.to(weight.dtype).contiguous(), found.T.contiguous()


def _diagonal_blocks(matrix: torch.Tensor, size: int) -> torch.Tensor:
    """[n * size, n * size] -> its n blocks on the diagonal, [n, size, size]."""
    count = matrix.shape[0] // size
    blocks = matrix.reshape(count, size, count, size).diagonal(dim1=0, dim2=2)
    return blocks.permute(2, 0, 1)


@dataclass(frozen=True)
class _Choices:
    """For each group of columns and each legal mask, the loss and the update that it means.

    With A the group's block of the inverse of what is not settled and P the pruned columns, the
    least loss is `w_P (A_PP)^-1 w_P^T`, reached where the group is moved by `-w_P (A_PP)^-1 A_P`:
    the optimal brain surgeon (Hassibi and Stork, NIPS 1992) for several weights at once (Kurtic et
    al., "The Optimal BERT Surgeon", EMNLP 2022).

    `masks` is bool [masks, group]; `losses` is [groups, masks, group, group], `(A_PP)^-1` with
    zeros around it, and `inverses` the A, [groups, group, group].
    """

    masks: torch.Tensor
    losses: torch.Tensor
    inverses: torch.Tensor

    @classmethod
    def of(cls, factors: torch.Tensor, pattern: Pattern) -> _Choices:
        masks = group_masks(pattern).to(factors.device)
        inverses = factors.mT @ factors
        pruned = (~masks).nonzero()[:, 1].reshape(len(masks), -1)
        row, column = pruned.unsqueeze(2), pruned.unsqueeze(1)
        shape = (len(inverses), len(masks), pattern.group, pattern.group)
        losses = inverses.new_zeros(shape)
        which = torch.arange(len(masks), device=masks.device).reshape(-1, 1, 1)
        losses[:, which, row, column] = torch.linalg.inv(inverses[:, row, column])
        return cls(masks, losses, inverses)

    def float(self) -> _Choices:
        return _Choices(self.masks, self.losses.float(), self.inverses.float())

    def best(self, values: torch.Tensor, group: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The group's columns [group, out] after the mask of least loss, and that mask."""
        size, out = values.shape
        solved = (self.losses[group].reshape(-1, size) @ values).reshape(-1, size, out)
        # With the values: `argmin` over an outer dimension is many times as slow.
        choice = (solved * values).sum(dim=1).min(dim=0).indices
        mask = self.masks.T[:, choice]
        moved = values - self.inverses[group] @ solved.gather(0, choice.expand(1, size, out))[0]
        return moved * mask, mask


def _round(
    values: torch.Tensor, mask: torch.Tensor, factor: torch.Tensor, grids: Sequence[Grid]
) -> torch.Tensor:
    """Round the kept columns of one group, [group, out], each error spread over the later ones."""
    left = values.clone()
    for index, grid in enumerate(grids):
        exact = left[index]
        rounded = grid.nearest(exact) * mask[index]
        error = (exact - rounded) / factor[index, index]
        left[index] = rounded
        left[index + 1 :] -= factor[index, index + 1 :].outer(error)
    return left
