"""The report on the terminal: passes, layers by role, accuracy, sizes, engines, files.

Tables fit 80 columns; sentences are wrapped where the terminal ends.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from gpusq_compile.console import print_sentence
from gpusq_compile.report.attention import attention_lines
from gpusq_compile.report.compute_view import compute_lines
from gpusq_compile.report.execution_view import execution_lines
from gpusq_compile.report.log_view import log_lines
from gpusq_compile.report.reasons import MOST_REASONS, UNKNOWN, reason_lines
from gpusq_compile.report.sparse_view import legend_lines, sparse_lines, sparse_table

NUMBER = re.compile(r"(?<=[._])\d+(?=[._]|$)|^\d+(?=[._]|$)")
"""The number of a layer among its like: a part of the name (`blocks.3`, `encoder_layer_3`)."""


def show_report(report: dict[str, Any], console: Console, files: Iterable[str] = ()) -> None:
    """Print every view of a report, in the order in which a person asks for it."""
    console.print(pass_table(report))
    console.print(layer_table(report))
    if (sparse := sparse_table(report)) is not None:
        console.print(sparse)
        for text in legend_lines(report):
            print_sentence(console, escape(text))
    views = (
        refusals,
        execution_lines,
        sparse_lines,
        attention_lines,
        finetune_lines,
        accuracy_lines,
        verify_lines,
        size_lines,
        compute_lines,
        engine_lines,
        log_lines,
    )
    for view in views:
        for text in view(report):
            print_sentence(console, escape(text))
    for file in files:
        console.print(f"wrote {escape(file)}", soft_wrap=True)


def show_plan(report: dict[str, Any], console: Console) -> None:
    """Print what the rules decided, of a report that stops there (`--dry-run`)."""
    table = plan_table(report)
    unlimited = console.options.update(max_width=sys.maxsize)
    if console.measure(table, options=unlimited).maximum <= console.width:
        console.print(table)
    else:
        console.print("\n".join(plan_lines(report)), no_wrap=True, overflow="ignore", crop=False)
    for view in (refusals, execution_lines, attention_lines, tap_lines):
        for text in view(report):
            print_sentence(console, escape(text))
    console.print("nothing was written (--dry-run)")


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
            UNKNOWN if change is None else f"{change:.2e}" if change else "0",
        )
    return table


def layer_table(report: dict[str, Any]) -> Table:
    """One row per role: how many layers, how many were asked for, and how many got what."""
    table = Table(title="layers", title_justify="left")
    table.add_column("role", no_wrap=True)
    types = weight_types(report)
    for column in ("layers", "asked", "sparse", *types, "mask ok", "engine ok"):
        table.add_column(column, justify="right", no_wrap=True)
    roles: dict[str, list[dict[str, Any]]] = {}
    for layer in report["layers"]:
        roles.setdefault(layer["role"] or UNKNOWN, []).append(layer)
    if not roles:
        table.add_row("(none)", *["0"] * (3 + len(types)), UNKNOWN, UNKNOWN)
    for role, layers in roles.items():
        table.add_row(role, *layer_counts(report, layers))
    if len(roles) > 1:
        table.add_section()
        table.add_row("all", *layer_counts(report, report["layers"]))
    return table


def weight_types(report: dict[str, Any]) -> list[str]:
    """The integer types that weights were given; INT8 where there were none."""
    types = {layer["applied"]["weight"] for layer in report["layers"]} - {None}
    return sorted(types) or ["int8"]


def layer_counts(report: dict[str, Any], layers: list[dict[str, Any]]) -> list[str]:
    """The columns of `layer_table` after the role; what was not looked at is no zero."""
    right = right_in_engine(report)
    checked = any(layer["mask_ok"] is not None for layer in report["layers"])
    return [
        str(len(layers)),
        str(sum(any(layer["requested"].values()) for layer in layers)),
        str(sum(layer["applied"]["sparsity"] is not None for layer in layers)),
        *(
            str(sum(layer["applied"]["weight"] == name for layer in layers))
            for name in weight_types(report)
        ),
        str(sum(layer["mask_ok"] is True for layer in layers)) if checked else UNKNOWN,
        UNKNOWN if right is None else str(sum(layer["name"] in right for layer in layers)),
    ]


def right_in_engine(report: dict[str, Any]) -> set[str] | None:
    """The layers that every engine computes in the planned type; None without an engine."""
    engine = report["engine"]
    if not engine or not engine["targets"]:
        return None
    return set.intersection(
        *(
            {gemm["name"] for gemm in built["gemms"] if gemm["status"] == "passed"}
            for built in engine["targets"].values()
        )
    )


PLAN_COLUMNS = ("n", "role", "shape", "weight", "activation", "output")


def plan_rows(report: dict[str, Any]) -> list[tuple[str, ...]]:
    """What the rules ask of each layer, layers that differ in numbers alone in one row."""
    rows: dict[tuple[str, ...], list[str]] = {}
    for layer in report["layers"]:
        role = layer["role"] or UNKNOWN
        row = (NUMBER.sub("*", layer["name"]), role, *plan_cells(layer))
        rows.setdefault(row, []).append(layer["name"])
    return [
        (pattern if len(names) > 1 else names[0], str(len(names)), *cells)
        for (pattern, *cells), names in rows.items()
    ]


def plan_table(report: dict[str, Any]) -> Table:
    table = Table(title="plan", title_justify="left")
    for column in ("layers", *PLAN_COLUMNS):
        table.add_column(column, justify="right" if column == "n" else "left", no_wrap=True)
    for name, *cells in plan_rows(report):
        table.add_row(escape(name), *cells)
    return table


def plan_lines(report: dict[str, Any]) -> list[str]:
    """The same for a narrow terminal: under each name its cells."""
    rows = plan_rows(report)
    cells = [PLAN_COLUMNS, *(row[1:] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    texts = ["  ".join(map(str.ljust, row, widths)).rstrip() for row in cells]
    names = ["plan", *(escape(row[0]) for row in rows)]
    return [line for name, text in zip(names, texts, strict=True) for line in (name, f"  {text}")]


def plan_cells(layer: dict[str, Any]) -> tuple[str, str, str, str]:
    asked = layer["requested"]
    shape = "x".join(str(size) for size in layer["shape"])
    if not any(asked.values()):
        return shape, UNKNOWN, UNKNOWN, UNKNOWN
    weight = " ".join(filter(None, (asked["sparsity"], asked["weight"])))
    if layer["reasons"]:
        return shape, f"{weight}: refused", UNKNOWN, UNKNOWN
    return shape, weight or UNKNOWN, asked["activation"] or UNKNOWN, asked["output"] or UNKNOWN


def tap_lines(report: dict[str, Any]) -> list[str]:
    """Where the fine-tune compares features: one line a tap, with its role and feature map."""
    taps = [
        f"  {remark['layer']}: {remark['reason'].removeprefix('distill at ')}"
        for entry in report["passes"]
        for remark in entry["remarks"]
        if remark["code"] == "tap-marked"
    ]
    return ["distilled at:", *taps] if taps else []


def refusals(report: dict[str, Any]) -> list[str]:
    """Why requested treatment was not applied: each reason once, with the layers it hit."""
    pairs = ((layer["name"], reason) for layer in report["layers"] for reason in layer["reasons"])
    return reason_lines("refused on", pairs)


def finetune_lines(report: dict[str, Any]) -> list[str]:
    """One line per phase: how long, the loss at its start and end, and why it ended."""
    lines = []
    for name, phase in report["finetune"].items():
        if phase.get("blocks"):
            lines.append(reconstruction_line(phase))
            continue
        if not phase["steps"]:
            lines.append(f"fine-tune {name}: {phase['reason']}")
            continue
        first, last = (number(phase["loss"][i]["total"], ".4g") for i in (0, -1))
        lines.append(
            f"fine-tune {name}: {phase['steps']} steps in {phase['seconds']:.0f} s, stopped by "
            f"{phase['stopped_by']}; loss {first} -> {last}"
        )
    return lines


def reconstruction_line(phase: dict[str, Any]) -> str:
    """How much closer the blocks came to the dense ones, on average."""
    blocks = phase["blocks"]
    before, after = (
        sum(block[key] for block in blocks) / len(blocks) for key in ("before", "after")
    )
    return (
        f"reconstruct: {len(blocks)} blocks in {phase['seconds']:.0f} s; error {before:.2e} -> "
        f"{after:.2e} of the variance on average"
    )


def verify_lines(report: dict[str, Any]) -> list[str]:
    """What the final ONNX file was checked for, and how far it is from its limits."""
    verify = report["verify"]
    if not verify:
        return []
    found, limits = verify["numerics"], verify["limits"]
    faults = verify["structure"]["faults"]
    agreement = "no top-1, as the outputs are no logits"
    if found["disagreements"] is not None:
        agreement = (
            f"top-1 agreement {number(found['top1_agreement'], '.1%')} "
            f"(limit {limits['min_top1_agreement']:.0%})"
        )
    elif not found.get("floats", True):
        agreement = (
            f"equal answers {number(found['equal_answers'], '.1%')} "
            f"(limit {limits['min_top1_agreement']:.0%})"
        )
    lines = [
        f"ONNX Runtime against the graph on {found['samples']} samples: "
        f"cosine {number(found['min_cosine'], '.4f')} (limit {limits['min_cosine']:g}), "
        f"{agreement}, "
        f"difference {number(found['max_difference'], '.3f')} std "
        f"(limit {limits['max_difference']:g})",
        f"stored layers: {verify['structure']['layers']} checked, {len(faults)} faults",
    ]
    lines += [f"  {fault}" for fault in faults[:MOST_REASONS]]
    more = len(faults) - MOST_REASONS
    return lines + ([f"  ... and {more} more, in report.json"] if more > 0 else [])


def number(value: float | None, form: str) -> str:
    """A number of the report, where null stands for NaN or infinity."""
    return "NaN" if value is None else format(value, form)


def accuracy_lines(report: dict[str, Any]) -> list[str]:
    """Top-1, then each of the user's metrics, at every stage where it was measured."""
    known = {name: value for name, value in report["accuracy"].items() if value is not None}
    lines = metric_lines(report)
    if not known:
        return lines or ["accuracy: not measured (no labelled eval_data)"]
    line = "top-1: " + ", ".join(f"{name} {value:.2%}" for name, value in known.items())
    if "dense" in known and "onnx" in known:
        line += f" ({100 * (known['onnx'] - known['dense']):+.2f} points)"
    return [line, *lines]


def metric_lines(report: dict[str, Any]) -> list[str]:
    by_stage = report.get("metrics", {})
    names = list(dict.fromkeys(name for metrics in by_stage.values() for name in metrics))
    return [
        f"{name}: "
        + ", ".join(
            f"{stage} {number(metrics[name], '.4g')}"
            for stage, metrics in by_stage.items()
            if name in metrics
        )
        for name in names
    ]


def size_lines(report: dict[str, Any]) -> list[str]:
    storage = report["storage"]
    if not storage:
        return []
    line = f"size: model.onnx {in_bytes(storage['model_bytes'])}"
    if storage["model_ratio"]:
        line += f", {against_fp32(storage['model_ratio'])}"
    if storage["gemm_ratio"]:
        line += f"; compressed GEMMs {storage['gemm_ratio']:.2f}x"
    lines = [line, *packed_lines(storage)]
    if report["error"]:
        lines.append(f"neither file was written: {report['error']['code']}")
    return lines


def against_fp32(ratio: float) -> str:
    """FP32 bytes by own bytes, in words."""
    return f"{ratio:.2f}x smaller than FP32" if ratio >= 1 else f"{1 / ratio:.2f}x larger than FP32"


def packed_lines(storage: dict[str, Any]) -> list[str]:
    """The packed weights, with the paper's figure for the same kind of layers."""
    if not storage.get("packed_bytes"):
        return []
    line = (
        f"packed: weights.safetensors {in_bytes(storage['packed_bytes'])}, "
        f"{against_fp32(storage['packed_model_ratio'])}, what is not compressed in its own type"
    )
    if storage["packed_gemm_ratio"]:
        line += (
            f"; GEMMs {storage['packed_gemm_ratio']:.2f}x, "
            f"{storage['packed_gemm_ratio_with_scales']:.2f}x with their scales"
        )
    if paper := storage["paper_gemm_ratio"]:
        printed, derived = paper["printed"], paper["derived"]
        line += f" (the paper: {printed:g}x"
        line += f", {derived:g}x by its own bits)" if derived != printed else ")"
    return [line]


def in_bytes(count: int) -> str:
    return f"{count / 1e6:.1f} MB" if count >= 1e6 else f"{count / 1e3:.1f} kB"


def engine_lines(report: dict[str, Any]) -> list[str]:
    engine = report["engine"]
    if engine is None:
        return []
    lines = [
        f"engine: {built['file']} for {target}, {in_bytes(built['bytes'])}, "
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
