"""Two runs compared: layers whose treatment changed, accuracy, size, engine types, verification."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from gpusq_compile.report.names import listed

Report = Mapping[str, Any]

NONE = "-"
CHECKED = ("min_cosine", "top1_agreement", "max_difference")


def compare(first: Report, second: Report) -> dict[str, Any]:
    """What changed from the first report to the second, as plain values.

    Every change is a pair [before, after]; what is the same in both is left out, and so are times,
    which no two runs share.
    """
    return {
        "first": first["model"],
        "second": second["model"],
        "run": {
            key: pair
            for key in ("status", "error", "model", "scope", "rules", "target", "seed", "device")
            if (pair := _pair(first.get(key), second.get(key)))
        },
        "layers": _entries(first["layers"], second["layers"], _layer_facts),
        "attentions": _entries(
            first.get("attentions", []), second.get("attentions", []), _attention_facts
        ),
        "taps": _entries(first.get("taps", []), second.get("taps", []), lambda tap: {}),
        "accuracy": _pairs(first["accuracy"], second["accuracy"]),
        "metrics": _pairs(_flat(first.get("metrics", {})), _flat(second.get("metrics", {}))),
        "finetune": _pairs(_phases(first), _phases(second)),
        "verify": _pairs(_verified(first), _verified(second)),
        "storage": _pairs(first["storage"] or {}, second["storage"] or {}),
        "compute": _pairs(_computed(first), _computed(second)),
        "engine": _pairs(_engines(first), _engines(second)),
        "remarks": _entries_of_remarks(first, second),
    }


def is_same(found: Mapping[str, Any]) -> bool:
    """Whether a comparison found nothing at all."""
    parts = [part for name, part in found.items() if name not in ("first", "second")]
    return not any(any(part.values()) for part in parts)


def _pair(before: Any, after: Any) -> list[Any] | None:
    return None if before == after else [before, after]


def _pairs(before: Mapping[str, Any], after: Mapping[str, Any]) -> dict[str, list[Any]]:
    keys = dict.fromkeys((*before, *after))
    found = {key: _pair(before.get(key), after.get(key)) for key in keys}
    return {key: pair for key, pair in found.items() if pair}


def _flat(values: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    return {f"{outer}.{inner}": v for outer, items in values.items() for inner, v in items.items()}


def _entries(
    before: Any, after: Any, facts_of: Callable[[Mapping[str, Any]], dict[str, Any]]
) -> dict[str, Any]:
    """The entries of a list by name: which are in one report alone, and what changed of others."""
    old, new = ({entry["name"]: entry for entry in entries} for entries in (before, after))
    changed = {
        name: _pairs(facts_of(old[name]), facts_of(new[name])) for name in old if name in new
    }
    return {
        "only_first": [name for name in old if name not in new],
        "only_second": [name for name in new if name not in old],
        "changed": {name: pairs for name, pairs in changed.items() if pairs},
    }


def _layer_facts(layer: Mapping[str, Any]) -> dict[str, Any]:
    chain = layer.get("sparse_kernel") or {}
    return {
        "shape": "x".join(str(size) for size in layer["shape"]),
        "role": layer["role"],
        **{f"requested {what}": value for what, value in layer["requested"].items()},
        **{f"applied {what}": value for what, value in layer["applied"].items()},
        "refused": "; ".join(layer["reasons"]) or None,
        "runs as": layer.get("execution", {}).get("kind"),
        "mask ok": layer["mask_ok"],
        "engine type": layer["engine"]["type"],
        "sparse kernel eligible": chain.get("eligible"),
        "sparse kernel picked": chain.get("picked"),
    }


def _attention_facts(attention: Mapping[str, Any]) -> dict[str, Any]:
    return {
        **{f"requested {what}": value for what, value in attention["requested"].items()},
        **{f"applied {what}": value for what, value in attention["applied"].items()},
        "refused": "; ".join(attention["reasons"]) or None,
        "engine type": attention["engine"]["type"],
    }


def _phases(report: Report) -> dict[str, Any]:
    found = {}
    for name, phase in report["finetune"].items():
        found[f"{name} steps"] = phase["steps"]
        found[f"{name} stopped by"] = phase["stopped_by"]
        if phase["loss"]:
            found[f"{name} last loss"] = phase["loss"][-1]["total"]
    return found


def _verified(report: Report) -> dict[str, Any]:
    verify = report["verify"]
    if not verify:
        return {}
    return {
        "ok": verify["ok"],
        "faults": len(verify["structure"]["faults"]),
        **{key: verify["numerics"][key] for key in CHECKED},
    }


def _computed(report: Report) -> dict[str, Any]:
    compute = report.get("compute")
    if not compute:
        return {}
    return {
        f"{part} {what}": compute[part][what]["ratio"]
        for part in ("compressed_gemms", "model")
        for what in ("bit_operations", "equivalent_flops")
    }


def _engines(report: Report) -> dict[str, Any]:
    engine = report["engine"] or {"targets": {}}
    found: dict[str, Any] = {}
    if engine["targets"]:
        found["builder"] = f"{engine['backend']} {engine['version']}"
    for target, built in engine["targets"].items():
        found[f"{target} bytes"] = built["bytes"]
        found[f"{target} GEMMs in the planned type"] = _right(built)
    for log in report.get("engine_logs", []):
        found[f"{log['file']} picked"] = log["picked"]
        found[f"{log['file']} median ms"] = log["median_ms"]
    return found


def _right(built: Mapping[str, Any]) -> str:
    gemms = built["gemms"]
    return f"{sum(gemm['status'] == 'passed' for gemm in gemms)} of {len(gemms)}"


def _entries_of_remarks(first: Report, second: Report) -> dict[str, list[str]]:
    """What was missed in one run alone."""

    def missed(report: Report) -> dict[str, None]:
        found = (
            f"{step['name']}: {remark['layer'] or NONE}: {remark['reason']}"
            for step in report["passes"]
            for remark in step["remarks"]
            if remark["kind"] == "missed"
        )
        return dict.fromkeys(found)

    old, new = missed(first), missed(second)
    return {
        "only_first": [text for text in old if text not in new],
        "only_second": [text for text in new if text not in old],
    }


@dataclass(frozen=True)
class Fact:
    """One thing that changed, as text. `change` is by how much, empty where that says nothing."""

    what: str
    before: str
    after: str
    change: str = ""


@dataclass(frozen=True)
class Alike:
    """Layers, attentions or taps that changed alike."""

    names: list[str]
    facts: list[Fact]


def facts(found: Mapping[str, Any]) -> dict[str, list[Fact]]:
    """What changed of the whole model, by the part of the comparison."""
    parts = {part: _plain(found[part]) for part in ("run", "metrics", "finetune", "verify")}
    parts["accuracy"] = [
        Fact(stage, _percent(before), _percent(after), _points(before, after))
        for stage, (before, after) in found["accuracy"].items()
    ]
    parts["storage"] = [
        Fact(key.replace("_", " "), _shown(before), _shown(after), _times(before, after))
        for key, (before, after) in found["storage"].items()
    ]
    parts["compute"] = [
        Fact(key.replace("_", " "), f"{_shown(before)}x", f"{_shown(after)}x")
        for key, (before, after) in found["compute"].items()
    ]
    parts["engine"] = _plain(found["engine"])
    return parts


def alike(entries: Mapping[str, Any]) -> list[Alike]:
    """The entries of a list that changed, those that changed alike together."""
    groups: dict[tuple[Fact, ...], list[str]] = {}
    for name, pairs in entries["changed"].items():
        groups.setdefault(tuple(_plain(pairs)), []).append(name)
    return [Alike(names, list(changed)) for changed, names in groups.items()]


def comparison_lines(found: Mapping[str, Any]) -> list[str]:
    """A comparison in words; layers that changed alike are said once."""
    if is_same(found):
        return ["nothing changed but times"]
    parts = facts(found)
    lines = [*_lines("run, ", parts["run"])]
    for kind in ("layers", "attentions", "taps"):
        lines += _changed_entries(kind, found[kind])
    lines += _lines("top-1 ", parts["accuracy"])
    for part in ("metrics", "finetune", "verify"):
        lines += _lines(f"{part}, ", parts[part])
    lines += _lines("", parts["storage"])
    lines += [f"{line} fewer" for line in _lines("compute, ", parts["compute"])]
    lines += _lines("engine, ", parts["engine"])
    lines += [f"no longer missed: {text}" for text in found["remarks"]["only_first"]]
    lines += [f"newly missed: {text}" for text in found["remarks"]["only_second"]]
    return lines


def _plain(pairs: Mapping[str, Any]) -> list[Fact]:
    return [Fact(key, _shown(before), _shown(after)) for key, (before, after) in pairs.items()]


def _lines(title: str, changed: Iterable[Fact]) -> Iterator[str]:
    for fact in changed:
        more = fact.change and f" ({fact.change})"
        yield f"{title}{fact.what}: {fact.before} -> {fact.after}{more}"


def _changed_entries(kind: str, entries: Mapping[str, Any]) -> Iterator[str]:
    for side, words in (("only_first", "only in the first"), ("only_second", "only in the second")):
        if names := entries[side]:
            yield f"{kind} {words}: {len(names)}: {listed(names)}"
    if entries["changed"]:
        yield f"{kind} treated otherwise: {len(entries['changed'])}"
    for group in alike(entries):
        count = f"{len(group.names)}: " if len(group.names) > 1 else ""
        yield f"  {count}{listed(group.names)}: {'; '.join(_lines('', group.facts))}"


def _shown(value: Any) -> str:
    if value is None:
        return NONE
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, list):
        return ", ".join(str(item) for item in value) or NONE
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {_shown(item)}" for key, item in value.items())
    return str(value)


def _percent(value: float | None) -> str:
    return NONE if value is None else f"{value:.2%}"


def _points(before: float | None, after: float | None) -> str:
    if before is None or after is None:
        return ""
    return f"{100 * (after - before):+.2f} points"


def _times(before: Any, after: Any) -> str:
    numbers = isinstance(before, int) and isinstance(after, int) and before and after
    return f"{after / before:.2f}x" if numbers else ""
