"""Two runs on one page: what changed from one to the other, and their maps side by side."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gpusq_compile import __version__
from gpusq_compile.report.compare import alike, compare, facts, is_same
from gpusq_compile.report.html import render, short_name
from gpusq_compile.report.page_figures import ERRORS, depth_strip, errors_of
from gpusq_compile.report.page_maps import Seen, compressed_name, maps_beside
from gpusq_compile.report.page_summary import STAGES, accuracy_rows, headline, tiles

OVER_DEPTH = ("output_db", "weight_db")
TITLES = {
    "run": "Run",
    "metrics": "Metrics",
    "finetune": "Fine-tune",
    "verify": "Verification",
    "storage": "Size",
    "compute": "Compute, against FP32",
    "engine": "Engine",
}
KINDS = {"layers": "Layers", "attentions": "Attentions", "taps": "Taps"}


@dataclass(frozen=True)
class Run:
    """A finished run. `evidence` is the content of evidence.json, None where there is none."""

    folder: Path
    report: Mapping[str, Any]
    evidence: Mapping[str, Any] | None


def beside_page(first: Run, second: Run) -> str:
    """The page of two runs as one HTML document.

    Raises:
        LookupError, TypeError, AttributeError, ValueError: a report or its evidence is not as this
            version writes it.
    """
    runs = (first, second)
    names = run_names(first.folder, second.folder)
    labels = run_labels(runs, names)
    found = compare(first.report, second.report)
    changed = facts(found)
    maps = maps_beside(
        Seen(labels[0], names[0], first.evidence), Seen(labels[1], names[1], second.evidence)
    )
    context = {
        "tool": {"name": "gpusq-compile", "version": __version__},
        "names": names,
        "labels": labels,
        "runs": [
            {
                "name": name,
                "label": label,
                "status": run.report["status"],
                "error": run.report["error"],
                "headline": headline(run.report),
                "model": short_name(run.report["model"]),
                "rules": [short_name(rules) for rules in run.report["rules"]],
            }
            for name, label, run in zip(names, labels, runs, strict=True)
        ],
        "same": is_same(found),
        "tiles": tile_rows(runs),
        "stages": stage_rows(runs),
        "layers": {
            title: {
                "only": in_one_alone(labels, found[kind]),
                "groups": alike(found[kind]),
            }
            for kind, title in KINDS.items()
            if any(found[kind].values())
        },
        "changed": {title: changed[part] for part, title in TITLES.items() if changed[part]},
        "missed": in_one_alone(labels, found["remarks"]),
        "strip": strip_beside(runs, labels),
        "maps": maps,
        "alone": [pair for pair in zip(labels, maps.alone, strict=True) if pair[1]],
    }
    return render("beside.html", context, [])


def run_names(first: Path, second: Path) -> tuple[str, str]:
    """The names of the two folders, with as much of the paths before as tells them apart."""
    one, other = first.resolve().parts, second.resolve().parts
    for count in range(1, max(len(one), len(other)) + 1):
        names = str(Path(*one[-count:])), str(Path(*other[-count:]))
        if names[0] != names[1]:
            return names
    return f"{first.resolve().name} (first)", f"{second.resolve().name} (second)"


def run_labels(runs: tuple[Run, Run], names: tuple[str, str]) -> tuple[str, str]:
    """What the two models are called: their types, the runs' names where these are the same."""
    first, second = (compressed_name(run.report) for run in runs)
    return names if first == second else (first, second)


def in_one_alone(
    labels: tuple[str, str], entries: Mapping[str, list[str]]
) -> list[tuple[str, list[str]]]:
    """The label of a run with what it alone has, where that is anything."""
    pairs = zip(labels, (entries["only_first"], entries["only_second"]), strict=True)
    return [(label, found) for label, found in pairs if found]


def tile_rows(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """The figures at the top of each run's page by title; None where a run has no such one."""
    columns = [{tile["title"]: tile for tile in tiles(run.report)} for run in runs]
    titles = dict.fromkeys(title for column in columns for title in column)
    return [
        {"title": title, "tiles": [column.get(title) for column in columns]} for title in titles
    ]


def stage_rows(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """Top-1 by stage in both runs, with the change against each run's dense model."""
    columns = [
        {row["stage"]: row for row in accuracy_rows(run.report)["rows"] if row["top1"] is not None}
        for run in runs
    ]
    return [
        {"stage": stage, "runs": [column.get(stage) for column in columns]}
        for stage in STAGES
        if any(stage in column for column in columns)
    ]


def strip_beside(runs: Sequence[Run], labels: Sequence[str]) -> dict[str, Any] | None:
    """Output and rounding errors of both runs over the depth, in the order of the first graph."""
    names = list(dict.fromkeys(layer["name"] for run in runs for layer in run.report["layers"]))
    said = {key: (label, hint) for key, label, hint in ERRORS}
    return depth_strip(
        names,
        [
            (f"{said[key][0]}, {label}", said[key][1], errors_of(run.evidence, key, names))
            for key in OVER_DEPTH
            for run, label in zip(runs, labels, strict=True)
        ],
    )
