"""What builds on other machines came to, on the terminal."""

from __future__ import annotations

from typing import Any

DENSE = ".dense"
"""What the name of an engine without sparse kernels ends in, before `.log`."""


def log_lines(report: dict[str, Any]) -> list[str]:
    """What each build came to, and how long sparse kernels took against dense ones."""
    entries = report.get("engine_logs", [])
    lines = [line for entry in entries for line in _entry_lines(entry)]
    times = {entry["file"]: entry["median_ms"] for entry in entries if entry["median_ms"]}
    for file, sparse in times.items():
        stem = file.removesuffix(".log")
        dense = times.get(f"{stem}{DENSE}.log")
        if dense is not None:
            lines.append(
                f"{stem}: {sparse:.4g} ms with sparse kernels, {dense:.4g} ms without: "
                f"{dense / sparse:.2f}x"
            )
    return lines


def planned_type(entry: dict[str, Any]) -> str:
    """How many GEMMs have the type they should, of those whose type the log tells."""
    unknown, gemms = entry["unknown_type"], entry["gemms"]
    if unknown == gemms:
        return "no GEMM's type is told"
    text = f"{entry['planned_type']} of {gemms - unknown} GEMMs in the planned type"
    return f"{text}, {unknown} not told" if unknown else text


def _entry_lines(entry: dict[str, Any]) -> list[str]:
    version = f"TensorRT {entry['version']}" if entry["version"] else "TensorRT"
    facts = [
        f"{version} for {entry['target']}" if entry["target"] else version,
        planned_type(entry),
    ]
    if entry["sparse"] is False:
        facts.append("sparse kernels off")
    elif entry["eligible"] is not None or entry["picked"] is not None:
        said = [f"{entry[key]} {key}" for key in ("eligible", "picked") if entry[key] is not None]
        facts.append(f"layers that the builder counts: {', '.join(said)}")
    if entry["median_ms"] is not None:
        facts.append(f"{entry['median_ms']:.4g} ms")
    return [
        f"{entry['file']}: {'; '.join(facts)}",
        *(
            f"  missed: {gemm['layer']} is {gemm['type']}: {gemm['reason']}"
            for gemm in entry["missed"]
        ),
    ]
