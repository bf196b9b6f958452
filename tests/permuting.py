"""Running the pipeline up to `permute`, and what it is judged by."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from gpusq_compile.compilation import Compilation
from gpusq_compile.remarks import Kind
from gpusq_compile.sparsity import PATTERNS, Pattern, magnitude_mask
from tests.compilations import SPARSE, begin, make_rules, remarks_of, run_until

TWO_OF_FOUR = PATTERNS["2:4"]
PERMUTED: dict[str, Any] = {
    "id": "all",
    "match": {"op": ["linear", "conv2d"]},
    "sparsity": {**SPARSE, "permute": True},
}


def permuted_in(pattern: str) -> dict[str, Any]:
    return {**PERMUTED, "sparsity": {"pattern": pattern, "permute": True}}


def energy_kept(weight: Tensor, pattern: Pattern = TWO_OF_FOUR) -> float:
    """By the mask that sparsify makes, not by anything of the search."""
    weight = weight.double()
    return float((weight * magnitude_mask(weight, pattern)).square().sum())


def permuted(model: nn.Module, inputs: Tensor, *rules: Any) -> Compilation:
    return run_until(begin(model, inputs, make_rules(*(rules or (PERMUTED,)))), "permute")


def layers(compilation: Compilation, kind: Kind) -> dict[str | None, str]:
    return {remark.layer: remark.reason for remark in remarks_of(compilation, "permute", kind)}
