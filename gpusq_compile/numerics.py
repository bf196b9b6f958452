"""How far two versions of a model's outputs are apart."""

from __future__ import annotations

import math

import torch
from torch import nn

ROUNDINGS = 4
"""Roundings of the largest value that two ways to compute the same may differ by."""


def spread(reference: torch.Tensor) -> float:
    """The unit that differences are given in: the standard deviation of a tensor's values.

    Their root mean square where all are alike; never zero, and one where there are none.
    """
    values = reference.float()
    if not values.numel():
        return 1.0
    deviation = float(values.std(correction=0))
    return max(deviation or float(values.square().mean().sqrt()), 1e-12)


def largest_difference(ours: torch.Tensor, reference: torch.Tensor) -> float:
    """The largest absolute difference, in `spread`s; infinite where either holds NaN."""
    if not reference.numel():
        return 0.0
    difference = float((ours.float() - reference.float()).abs().max()) / spread(reference)
    return math.inf if math.isnan(difference) else difference


def is_rounding(ours: torch.Tensor, reference: torch.Tensor) -> bool:
    """Whether float32's rounding explains all differences of two tensors.

    Values that lie close together far from zero (the boxes of a detector that was not trained) have
    a spread of a few roundings, so that in `spread`s a rounding looks large.
    """
    if not reference.numel():
        return True
    difference = float((ours.float() - reference.float()).abs().max())
    largest = float(reference.float().abs().max())
    return difference <= ROUNDINGS * torch.finfo(torch.float32).eps * largest


def cosine_per_sample(ours: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    """Cosine similarity [batch] of two tensors with the batch first.

    1 where both are equal (a classifier that was never trained gives zeros), -1 where it is NaN.
    """
    left, right = per_sample(ours), per_sample(reference)
    cosine = nn.functional.cosine_similarity(left, right, dim=1).nan_to_num(nan=-1.0)
    return cosine.masked_fill((left == right).all(dim=1), 1.0)


def per_sample(value: torch.Tensor) -> torch.Tensor:
    """[batch, ...] -> float [batch, values]; a scalar is one sample."""
    return value.float().reshape(value.shape[0] if value.ndim else 1, -1)
