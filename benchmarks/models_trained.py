"""The paper's model families, trained a few steps by their own losses while they are compiled.

    make bench-models-trained
    python benchmarks/models_trained.py [--only GLOB ...] [--rules NAME ...] [--steps N] [--list]

Each row is one `gpusq-compile` with the whole fine-tune of the shipped rules, cut to a few steps in
each phase: classifiers on photos that scikit-learn ships (`imagefolder:`), the examples on their
own data. All steps see the same images, so that a loss at the end compares to that at the start.
Weights are random and steps are few: what a row shows is that the task's loss reaches the
compressed layers and falls, that every number stays finite, and that masks, scales and the final
file hold after it. What training is worth is measured in `accuracy.py`.

Of each family the smallest member is trained, unless `--only` says otherwise. Rows that are there
from the same sources and options are kept. Writes `results/models_trained.json` and
`results/models_trained.md`.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from PIL import Image
from sklearn.datasets import load_sample_images

from compile_time import RESULTS, machine, versions
from models import EXIT_CODES, ROOT, chosen, commit, fingerprint, run_row, said_last
from models_rows import FAMILIES, Row
from models_table import RULES, table
from result_files import read_rows, write_results

PHASES = ("sparse", "quantize")
PHOTOS = 4
"""One batch. A batch of one image would have no statistics for a model that normalizes by them."""

ONE_BATCH = """\
import functools
import sys

sys.path.insert(0, {folder!r})

import {module} as example
from {module} import *


@functools.cache
def train_data():
    return [next(iter(example.train_data()))]
"""
"""A model file that is another one but for its training data: only the first batch of it.

It is kept, as that of data in a random order would be another one in each epoch.
"""


def train_row(row: Row, rules: str, steps: int, timeout: float) -> dict[str, Any]:
    """Compile one row with a fine-tune of `steps` in each phase; what the results hold of it."""
    cut = {phase: {"max_steps": steps, "epochs": steps} for phase in PHASES}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        options = ["--engine", "none"]
        if row.spec.endswith(".py"):
            row = replace(row, spec=str(save_with_one_batch(ROOT / row.spec, folder)))
        else:
            options += ["--data", f"imagefolder:{save_photos(folder / 'photos')}"]
        output, ended = run_row(
            row, rules, folder, options, timeout, verify=row.verify, finetune=cut
        )
        path = output / "report.json"
        report = json.loads(path.read_text()) if path.is_file() else None
    found = {
        "name": row.name,
        "family": row.family,
        "rules": rules,
        "status": "ok" if ended.code == 0 else EXIT_CODES.get(ended.code, "killed"),
        "error": None if ended.code == 0 else said_last(ended),
        "seconds": round(ended.seconds, 2),
        "peak_bytes": ended.own_peak_bytes,
    }
    return found | (of_report(report) if report is not None else {})


def save_photos(folder: Path) -> Path:
    """Crops of the two photos that scikit-learn ships, a folder for each."""
    for name, photo in zip(("temple", "flower"), load_sample_images().images, strict=True):
        (folder / name).mkdir(parents=True)
        for number in range(PHOTOS // 2):
            corner = photo[40 * number :, 60 * number :][:360, :540]
            Image.fromarray(corner).save(folder / name / f"{number}.png")
    return folder


def save_with_one_batch(file: Path, folder: Path) -> Path:
    """A model file in `folder` that is `file`, trained on one batch alone."""
    path = folder / f"{file.stem}_on_one_batch.py"
    path.write_text(ONE_BATCH.format(folder=str(file.parent), module=file.stem))
    return path


def of_report(report: dict[str, Any]) -> dict[str, Any]:
    masked = [layer for layer in report["layers"] if layer["applied"]["sparsity"]]
    return {
        "phases": {
            phase: {
                key: report["finetune"][phase][key]
                for key in ("steps", "seconds", "images", "loss")
            }
            for phase in PHASES
        },
        "masked": len(masked),
        "masks_ok": sum(bool(layer["mask_ok"]) for layer in masked),
        "verified": report["verify"].get("ok"),
        "numerics": report["verify"].get("numerics"),
    }


def faults(row: dict[str, Any], steps: int) -> list[str]:
    """What of a row is not as it should be; empty where it trained."""
    if row["error"]:
        return [row["error"]]
    found = []
    for phase, trained in row["phases"].items():
        if trained["steps"] != steps:
            found.append(f"{phase}: {trained['steps']} of {steps} steps")
        if not all(math.isfinite(value) for point in trained["loss"] for value in point.values()):
            found.append(f"{phase}: a loss is not finite")
        own = [point["hard"] for point in trained["loss"]]
        if not own[-1] < own[0]:
            found.append(f"{phase}: the task's loss does not fall")
    if row["masks_ok"] != row["masked"]:
        found.append(f"{row['masked'] - row['masks_ok']} masks are broken")
    if not row["verified"]:
        found.append("the file is not verified")
    return found


def tables(results: dict[str, Any]) -> str:
    head = (
        "family", "model", "rules", "masked layers", "own loss, sparse", "own loss, quantized",
        "difference to the teacher, quantized", "cosine", "seconds", "result",
    )  # fmt: skip
    rows = list(results["rows"].values())
    steps = results["steps"]
    said = (
        f"{steps} steps in each phase, all on the same images; the losses of the first and the "
        "last of them. `own loss` is the task's, by labels; `difference to the teacher` is that of "
        "the tapped features, from random weights that the labels lead away from."
    )
    return f"{said}\n\n{table(head, [cells(row, steps) for row in rows], left=3)}\n"


def cells(row: dict[str, Any], steps: int) -> list[str]:
    about = [row["family"], row["name"], f"`{row['rules']}`"]
    result = "; ".join(faults(row, steps)) or "ok"
    if "phases" not in row:
        return [*about, *["-"] * 5, f"{row['seconds']:.0f}", result]
    sparse, quantized = (row["phases"][phase]["loss"] for phase in PHASES)
    numerics = row["numerics"]
    cosine = f"{numerics['min_cosine']:.4f}" if numerics else "-"
    return [
        *about,
        f"{row['masks_ok']} of {row['masked']}",
        course(sparse, "hard"),
        course(quantized, "hard"),
        course(quantized, "feature"),
        cosine,
        f"{row['seconds']:.0f}",
        result,
    ]


def course(losses: Sequence[dict[str, float]], part: str) -> str:
    values = [point[part] for point in losses if part in point]
    return f"{values[0]:.3g} -> {values[-1]:.3g}" if values else "-"


def smallest() -> list[Row]:
    """The first row of each family."""
    first: dict[str, Row] = {}
    for row in FAMILIES:
        first.setdefault(row.family, row)
    return list(first.values())


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", nargs="+", default=(), metavar="GLOB", help="names or families")
    parser.add_argument("--rules", nargs="+", default=RULES, help="shipped names or files")
    parser.add_argument("--steps", type=int, default=6, help="optimizer steps in each phase")
    parser.add_argument("--timeout", type=float, default=3600, help="seconds for one row")
    parser.add_argument("--list", action="store_true", help="print the rows and end")
    parser.add_argument("-o", "--output", type=Path, default=RESULTS, help="folder for the results")
    arguments = parser.parse_args()

    rows = chosen(arguments.only) if arguments.only else smallest()
    if arguments.list:
        print("\n".join(f"{row.family}: {row.name}" for row in rows))
        return
    path = arguments.output / "models_trained.json"
    results = read_rows(path, schema_version=2, steps=arguments.steps)
    about = {"machine": machine(), "versions": versions(), "commit": commit()}
    for row in rows:
        for rules in arguments.rules:
            name = f"{row.name} / {rules}"
            key = fingerprint(row, {"rules": rules, "steps": arguments.steps, "data": ONE_BATCH})
            if results["rows"].get(name, {}).get("fingerprint") == key:
                print(f"{name}: is there", file=sys.stderr)
                continue
            found = train_row(row, rules, arguments.steps, arguments.timeout)
            results["rows"][name] = {**found, **about, "fingerprint": key}
            write_results(path.parent, path.stem, results, tables(results))
            said = "; ".join(faults(found, arguments.steps)) or "ok"
            print(f"{name}: {said}: {found['seconds']:.0f} s", file=sys.stderr)
    write_results(path.parent, path.stem, results, tables(results))
    print(tables(results))


if __name__ == "__main__":
    main()
