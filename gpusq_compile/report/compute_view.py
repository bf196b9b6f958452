"""The compute figures on the terminal."""

from __future__ import annotations

from typing import Any

PAPER = "GPUSQ-ViT: 31x in INT8, 62x in INT4"
HARDWARE = "as on INT4 tensor cores; TensorRT multiplies INT8"


def compute_lines(report: dict[str, Any]) -> list[str]:
    """MACs, and how many times fewer bit operations and equivalent FLOPs are left of them."""
    compute = report.get("compute")
    if not compute or not compute["model"]["macs"]:
        return []
    model, gemms = compute["model"], compute["compressed_gemms"]
    attention = compute["attention"]["macs"] / model["macs"]
    lines = [
        f"compute: {_giga(model['macs'])} MACs a sample, {attention:.1%} of them attention products"
    ]
    if gemms["macs"]:
        lines.append(
            f"equivalent FLOPs: compressed GEMMs {_times(gemms['equivalent_flops'])} fewer than "
            f"FP32, whole model {_times(model['equivalent_flops'])} ({PAPER}); bit operations: "
            f"{_times(gemms['bit_operations'])}, {_times(model['bit_operations'])}"
        )
        four_bits = [
            operator
            for operator in compute["operators"]
            if operator["weight"] == operator["activation"] == "int4"
        ]
        if four_bits:
            lines.append(f"  INT4 x INT4 {HARDWARE}")
    return lines


def _giga(count: int) -> str:
    for unit, size in (("G", 1e9), ("M", 1e6)):
        if count >= size / 10:
            return f"{count / size:.3g} {unit}"
    return f"{count / 1e3:.3g} k"


def _times(change: dict[str, float | None]) -> str:
    ratio = change["ratio"]
    return "-" if ratio is None else f"{ratio:.1f}x"
