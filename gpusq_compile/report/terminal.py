"""The report on the terminal: passes, layers by role, accuracy, sizes, engines, files."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

MOST_REASONS = 8


def show_report(report: dict[str, Any], console: Console, files: Iterable[str] = ()) -> None:
    """Print every view of a report, in the order in which a person asks for it."""
    console.print(pass_table(report))
    console.print(layer_table(report))
    for text in refusals(report):
        console.print(f"  {escape(text)}", soft_wrap=True)
    for text in (*accuracy_lines(report), *size_lines(report), *engine_lines(report)):
        console.print(escape(text), soft_wrap=True)
    for file in files:
        console.print(f"wrote {escape(file)}", soft_wrap=True)


def pass_table(report: dict[str, Any]) -> Table:
    table = Table(title="passes", title_justify="left")
    table.add_column("pass")
    for column in ("matched", "changed", "skipped", "seconds", "change (std)"):
        table.add_column(column, justify="right")
    for entry in report["passes"]:
        change = entry["change"]
        table.add_row(
            entry["name"],
            str(entry["matched"]),
            str(entry["changed"]),
            str(entry["skipped"]),
            f"{entry['seconds']:.2f}",
            "-" if change is None else f"{change:.2e}",
        )
    return table


def layer_table(report: dict[str, Any]) -> Table:
    """One row per role: how many layers, and how many got what was asked."""
    table = Table(title="layers", title_justify="left")
    table.add_column("role")
    for column in ("layers", "requested", "2:4", "int8", "mask verified", "int8 in engine"):
        table.add_column(column, justify="right")
    roles: dict[str, list[dict[str, Any]]] = {}
    for layer in report["layers"]:
        roles.setdefault(layer["role"] or "-", []).append(layer)
    if not roles:
        table.add_row("(none)", "0", "0", "0", "0", "0", "0")
    for role, layers in roles.items():
        table.add_row(role, *(str(count) for count in layer_counts(layers)))
    if len(roles) > 1:
        table.add_section()
        table.add_row("all", *(str(count) for count in layer_counts(report["layers"])))
    return table


def layer_counts(layers: list[dict[str, Any]]) -> list[int]:
    return [
        len(layers),
        sum(any(layer["requested"].values()) for layer in layers),
        sum(layer["applied"]["sparsity"] is not None for layer in layers),
        sum(layer["applied"]["weight"] == "int8" for layer in layers),
        sum(layer["mask_ok"] is True for layer in layers),
        sum(layer["engine"]["type"] == "int8" for layer in layers),
    ]


def refusals(report: dict[str, Any]) -> list[str]:
    """Why requested treatment was not applied: each reason once, with how many layers it hit."""
    counts = Counter(reason for layer in report["layers"] for reason in layer["reasons"])
    lines = [f"refused on {count} layers: {reason}" for reason, count in counts.most_common()]
    more = len(lines) - MOST_REASONS
    return lines[:MOST_REASONS] + ([f"... and {more} more reasons"] if more > 0 else [])


def accuracy_lines(report: dict[str, Any]) -> list[str]:
    known = {name: value for name, value in report["accuracy"].items() if value is not None}
    if not known:
        return ["accuracy: not measured (no labelled eval_data)"]
    return ["top-1: " + ", ".join(f"{name} {value:.2%}" for name, value in known.items())]


def size_lines(report: dict[str, Any]) -> list[str]:
    storage = report["storage"]
    if not storage:
        return []
    line = (
        f"size: model.onnx {storage['model_bytes'] / 1e6:.2f} MB, "
        f"{storage['model_ratio']:.2f}x smaller than FP32"
    )
    if storage["gemm_ratio"]:
        line += f"; compressed GEMMs {storage['gemm_ratio']:.2f}x"
    return [line]


def engine_lines(report: dict[str, Any]) -> list[str]:
    engine = report["engine"]
    if engine is None:
        return []
    lines = [
        f"engine: {built['file']} for {target}, {built['bytes'] / 1e6:.2f} MB, "
        f"{sum(g['status'] == 'passed' for g in built['gemms'])} of {len(built['gemms'])} GEMMs in "
        f"the planned type ({engine['backend']} {engine['version']})"
        for target, built in engine["targets"].items()
    ]
    for target, built in engine["targets"].items():
        lines += [
            f"  missed in {target}: {gemm['name']} is {gemm['actual']}: {gemm['reason']}"
            for gemm in built["gemms"]
            if gemm["status"] == "missed"
        ]
    return lines + [f"engine: {remark}" for remark in engine["remarks"]]
