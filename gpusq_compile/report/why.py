"""Why a layer is as it is: its rules, what they came to, and what each pass and the engine did.

Works on a report alone, so that a run can be asked about long after it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from gpusq_compile.errors import InputError, nearest
from gpusq_compile.language.patterns import PatternError, compile_pattern
from gpusq_compile.report.names import listed
from gpusq_compile.report.rule_entries import chain_of, misses

Report = Mapping[str, Any]

MANY = frozenset("*?[")
NUMBER = re.compile(r"\d+(\.\d+)?(e[-+]\d+)?")


def explain(report: Report, wanted: str) -> list[dict[str, Any]]:
    """What is known of each layer, attention or tap that `wanted` names, in graph order.

    Args:
        wanted: a name as the report has it, a glob of the rules language (`"**.qkv"`), or `re:`
            and a regular expression.

    Raises:
        InputError: nothing is called so (`unknown-layer`), or the pattern cannot be read.
    """
    entries = _entries(report)
    names = [wanted]
    if wanted not in entries:
        try:
            pattern = compile_pattern(wanted)
        except PatternError as error:
            raise InputError(error.code, f"'{wanted}': {error}") from None
        names = [name for name in entries if pattern.fullmatch(name)]
    if not names:
        raise InputError(
            "unknown-layer",
            f"no layer is called '{wanted}'",
            hint=_nearest(wanted, list(entries)),
        )
    remarks = _remarks_by_layer(report)
    return [_answer(report, *entries[name], remarks.get(name, [])) for name in names]


def _nearest(wanted: str, names: Sequence[str]) -> str:
    """The names that end as what was asked for, or else the nearest one."""
    if not names:
        return "the graph has no layer that rules can speak about"
    last = wanted.strip("*.")
    ends = [name for name in names if f".{name}".endswith(f".{last}")]
    found = ends or [name for name in names if f".{last}." in f".{name}"]
    if last and found:
        pattern = f"**.{last}" if ends else f"**.{last}.**"
        return f"did you mean {listed(found)}? The pattern '{pattern}' takes them all"
    close = nearest(wanted, names)
    return f"did you mean '{close}'?" if close else f"layers are called as '{names[0]}' is"


def _entries(report: Report) -> dict[str, tuple[Mapping[str, Any], str]]:
    """Everything that can be asked about, by name, and what it is; a layer before an attention."""
    kinds = (("layers", "layer"), ("attentions", "attention"), ("taps", "tap"))
    entries: dict[str, tuple[Mapping[str, Any], str]] = {}
    for key, kind in kinds:
        for entry in report.get(key, []):
            entries.setdefault(entry["name"], (entry, kind))
    return entries


def _remarks_by_layer(report: Report) -> dict[str, list[dict[str, Any]]]:
    """What the passes said of each layer, in the order in which they ran."""
    found: dict[str, list[dict[str, Any]]] = {}
    for step in report["passes"]:
        for remark in step["remarks"]:
            if remark["layer"]:
                found.setdefault(remark["layer"], []).append({"pass": step["name"], **remark})
    return found


def _answer(
    report: Report, entry: Mapping[str, Any], kind: str, remarks: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    name = entry["name"]
    rules = report.get("rule_list", [])
    chain = chain_of(entry["rules"], rules)
    deciders = {action: rule["id"] for rule, _ in chain for action in rule["actions"]}
    steps = [
        {
            "id": rule["id"],
            "at": rule["at"],
            "match": rule["match"],
            "actions": {
                action: {
                    "value": value,
                    "overridden_by": deciders[action] if action in lost else None,
                }
                for action, value in rule["actions"].items()
            },
        }
        for rule, lost in chain
    ]
    # A report of an earlier version has the chain in words alone.
    words = entry["rules"] if entry["rules"] and not rules else []
    return {
        "name": name,
        "kind": kind,
        "about": {
            key: entry.get(key)
            for key in ("op", "role", "roles", "module", "shape", "heads", "head_dim", "theta")
            if entry.get(key) not in (None, "", [])
        },
        "rules": steps,
        "rules_in_words": words,
        "not_matched": [
            {"id": rule["id"], "at": rule["at"], "condition": condition}
            for rule, condition in (misses(entry, rules) if kind == "layer" else ())
        ],
        "requested": entry.get("requested", {}),
        "applied": entry.get("applied", {}),
        "refused": entry.get("reasons", []),
        "execution": entry.get("execution"),
        "stored": {
            key: entry[key]
            for key in ("mask_ok", "weight_bytes", "packed_bytes")
            if entry.get(key) is not None
        },
        "remarks": list(remarks),
        "engine": engine_lines(report, name),
        "sparse_kernel": entry.get("sparse_kernel"),
    }


def engine_lines(report: Report, name: str) -> list[str]:
    """What each engine made of a layer or attention, those of logs from elsewhere too."""
    lines = []
    targets = (report.get("engine") or {"targets": {}})["targets"]
    for target, built in targets.items():
        for item in (*built["gemms"], *built.get("attentions", [])):
            if item["name"] == name:
                lines.append(f"{target}: {_in_engine(item)}")
    for log in report.get("engine_logs", []):
        missed = [gemm for gemm in log["missed"] if gemm["layer"] == name]
        chain = log["layers"].get(name)
        if missed:
            lines.append(f"{log['file']}: {missed[0]['type']}: {missed[0]['reason']}")
        if chain is not None:
            lines.append(f"{log['file']}: {_chain(chain)}")
    return lines


def _in_engine(item: Mapping[str, Any]) -> str:
    text = f"{item['actual']}, as planned"
    if item["status"] != "passed":
        text = f"{item['actual']} in place of {item['expected']}"
    why = f": {item['reason']}" if item.get("reason") else ""
    where = f" (in the engine's layer {item['layer']})" if item.get("layer") else ""
    return text + why + where


def _chain(chain: Mapping[str, Any]) -> str:
    mask = {True: "ok", False: "broken", None: "not looked at"}[chain["mask_ok"]]
    text = (
        f"sparse kernel: requested {chain['requested']} -> mask {mask} -> eligible "
        f"{chain['eligible']} -> picked {chain['picked']}"
    )
    return f"{text}: {chain['reason']}" if chain["reason"] else text


def answer_lines(answers: Sequence[Mapping[str, Any]]) -> list[str]:
    """The answers in words; those that differ in what was measured alone once, with a line that
    says so."""
    alike: dict[tuple[str, ...], list[Mapping[str, Any]]] = {}
    for answer in answers:
        alike.setdefault(_but_for_numbers(answer), []).append(answer)
    lines: list[str] = []
    for group in alike.values():
        names = [answer["name"] for answer in group]
        lines += [*([""] if lines else []), names[0], *_body(group[0])]
        if len(group) > 1:
            others = "1 other layer is" if len(group) == 2 else f"{len(group) - 1} other layers are"
            lines.append(f"  {others} alike but for their numbers: {listed(names[1:])}")
    return lines


def _but_for_numbers(answer: Mapping[str, Any]) -> tuple[str, ...]:
    remarks = [{**r, "reason": NUMBER.sub("#", r["reason"])} for r in answer["remarks"]]
    engine = [text.partition(" (")[0] for text in answer["engine"]]
    return tuple(_body({**answer, "stored": {}, "engine": engine, "remarks": remarks}))


def _body(answer: Mapping[str, Any]) -> list[str]:
    lines = [f"  {_about(answer)}"]
    if answer["rules"] or answer["rules_in_words"]:
        lines.append("  rules that match, the last word on each action decides:")
        for step in answer["rules"]:
            lines.append(f"    {step['at']} {step['id']}  ({_match(step['match'])})")
            lines += [
                f"      {action}: {_value(said['value'])}"
                + (f"  (overridden by {said['overridden_by']})" if said["overridden_by"] else "")
                for action, said in step["actions"].items()
            ]
        lines += [f"    {text}" for text in answer["rules_in_words"]]
    else:
        lines.append("  no rule matches it")
    if answer["not_matched"]:
        lines.append("  rules that do not match it, and on what:")
        lines += [
            f"    {miss['at']} {miss['id']}: not {miss['condition']}"
            for miss in answer["not_matched"]
        ]
    for what in ("requested", "applied"):
        if answer[what]:
            lines.append(f"  {what}: {_treatment(answer[what])}")
    lines += [f"  refused: {reason}" for reason in answer["refused"]]
    if answer["execution"]:
        lines.append(f"  runs as: {answer['execution']['kind']} ({answer['execution']['why']})")
    if answer["stored"]:
        lines.append(f"  stored: {_stored(answer['stored'])}")
    if answer["remarks"]:
        lines.append("  what the passes did:")
        lines += [
            f"    {r['pass']}: {r['kind']} [{r['code']}]: {r['reason']}" for r in answer["remarks"]
        ]
    if answer["engine"]:
        lines.append("  what the engine did:")
        lines += [f"    {text}" for text in answer["engine"]]
    if answer["sparse_kernel"]:
        lines.append(f"  {_chain(answer['sparse_kernel'])}")
    return lines


def _about(answer: Mapping[str, Any]) -> str:
    about = answer["about"]
    parts = [str(about.get("op") or answer["kind"])]
    if "shape" in about:
        parts[0] += f", weight {' x '.join(str(size) for size in about['shape'])}"
    if "heads" in about:
        parts[0] += f", {about['heads']} heads of {about['head_dim']}"
    roles = about.get("roles") or ([about["role"]] if "role" in about else [])
    parts.append(f"role {', '.join(roles)}" if roles else "no role")
    if "module" in about:
        parts.append(f"a {about['module'].rpartition('.')[2]}")
    return ", ".join(parts)


def _match(match: Mapping[str, Any]) -> str:
    return ", ".join(f"{key}: {_value(value)}" for key, value in match.items())


def _value(value: Any) -> str:
    """A value of a rule as it may be written in the file."""
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{key}: {_value(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list | tuple):
        return _value(value[0]) if len(value) == 1 else f"[{_joined(value)}]"
    if isinstance(value, str) and (":" in value or MANY & set(value)):
        return f'"{value}"'
    return "none" if value is None else str(value).lower() if value in (True, False) else str(value)


def _joined(values: Iterable[Any]) -> str:
    return ", ".join(_value(item) for item in values)


def _treatment(treatment: Mapping[str, str | None]) -> str:
    """`2:4 sparsity, int8 weight`, or that nothing is done."""
    return ", ".join(f"{what} {value}" for what, value in treatment.items() if value) or "nothing"


def _stored(stored: Mapping[str, Any]) -> str:
    words = []
    if "mask_ok" in stored:
        words.append("mask verified" if stored["mask_ok"] else "mask broken")
    if "weight_bytes" in stored:
        words.append(f"{stored['weight_bytes']} bytes in model.onnx")
    if "packed_bytes" in stored:
        words.append(f"{stored['packed_bytes']} packed")
    return ", ".join(words)
