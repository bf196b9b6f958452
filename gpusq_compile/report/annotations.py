"""Errors and remarks as annotations of GitHub's workflow runs (`--format github`).

The form is that of GitHub's documentation, "Workflow commands for GitHub Actions", section
"Setting an error message". GitHub shows ten warnings and ten errors of a step, so one reason on
many layers is one annotation.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gpusq_compile.errors import GpusqError, Location
from gpusq_compile.language.problems import InputErrors
from gpusq_compile.report.names import listed
from gpusq_compile.report.rule_entries import chain_of

RULE_WARNINGS = frozenset({"rule-shadowed", "pattern-unmatched"})
"""Remarks whose text begins with the place that they are about."""


def error_annotations(error: GpusqError) -> list[str]:
    """`::error`, with the place where there is one; one line for each of several errors."""
    errors = error.errors if isinstance(error, InputErrors) else (error,)
    return [
        annotation(
            "error", "\nhint: ".join(filter(None, (one.message, one.hint))), one.code, one.location
        )
        for one in errors
    ]


def report_annotations(report: Mapping[str, Any]) -> list[str]:
    """`::warning` for everything asked for and not done, at the rule that asked for it; then one
    `::notice` that says what the compile came to."""
    entries = (*report["layers"], *report.get("attentions", []))
    deciding = {entry["name"]: _deciding(report, entry) for entry in entries}
    grouped: dict[tuple[str, str, str, Location | None], list[str]] = {}
    for step in report["passes"]:
        for remark in step["remarks"]:
            code, reason, layer = remark["code"], remark["reason"], remark["layer"]
            if code in RULE_WARNINGS:
                place, _, reason = reason.partition(": warning")
                key = (step["name"], code, reason.partition("]: ")[2], _location(place))
            elif remark["kind"] == "missed":
                key = (step["name"], code, reason, deciding.get(layer))
            else:
                continue
            grouped.setdefault(key, []).extend([layer] if layer else [])
    lines = []
    for (step_name, code, reason, place_found), names in grouped.items():
        on = f"{listed(names)}: " if names else ""
        lines.append(annotation("warning", f"{on}{reason}", f"{step_name}: {code}", place_found))
    return [*lines, annotation("notice", summary(report), "gpusq-compile")]


def summary(report: Mapping[str, Any]) -> str:
    """One line on a whole compile."""
    layers = report["layers"]
    changed = [layer for layer in layers if any(layer["applied"].values())]
    parts = [f"{report['model']}: {report['status']}"]
    parts.append(f"{len(changed)} of {len(layers)} layers compressed")
    accuracy = report["accuracy"]
    if accuracy["dense"] is not None and accuracy["onnx"] is not None:
        parts.append(f"top-1 {accuracy['dense']:.2%} -> {accuracy['onnx']:.2%}")
    if storage := report["storage"]:
        parts.append(f"model.onnx {storage['model_bytes'] / 1e6:.2f} MB")
    return ", ".join(parts)


def annotation(kind: str, message: str, title: str, place: Location | None = None) -> str:
    """One workflow command; a place outside of the current folder is left out, for GitHub knows
    the repository's files alone."""
    properties = {"title": title}
    if place is not None and not Path(place.file).is_absolute() and place.file[:1] != "<":
        properties = {
            "file": place.file,
            **({"line": str(place.line)} if place.line else {}),
            **({"col": str(place.column)} if place.column else {}),
            **properties,
        }
    shown = ",".join(f"{key}={_escaped(value, ':,')}" for key, value in properties.items())
    return f"::{kind} {shown}::{_escaped(message)}"


def _escaped(text: str, more: str = "") -> str:
    for character in "%\r\n" + more:
        text = text.replace(character, f"%{ord(character):02X}")
    return text


def _deciding(report: Mapping[str, Any], entry: Mapping[str, Any]) -> Location | None:
    """The place of the last rule that has a word on a layer."""
    chain = chain_of(entry["rules"], report.get("rule_list", []))
    places = [rule["at"] for rule, lost in chain if set(rule["actions"]) - set(lost)]
    return _location(places[-1]) if places else None


def _location(text: str) -> Location | None:
    """`file:line` or `file:line:column`."""
    parts = text.split(":")
    numbers = [int(part) for part in parts[1:] if part.isdecimal()]
    if not parts[0] or len(numbers) != len(parts) - 1:
        return None
    return Location(parts[0], *numbers[:2])
