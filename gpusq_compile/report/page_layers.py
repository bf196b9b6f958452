"""The page's table of layers: what each row says, and what unfolds behind it."""

from __future__ import annotations

import base64
from collections.abc import Mapping
from typing import Any

from gpusq_compile.report.reasons import UNKNOWN
from gpusq_compile.report.terminal import in_bytes

STATES = ("compressed", "refused", "left")
TYPES = (("weight", "W"), ("activation", "A"), ("output", "O"))


def layer_rows(
    report: Mapping[str, Any], evidence: Mapping[str, Any] | None
) -> list[dict[str, Any]]:
    """One row per layer in graph order; numbers with the value that they sort by."""
    seen = evidence["layers"] if evidence else {}
    rows = []
    for index, layer in enumerate(report["layers"], start=1):
        found = seen.get(layer["name"], {})
        size = layer.get("packed_bytes") or layer.get("weight_bytes")
        rows.append(
            {
                "number": index,
                "name": layer["name"],
                "role": layer["role"] or UNKNOWN,
                "shape": "×".join(str(side) for side in layer["shape"]),
                "state": state_of(layer),
                "pattern": layer["applied"]["sparsity"] or "dense",
                "types": types_of(layer["applied"]),
                "kind": layer.get("execution", {}).get("kind", UNKNOWN),
                "engine": engine_type(layer),
                "weight_db": found.get("weight_db"),
                "output_db": found.get("output_db"),
                "bytes": size,
                "size": in_bytes(size) if size else UNKNOWN,
                "why": why(layer),
            }
        )
    return rows


def state_of(layer: Mapping[str, Any]) -> str:
    if layer["reasons"]:
        return "refused"
    return "compressed" if any(layer["applied"].values()) else "left"


def treatment(applied: Mapping[str, str | None]) -> str:
    """`2:4 · int8` where all types are one, else `2:4 · W int8 · O int4`; dense where nothing."""
    parts = [applied["sparsity"], types_of(applied)]
    return " · ".join(part for part in parts if part) or "dense"


def types_of(applied: Mapping[str, str | None]) -> str:
    types = {short: str(applied[key]) for key, short in TYPES if applied[key]}
    if len(types) == len(TYPES) and len(set(types.values())) == 1:
        return next(iter(types.values()))
    return " · ".join(f"{short} {name}" for short, name in types.items())


def engine_type(layer: Mapping[str, Any]) -> str | None:
    """The type in the engine, by target where they differ; None where it is not known."""
    targets = layer.get("engine", {}).get("targets")
    if not targets:
        return None
    if len(set(targets.values())) == 1:
        return str(next(iter(targets.values())))
    return ", ".join(f"{target} {name}" for target, name in targets.items())


def why(layer: Mapping[str, Any]) -> str:
    """Why the layer was refused, or else what it runs as and why, and where sparsity ends."""
    sentences = list(layer["reasons"])
    if not sentences and (text := layer.get("execution", {}).get("why")):
        sentences.append(text)
    chain = layer.get("sparse_kernel") or {}
    if chain.get("reason") and "refused" not in chain.get("causes", ()):
        sentences.append(f"no sparse kernel: {chain['reason']}")
    return "; ".join(sentences)


def layer_details(
    report: Mapping[str, Any], evidence: Mapping[str, Any] | None
) -> list[dict[str, Any]]:
    """What unfolds behind each row, for the script: texts by title, and a histogram."""
    seen = evidence["layers"] if evidence else {}
    remarks: dict[str, list[str]] = {}
    for entry in report["passes"]:
        for remark in entry["remarks"]:
            if remark["layer"]:
                said = "" if remark["kind"] == "passed" else f"{remark['kind']}: "
                text = f"{entry['name']}: {said}{remark['reason']}"
                remarks.setdefault(remark["layer"], []).append(text)
    details = []
    for layer in report["layers"]:
        found = seen.get(layer["name"], {})
        facts = {
            "operator": [f"{layer['op']} {'×'.join(str(side) for side in layer['shape'])}"],
            "asked for": [treatment(layer["requested"])],
            "applied": [treatment(layer["applied"])],
            "refused": list(layer["reasons"]),
            "rules": list(layer.get("rules", ())),
            "passes": remarks.get(layer["name"], []),
            "errors": errors(found),
            "engine": engine_facts(layer),
        }
        details.append(
            {
                "facts": [[title, lines] for title, lines in facts.items() if lines],
                "histogram": packed_histogram(found.get("histogram") or []),
                "zeros": found.get("zeros"),
            }
        )
    return details


def errors(found: Mapping[str, Any]) -> list[str]:
    names = {
        "pruning_db": "pruning",
        "weight_db": "weight rounding",
        "activation_db": "input rounding",
        "output_db": "output against the dense layer's",
    }
    return [
        f"{name} {found[key]:.1f} dB" for key, name in names.items() if found.get(key) is not None
    ]


def engine_facts(layer: Mapping[str, Any]) -> list[str]:
    engine = layer.get("engine", {})
    facts = [f"{target}: {name}" for target, name in engine.get("targets", {}).items()]
    if engine.get("reason"):
        facts.append(str(engine["reason"]))
    if chain := layer.get("sparse_kernel"):
        checked = {True: "yes", False: "no", None: "not checked"}[chain["mask_ok"]]
        facts.append(
            f"{chain['requested']} requested; mask verified: {checked}; "
            f"eligible: {chain['eligible']}; picked: {chain['picked']}"
        )
    return facts


def packed_histogram(counts: list[int]) -> str:
    """Heights as bytes in base64, level zero cut at the highest of the others."""
    if not counts:
        return ""
    zero = len(counts) // 2
    most = max([*counts[:zero], *counts[zero + 1 :]], default=0) or 1
    heights = bytes(min(255, -(-255 * count // most)) for count in counts)
    return base64.b64encode(heights).decode()
