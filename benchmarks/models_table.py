"""The Markdown of `models.py`: what was compressed, what it took, and what was left dense."""

from __future__ import annotations

from typing import Any

MB = 1e6
RULES = ("int8", "int4")
FILES = ("model.onnx", "weights.safetensors", "graph.json", "report.json", "engine/model.plan")
PHASES = {
    "trace": ("trace", "canonicalize"),
    "mark": ("mark", "split_attention"),
    "permute": ("permute",),
    "sparsify": ("tap", "sparsify"),
    "quantize": ("smooth", "quantize", "reconstruct"),
    "export": ("fold", "split_outputs", "export_onnx", "surgery", "set_precision", "store_int4"),
    "verify": ("verify_onnx",),
    "pack": ("pack",),
    "engine": ("build_engine",),
}
"""The columns of seconds, and the passes that each sums up."""


def tables(results: dict[str, Any]) -> str:
    rows = list(results["rows"].values())
    done = [row for row in rows if "gemms" in row]
    parts = [
        "What was compressed, and what the final file computes:",
        overview(rows),
        "Seconds, and memory of the compiling process:",
        costs(done),
        over_their_aims(done),
        "Sizes in MB:",
        file_sizes(done),
        unlike(done),
    ]
    if other := [row for row in rows if row.get("verify")]:
        parts += [
            "Verified by other limits than the rules', where random weights cannot keep them:"
        ]
        parts += ["\n".join(f"- {title(row)}: {limits(row['verify'])}" for row in other)]
    if failures := [row for row in rows if row["error"]]:
        parts += ["Not compiled, or not verified:"]
        parts += ["\n".join(f"- {title(row)}: {row['error']}" for row in failures)]
    return "\n\n".join(part for part in parts if part) + "\n"


def title(row: dict[str, Any]) -> str:
    return f"{row['name']}, {row['rules']}"


def limits(verify: dict[str, float]) -> str:
    return ", ".join(f"{name} {value:g}" for name, value in verify.items())


def overview(rows: list[dict[str, Any]]) -> str:
    head = (
        "family", "model", "rules", "M parameters", "GEMMs", "compressed", "sparse kernels",
        "refused", "stages", "cosine", "difference", "engine as planned", "result",
    )  # fmt: skip
    return table(head, [compressed(row) for row in rows], left=3)


def compressed(row: dict[str, Any]) -> list[str]:
    about = [row["family"], row["name"], row["rules"]]
    if "gemms" not in row:
        return [*about, *[""] * 9, row["status"]]
    gemms, numerics = row["gemms"], row["numerics"] or {}
    refused = sum(entry["layers"] for entry in gemms["refused"].values())
    return [
        *about,
        f"{row['parameters'] / 1e6:.1f}",
        *(str(gemms[kind]) for kind in ("total", "compressed", "eligible")),
        str(refused),
        str(row["taps"].get("stage_end", 0)),
        shown(numerics.get("min_cosine"), ".4f"),
        shown(numerics.get("max_difference"), ".3f"),
        in_planned_type(row["engine"]),
        row["status"],
    ]


def costs(rows: list[dict[str, Any]]) -> str:
    """Seconds per phase and in all, and memory, both beside what they should be."""
    head = (
        "model", "rules", *PHASES, "start and report", "all", "without engine", "aim",
        "peak MB", "x FP32", "aim MB", "own forward MB", "cores",
    )  # fmt: skip
    body = []
    for row in rows:
        sums = [sum(row["phases"].get(name, 0.0) for name in names) for names in PHASES.values()]
        other = row["seconds"] - sum(row["phases"].values())
        body.append(
            [
                row["name"],
                row["rules"],
                *(f"{total:.1f}" for total in (*sums, other, row["seconds"])),
                f"{row['compile_seconds']:.1f}",
                shown(row["aim_seconds"], "g"),
                f"{row['peak_bytes'] / MB:.0f}",
                shown(row["peak_ratio"], ".1f"),
                f"{row['peak_aim_bytes'] / MB:.0f}",
                f"{row['own_forward_peak_bytes'] / MB:.0f}",
                f"{row['machine']['cores']} x {row['machine']['cpu']}",
            ]
        )
    return table(head, body, left=2)


def over_their_aims(rows: list[dict[str, Any]]) -> str:
    """Which rows take more than they should, as a list, and what of it is the model's own."""
    lines = []
    for row in rows:
        found = []
        if row["aim_seconds"] and row["compile_seconds"] > row["aim_seconds"]:
            found.append(f"{row['compile_seconds']:.1f} s of {row['aim_seconds']:g}")
        if row["peak_bytes"] > row["peak_aim_bytes"]:
            peak, aim, own = (
                row[name] / MB
                for name in ("peak_bytes", "peak_aim_bytes", "own_forward_peak_bytes")
            )
            found.append(f"{peak:.0f} MB of {aim:.0f}, the model's own forward {own:.0f}")
        if found:
            lines.append(f"- {title(row)}: {'; '.join(found)}")
    if not lines:
        return ""
    return f"Over their aims are {len(lines)} of {len(rows)} rows:\n\n" + "\n".join(lines)


def file_sizes(rows: list[dict[str, Any]]) -> str:
    head = ("model", "rules", "FP32", *FILES)
    body = [
        [
            row["name"],
            row["rules"],
            f"{row['dense_fp32_bytes'] / MB:.1f}",
            *(megabytes(row["sizes"], name) for name in FILES),
        ]
        for row in rows
    ]
    return table(head, body, left=2)


def unlike(rows: list[dict[str, Any]]) -> str:
    """What was refused or never asked for, as a list."""
    lines = []
    for row in rows:
        for kind in ("refused", "untouched"):
            for reason, entry in row["gemms"][kind].items():
                names = ", ".join(entry["first"])
                more = entry["layers"] - len(entry["first"])
                tail = f" and {more} more" if more else ""
                lines.append(f"- {title(row)}: {kind}: {names}{tail}: {reason}")
    return "Left dense:\n\n" + "\n".join(lines) if lines else ""


def brief(results: dict[str, Any], families: dict[str, list[str]]) -> str:
    """For the README: of each family the largest model, with both rules files in one line."""
    head = (
        "family", "model", "M parameters", "GEMMs compressed", "FP32 MB", "`model.onnx` MB",
        "`int8`", "peak", "`int4`", "peak",
    )  # fmt: skip
    body = []
    for family, names in families.items():
        rows = [[results["rows"].get(f"{name} / {rules}") for rules in RULES] for name in names]
        pairs = [pair for pair in rows if all(row and "gemms" in row for row in pair)]
        if not pairs:
            continue
        first, *_ = pair = max(pairs, key=lambda pair: pair[0]["parameters"])
        cells = [family, first["name"], f"{first['parameters'] / 1e6:.1f}"]
        cells.append(f"{first['gemms']['compressed']} of {first['gemms']['total']}")
        cells += [f"{first['dense_fp32_bytes'] / MB:.0f}", megabytes(first["sizes"], "model.onnx")]
        for row in pair:
            cells += [f"{row['compile_seconds']:.0f} s", f"{row['peak_bytes'] / 1e9:.1f} GB"]
        body.append(cells)
    return table(head, body, left=2)


def in_planned_type(engine: dict[str, Any] | None) -> str:
    """Over all targets, "49 of 49": how many GEMMs the engine has in the type that was planned."""
    if engine is None:
        return ""
    counts = [
        (status, count)
        for target in engine["targets"].values()
        for status, count in target["gemms"].items()
    ]
    if not counts:
        return ""
    right = sum(count for status, count in counts if status.startswith("passed"))
    return f"{right} of {sum(count for _, count in counts)}"


def shown(value: float | None, form: str) -> str:
    return "" if value is None else f"{value:{form}}"


def megabytes(sizes: dict[str, int], name: str) -> str:
    return f"{sizes[name] / MB:.1f}" if name in sizes else ""


def table(head: tuple[str, ...], rows: list[list[str]], *, left: int) -> str:
    rule = ["---"] * left + ["---:"] * (len(head) - left)
    return "\n".join("| " + " | ".join(row) + " |" for row in (head, rule, *rows))
