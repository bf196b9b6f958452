"""What the page says in words and small tables: the summary, the engine, the passes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

from gpusq_compile.report.reasons import UNKNOWN
from gpusq_compile.report.sparse_view import STEPS, answer
from gpusq_compile.report.terminal import against_fp32, in_bytes

STAGES = ("dense", "sparse", "quantized", "onnx")
FINAL = ("onnx", "quantized", "sparse", "dense")
MOST_NAMES = 3


def headline(report: Mapping[str, Any]) -> str:
    """One sentence: what most compressed layers run as, and what it cost."""
    layers = report["layers"]
    changed = [layer for layer in layers if any(layer["applied"].values())]
    if not changed:
        return f"No layer of {len(layers)} was compressed."
    kinds = Counter(layer.get("execution", {}).get("kind", UNKNOWN) for layer in changed)
    kind, count = kinds.most_common(1)[0]
    text = f"{count} of {len(layers)} layers run as {kind}"
    weights = Counter(layer["applied"]["weight"] for layer in changed).most_common(1)[0][0]
    if weights and weights not in kind:
        text += f" with {weights} values"
    stage, value = final_accuracy(report)
    dense = report["accuracy"].get("dense")
    if value is None:
        return f"{text}; accuracy was not measured."
    change = "" if dense is None or stage == "dense" else f" ({points(value - dense)})"
    return f"{text}; top-1 is {100 * value:.2f} %{change}."


def final_accuracy(report: Mapping[str, Any]) -> tuple[str | None, float | None]:
    """Top-1 of the last model that was measured."""
    for stage in FINAL:
        if (value := report["accuracy"].get(stage)) is not None:
            return stage, value
    return None, None


def points(change: float) -> str:
    text = f"{100 * change:+.2f} points".replace("-", "\u2212")
    return "unchanged" if text.startswith(("+0.00", "\u22120.00")) else text


def tiles(report: Mapping[str, Any]) -> list[dict[str, str]]:
    """The figures at the top: title, value and a line below."""
    found = [
        accuracy_tile(report),
        layers_tile(report),
        *size_tiles(report),
        compute_tile(report),
        verify_tile(report),
        engine_tile(report),
    ]
    return [tile for tile in found if tile]


def tile(title: str, value: str, below: str, mood: str = "") -> dict[str, str]:
    return {"title": title, "value": value, "below": below, "mood": mood}


def accuracy_tile(report: Mapping[str, Any]) -> dict[str, str]:
    stage, value = final_accuracy(report)
    dense = report["accuracy"].get("dense")
    if value is None:
        names = [name for metrics in report.get("metrics", {}).values() for name in metrics]
        below = "own metrics: see below" if names else "no labelled eval_data"
        return tile("Top-1", "–", below)
    if dense is None or stage == "dense":
        return tile("Top-1", f"{100 * value:.2f} %", f"of the {stage} model")
    return tile(
        "Top-1", f"{100 * value:.2f} %", f"dense {100 * dense:.2f} %: {points(value - dense)}"
    )


def layers_tile(report: Mapping[str, Any]) -> dict[str, str]:
    layers = report["layers"]
    changed = sum(any(layer["applied"].values()) for layer in layers)
    refused = sum(bool(layer["reasons"]) for layer in layers)
    below = f"{refused} refused" if refused else "none refused"
    return tile(
        "Compressed", f"{changed} of {len(layers)}", f"layers; {below}", "warn" * bool(refused)
    )


def size_tiles(report: Mapping[str, Any]) -> list[dict[str, str]]:
    storage = report["storage"]
    if not storage:
        return []
    ratio = storage["model_ratio"]
    below = against_fp32(ratio).replace("x ", "× ", 1) if ratio else ""
    found = [tile("model.onnx", in_bytes(storage["model_bytes"]), below)]
    if storage.get("packed_bytes"):
        below = against_fp32(storage["packed_model_ratio"]).replace("x ", "× ", 1)
        if storage.get("packed_gemm_ratio"):
            below += f"; GEMMs {storage['packed_gemm_ratio']:.2f}×"
        found.append(tile("Packed weights", in_bytes(storage["packed_bytes"]), below))
    if report["error"]:
        # What fails a check or a gate leaves its report alone.
        for entry in found:
            entry["below"] += f"; not written: {report['error']['code']}"
    return found


def compute_tile(report: Mapping[str, Any]) -> dict[str, str]:
    compute = report.get("compute")
    ratio = compute["model"]["equivalent_flops"]["ratio"] if compute else None
    if not ratio:
        return {}
    gemms = compute["compressed_gemms"]["equivalent_flops"]["ratio"] if compute else None
    below = "fewer equivalent FLOPs"
    if gemms:
        below += f"; {gemms:.1f}× in GEMMs"
    return tile("Compute", f"{ratio:.1f}×", below)


def verify_tile(report: Mapping[str, Any]) -> dict[str, str]:
    verify = report["verify"]
    if not verify:
        return tile("Verified", "no", "the run ended before it", "bad")
    found = verify["numerics"]
    cosine = found["min_cosine"]
    faults = len(verify["structure"]["faults"])
    below = f"least cosine of {found['samples']} samples, ONNX Runtime"
    if faults:
        below = f"{faults} faults in the stored layers"
    value = UNKNOWN if cosine is None else f"{cosine:.4f}"
    return tile(
        "Verified" if verify["ok"] else "Verification failed",
        value,
        below,
        "" if verify["ok"] else "bad",
    )


def engine_tile(report: Mapping[str, Any]) -> dict[str, str]:
    engine = report["engine"]
    if not engine or not engine["targets"]:
        return tile("Engine", "none", "was built here")
    target, built = next(iter(engine["targets"].items()))
    right = sum(gemm["status"] == "passed" for gemm in built["gemms"])
    total = len(built["gemms"])
    below = f"GEMMs in the planned type, {engine['backend']}, {target}"
    return tile("Engine", f"{right} of {total}", below, "warn" * (right < total))


def missed_groups(report: Mapping[str, Any]) -> list[dict[str, Any]]:
    """What was asked for and not done: each code and reason once, with the layers that it hit."""
    groups: dict[tuple[str, str, str], list[str]] = {}
    for entry in report["passes"]:
        for remark in entry["remarks"]:
            if remark["kind"] == "missed":
                key = (entry["name"], remark["code"], remark["reason"])
                layers = groups.setdefault(key, [])
                if remark["layer"]:
                    layers.append(remark["layer"])
    found = []
    for (step, code, reason), layers in groups.items():
        names = ", ".join(layers[:MOST_NAMES])
        more = len(layers) - MOST_NAMES
        found.append(
            {
                "pass": step,
                "code": code,
                "reason": reason,
                "count": len(layers),
                "layers": names + (f" and {more} more" if more > 0 else ""),
            }
        )
    return found


def accuracy_rows(report: Mapping[str, Any]) -> dict[str, Any]:
    """Top-1 and the user's metrics by stage, with the change against the dense model."""
    metrics = report.get("metrics", {})
    names = list(dict.fromkeys(name for values in metrics.values() for name in values))
    rows = []
    for stage in dict.fromkeys((*STAGES, *metrics)):
        top1 = report["accuracy"].get(stage)
        own = [metrics.get(stage, {}).get(name) for name in names]
        if top1 is None and all(value is None for value in own):
            continue
        dense = report["accuracy"].get("dense")
        change = None if top1 is None or dense is None or stage == "dense" else points(top1 - dense)
        rows.append({"stage": stage, "top1": top1, "change": change, "own": own})
    return {"names": names, "rows": rows}


def compute_rows(report: Mapping[str, Any]) -> list[dict[str, Any]]:
    compute = report.get("compute")
    if not compute or not compute["model"]["macs"]:
        return []
    titles = {
        "compressed_gemms": "compressed GEMMs",
        "gemms": "all GEMMs",
        "attention": "attention products",
        "model": "whole model",
    }
    return [
        {
            "title": title,
            "macs": compute[key]["macs"] / 1e6,
            "bits": compute[key]["bit_operations"]["ratio"],
            "flops": compute[key]["equivalent_flops"]["ratio"],
        }
        for key, title in titles.items()
        if compute[key]["macs"]
    ]


def engine_targets(report: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Each engine with how many GEMMs it computes in which type, and those that fell back."""
    engine = report["engine"] or {"targets": {}}
    found = []
    for target, built in engine["targets"].items():
        types = Counter(gemm["actual"] for gemm in built["gemms"])
        total = sum(types.values()) or 1
        attentions = Counter(item["status"] for item in built.get("attentions", ()))
        found.append(
            {
                "target": target,
                "file": built["file"],
                "size": in_bytes(built["bytes"]),
                "seconds": built.get("seconds"),
                "types": [
                    {"name": name, "count": count, "width": 100 * count / total}
                    for name, count in types.most_common()
                ],
                "missed": [
                    *(gemm for gemm in built["gemms"] if gemm["status"] == "missed"),
                    *(a for a in built.get("attentions", ()) if a["status"] == "missed"),
                ],
                "fused": attentions["passed"],
                "attentions": sum(attentions.values()),
            }
        )
    return found


def chain_rows(report: Mapping[str, Any]) -> dict[str, Any] | None:
    """Sparse kernels by role: requested, mask verified, eligible, picked; why it ends."""
    roles: dict[str, list[dict[str, Any]]] = {}
    reasons: Counter[str] = Counter()
    for layer in report["layers"]:
        if chain := layer.get("sparse_kernel"):
            roles.setdefault(layer["role"] or UNKNOWN, []).append(chain)
            if chain["reason"]:
                reasons[chain["reason"]] += 1
    if not roles:
        return None
    rows = [{"role": role, "counts": counts(chains)} for role, chains in roles.items()]
    if len(rows) > 1:
        every = [chain for chains in roles.values() for chain in chains]
        rows.append({"role": "all", "counts": counts(every)})
    return {"rows": rows, "reasons": reasons.most_common(8)}


def counts(chains: list[dict[str, Any]]) -> list[str]:
    found = [str(len(chains))]
    for step in STEPS:
        answers = [answer(chain, step) for chain in chains]
        known = [value for value in answers if value is not None]
        unknown = len(answers) - len(known)
        text = str(sum(known)) if known else "not told"
        found.append(f"{text} (+{unknown} not told)" if known and unknown else text)
    return found


def pass_rows(report: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Each pass with its share of the longest time, and remarks that belong to no single layer."""
    longest = max((entry["seconds"] for entry in report["passes"]), default=0) or 1
    return [
        {
            **entry,
            "width": 100 * entry["seconds"] / longest,
            "kinds": Counter(remark["kind"] for remark in entry["remarks"]),
            "general": [remark for remark in entry["remarks"] if not remark["layer"]],
        }
        for entry in report["passes"]
    ]
