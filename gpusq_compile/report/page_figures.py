"""The page's figures: losses, errors over depth, storage, masks, histograms."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

from gpusq_compile.report import svg
from gpusq_compile.report.terminal import in_bytes

PARTS = (
    ("total", "total", "s1", None),
    ("hard", "hard label", "s2", "alpha"),
    ("soft", "soft logits", "s3", "beta"),
    ("feature", "features", "s4", "gamma"),
)
PHASES = {
    "sparse": "Sparse phase: dense teaches sparse",
    "quantize": "Quantized phase: sparse teaches quantized",
}
ERRORS = (
    ("pruning_db", "pruning", "the dense weight against itself under its mask"),
    ("weight_db", "weight rounding", "the float weight against its integers"),
    ("activation_db", "input rounding", "the layer's input against its quantized self"),
    ("output_db", "output", "against the dense layer's, with all errors of the layers before"),
)
DB_LIMITS = (6.0, 12.0, 20.0, 30.0, 40.0)
MOST_HISTOGRAMS = 8
SOURCES = {
    "eval_data": "evaluation images",
    "calibration_data": "calibration images",
    "train_data": "training images",
    "noise": "samples of generated noise",
    "example_inputs": "example inputs",
}


def losses(report: Mapping[str, Any], evidence: Mapping[str, Any] | None) -> list[dict[str, Any]]:
    """One entry per phase: its chart with a legend, or why it did not run.

    The parts are drawn as they add up to the total, where their factors are known.
    """
    factors = (evidence or {}).get("loss_weights") or {}
    found = []
    for name, title in PHASES.items():
        phase = report["finetune"].get(name)
        if phase is None:
            continue
        curve = phase.get("loss") or []
        entry: dict[str, Any] = {"name": name, "title": title, "reason": phase.get("reason")}
        if curve:
            lines, legend = [], []
            for key, label, style, factor in PARTS:
                weight = float(factors.get(factor, 1.0)) if factor else 1.0
                values = [None if p.get(key) is None else weight * p[key] for p in curve]
                if not any(values):
                    continue
                text = f"{weight:g} × {label}" if factors and factor else label
                lines.append(svg.Series(text, style, values))
                legend.append((style, text, values[0], values[-1]))
            xs = [point["step"] for point in curve]
            entry["chart"] = svg.line_chart(title, "step", xs, lines)
            entry["legend"] = legend
            entry["said"] = (
                f"{phase['steps']} steps, {phase['images']} images, {phase['seconds']:.0f} s; "
                f"stopped by {phase['stopped_by']}"
            )
        found.append(entry)
    return found


def tap_weights(report: Mapping[str, Any]) -> list[dict[str, Any]]:
    """W_j by tap, and how wide its bar is in percent."""
    weights = (report["finetune"].get("quantize") or {}).get("tap_weights") or {}
    most = max(weights.values(), default=0.0) or 1.0
    return [
        {"name": name, "value": value, "width": 100 * value / most}
        for name, value in weights.items()
    ]


def error_strip(
    report: Mapping[str, Any], evidence: Mapping[str, Any] | None
) -> dict[str, Any] | None:
    """A row of cells per kind of error over the depth; None where nothing was measured."""
    names = [layer["name"] for layer in report["layers"]]
    rows = [(label, hint, errors_of(evidence, key, names)) for key, label, hint in ERRORS]
    return depth_strip(names, rows)


def errors_of(
    evidence: Mapping[str, Any] | None, key: str, names: Sequence[str]
) -> list[float | None]:
    """One kind of error in dB by layer, None where it was not measured."""
    seen = evidence["layers"] if evidence else {}
    return [seen.get(name, {}).get(key) for name in names]


def depth_strip(
    names: Sequence[str], rows: Sequence[tuple[str, str, list[float | None]]]
) -> dict[str, Any] | None:
    """Cells by layer for each row of label, hint and values in dB; None where there are none."""
    shown = [row for row in rows if any(value is not None for value in row[2])]
    if not shown:
        return None
    return {
        "rows": [{"label": label, "hint": hint} for label, hint, _ in shown],
        "svg": svg.strip([[level(value) for value in values] for _, _, values in shown]),
        "first": names[0],
        "last": names[-1],
        "legend": [
            (f"q{i}", text)
            for i, text in enumerate(
                (
                    f"under {DB_LIMITS[0]:g} dB",
                    *(f"{a:g} to {b:g}" for a, b in pairwise(DB_LIMITS)),
                    f"{DB_LIMITS[-1]:g} and more",
                )
            )
        ],
        "data": {
            "names": list(names),
            "labels": [label for label, _, _ in shown],
            "values": [values for _, _, values in shown],
        },
    }


def looked_at(evidence: Mapping[str, Any] | None) -> str | None:
    """How many images of which data: `3 evaluation images`; None where there were none."""
    if not evidence or not evidence["images"]:
        return None
    return f"{evidence['images']} {SOURCES[evidence['source']]}"


def level(value: float | None) -> int | None:
    return None if value is None else sum(value >= limit for limit in DB_LIMITS)


def storage_bars(report: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Two groups of bars: the compressed GEMMs' weights, and the whole model."""
    storage = report["storage"]
    if not storage:
        return []
    paper = storage.get("paper_gemm_ratio")
    groups = []
    if storage["gemm_dense_fp32_bytes"]:
        full = storage["gemm_dense_fp32_bytes"]
        weights = storage.get("packed_gemm_bytes")
        bars = [bar("FP32", full, full), bar("in model.onnx", storage["gemm_bytes"], full)]
        if weights:
            scales = storage["packed_scale_bytes"]
            bars.append(bar("packed, with scales", weights + scales, full, "s3"))
            bars.append(bar("packed", weights, full, "s3"))
        if paper:
            bars.append(bar("the paper", round(full / paper["printed"]), full, "ghost"))
        groups.append({"title": "Weights of the compressed GEMMs", "bars": bars})
    full = storage["dense_fp32_bytes"]
    if full:
        bars = [bar("FP32", full, full), bar("model.onnx", storage["model_bytes"], full)]
        if storage.get("packed_bytes"):
            bars.append(bar("weights.safetensors", storage["packed_bytes"], full, "s3"))
        if paper:
            bars.append(bar("the paper", round(full / paper["printed"]), full, "ghost"))
        groups.append({"title": "Whole model", "bars": bars})
    return groups


def bar(label: str, size: int, full: int, style: str = "s1") -> dict[str, Any]:
    if size == full:
        said = "1×"
    elif size < full:
        said = f"{full / size:.2f}× smaller"
    else:
        said = f"{size / full:.2f}× larger"
    width = 100 * size / full
    text = in_bytes(size)
    return {"label": label, "width": min(width, 100), "size": text, "said": said, "style": style}


def crops(evidence: Mapping[str, Any] | None) -> list[dict[str, Any]]:
    found = []
    for crop in (evidence or {}).get("crops", []):
        rows = len(crop["values"])
        columns = len(crop["values"][0]) if rows else 0
        label = f"{rows} output channels and {columns} input channels of {crop['layer']}"
        found.append(
            {
                **crop,
                "label": label,
                "svg": svg.mask_crop(
                    crop["values"], crop["group"], crop["unit"], crop["type"] == "int4", label
                ),
            }
        )
    return found


def histograms(
    report: Mapping[str, Any], evidence: Mapping[str, Any] | None
) -> list[dict[str, Any]]:
    """For each weight type the sum over all layers, and some layers evenly over the depth."""
    seen = evidence["layers"] if evidence else {}
    by_type: dict[str, list[tuple[str, list[int]]]] = {}
    for layer in report["layers"]:
        counts = seen.get(layer["name"], {}).get("histogram")
        if counts and layer["applied"]["weight"]:
            by_type.setdefault(layer["applied"]["weight"], []).append((layer["name"], counts))
    found = []
    for name, layers in by_type.items():
        total = [sum(column) for column in zip(*(counts for _, counts in layers), strict=True)]
        step = max(1, -(-len(layers) // MOST_HISTOGRAMS))
        picked = layers[::step] if len(layers) > 1 else []
        found.append(
            {
                "type": name,
                "all": one_histogram(f"all {len(layers)} layers", total),
                "layers": [one_histogram(layer, counts) for layer, counts in picked],
            }
        )
    return found


def one_histogram(label: str, counts: Sequence[int]) -> dict[str, Any]:
    end = len(counts) // 2
    total = sum(counts) or 1
    return {
        "label": label,
        "svg": svg.histogram(counts, f"levels of {label}"),
        "end": end,
        "zeros": counts[end] / total,
        "clipped": (counts[0] + counts[-1]) / total,
    }
