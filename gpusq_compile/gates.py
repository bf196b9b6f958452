"""Gates: what must hold for exit code 0 beside the verification. They are read off a report, so
that a finished run can be held to them too."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from gpusq_compile.errors import CheckFailed, InputError
from gpusq_compile.report.names import listed

SPARSE_SIZES = 32
"""Every sparse kernel takes input and output features that are multiples of this."""

Report = Mapping[str, Any]


@dataclass(frozen=True)
class Gates:
    """What must hold for exit code 0 beside the verification.

    `max_drop` is the largest loss of top-1 from the dense model to the ONNX file, in percentage
    points; `strict` allows nothing that was asked for and not done. `require_sparse` is the
    smallest share, in [0, 1], of the weights that sparse kernels could take that do run on them
    (`sparse_share` says how they are counted).
    """

    max_drop: float | None = None
    strict: bool = False
    require_sparse: float | None = None

    def __post_init__(self) -> None:
        if self.max_drop is not None and not 0 <= self.max_drop < math.inf:
            raise InputError(
                "max-drop",
                f"a largest drop of {self.max_drop:g}: expected percentage points of 0 or more",
            )
        if self.require_sparse is not None and not 0 <= self.require_sparse <= 1:
            raise InputError(
                "require-sparse",
                f"a smallest share of {self.require_sparse:g}: expected 0 to 1",
                hint="0.9 is nine tenths of the weights that sparse kernels could take",
            )


@dataclass(frozen=True)
class SparseShare:
    """How many weights (elements) of the eligible layers there are, how many of them run on sparse
    kernels, and the layers that do not, the largest first, each with the reason."""

    eligible: int
    sparse: int
    missing: tuple[tuple[str, str], ...]
    picked_known: bool

    @property
    def share(self) -> float:
        return self.sparse / self.eligible if self.eligible else 0.0


def sparse_share(report: Report) -> SparseShare:
    """How much of what could be sparse is.

    Eligible are the weights of all linears and convolutions whose input and output features are
    multiples of 32, whether a rule asks for them or not, and those of layers that are sparse
    anyway. A layer counts as sparse where the types and the mask that it was given have sparse
    kernels on every target and the mask in the file is whole. Where an engine or the log of a
    build says whether a sparse kernel was picked, that alone counts.
    """
    eligible = sparse = 0
    missing = []
    known = False
    for layer in report["layers"]:
        if layer["op"] not in ("linear", "conv2d") or len(layer["shape"]) < 2:
            continue
        picked = (layer.get("sparse_kernel") or {}).get("picked", "unknown")
        known |= picked != "unknown"
        planned = layer["execution"]["kind"].startswith("sparse") and layer["mask_ok"] is not False
        runs = picked == "yes" or (planned and picked == "unknown")
        if not runs and any(size % SPARSE_SIZES for size in layer["shape"][:2]):
            continue
        size = math.prod(layer["shape"])
        eligible += size
        if runs:
            sparse += size
        else:
            missing.append((size, layer["name"], _why_dense(layer)))
    missing.sort(key=lambda item: item[0], reverse=True)
    return SparseShare(eligible, sparse, tuple((name, why) for _, name, why in missing), known)


def _why_dense(layer: Mapping[str, Any]) -> str:
    chain = layer.get("sparse_kernel") or {}
    if layer["reasons"]:
        return "; ".join(layer["reasons"])
    if chain.get("reason"):
        return str(chain["reason"])
    if not layer["requested"]["sparsity"]:
        return "no rule asks for it"
    return str(layer["execution"]["why"])


def no_top1(report: Report) -> str:
    """Why there is no top-1 to compare."""
    if not report["metrics"]:
        return "there is no labelled eval_data to measure it on"
    names = ", ".join(next(iter(report["metrics"].values())))
    return (
        "eval_data has no class labels or the model no logits to measure it on; "
        f"metrics() ({names}) are reported, and no gate compares them"
    )


def missed_remarks(report: Report) -> list[str]:
    """Every remark of something asked for and not done, as one line each."""
    return [
        f"{step['name']}: {remark['layer'] or '-'}: {remark['reason']}"
        for step in report["passes"]
        for remark in step["remarks"]
        if remark["kind"] == "missed"
    ]


def check_gates(report: Report, gates: Gates) -> None:
    """Raise CheckFailed for the first gate that does not hold, with by how much."""
    if gates.max_drop is not None:
        _check_drop(report, gates.max_drop)
    if gates.require_sparse is not None:
        _check_sparse(report, gates.require_sparse)
    if gates.strict and (left := missed_remarks(report)):
        more = f" (and {len(left) - 1} more)" if len(left) > 1 else ""
        raise CheckFailed("strict", f"{left[0]}{more}")


def _check_drop(report: Report, limit: float) -> None:
    dense, final = report["accuracy"].get("dense"), report["accuracy"].get("onnx")
    if dense is None or final is None:
        raise CheckFailed("max-drop", f"--max-drop compares top-1, but {no_top1(report)}")
    drop = 100.0 * (dense - final)
    if drop > limit:
        raise CheckFailed(
            "max-drop",
            f"top-1 fell by {drop:.2f} points, from {dense:.2%} to {final:.2%}; "
            f"the gate allows {limit:g}",
        )


def _check_sparse(report: Report, limit: float) -> None:
    found = sparse_share(report)
    if not found.eligible:
        raise CheckFailed(
            "require-sparse",
            "no layer of this model has sizes that sparse kernels take (multiples of "
            f"{SPARSE_SIZES}), and the gate asks for {limit:.1%} of them",
        )
    if found.share < limit:
        _, why = found.missing[0]
        alike = [other for other, reason in found.missing if reason == why]
        what = "run on sparse kernels" if found.picked_known else "have sparse kernels"
        raise CheckFailed(
            "require-sparse",
            f"{found.share:.1%} of the weights that could be sparse {what}, the gate asks for "
            f"{limit:.1%}; not {listed(alike)}: {why}",
        )
