"""Statistics and tables of the accuracy benchmark."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from statistics import mean, stdev
from typing import Any

import numpy as np

import accuracy_recipe as recipe
from accuracy_recipe import Job
from accuracy_rows import ABLATION, ROWS

# Rules with the peer's numbers of bits for weights and activations.
SAME_BITS_AS_PEER = ("int8", "int8-float-output", "int4", "int4-2to4", "int4-pairwise")

Results = Mapping[Job, dict[str, Any]]


def mcnemar(gained: int, lost: int) -> float:
    """Two-sided exact p that `gained` and `lost` discordant pairs are equally likely.

    The binomial form of McNemar's test (Psychometrika 12, 1947).
    """
    total, fewer = gained + lost, min(gained, lost)
    if total == 0:
        return 1.0
    term = tail = 1
    for k in range(1, fewer + 1):
        term = term * (total - k + 1) // k
        tail += term
    return min(1.0, 2 * tail / 2**total) if total < 1000 else min(1.0, _log_ratio(tail, total))


def _log_ratio(tail: int, total: int) -> float:
    """2 * tail / 2**total where neither fits a float."""
    return math.exp(math.log(2) + math.log(tail) - total * math.log(2))


def compare(ours: Sequence[list[bool]], theirs: Sequence[list[bool]]) -> dict[str, Any]:
    """`ours` against `theirs`: rightness by seed and image, in pairs.

    `difference` is in points of top-1. Its 95 % interval takes each image, with all its seeds, as
    one observation, since predictions of one image are not independent. `p` is McNemar's, over
    the images of all seeds.
    """
    a, b = np.array(ours, dtype=float), np.array(theirs, dtype=float)
    by_image = (a - b).mean(axis=0)
    half = 1.96 * by_image.std(ddof=1) / math.sqrt(by_image.size)
    gained, lost = int((a > b).sum()), int((a < b).sum())
    return {
        "difference": 100 * float(by_image.mean()),
        "interval": 100 * float(half),
        "gained": gained,
        "lost": lost,
        "p": mcnemar(gained, lost),
    }


def chosen_rates(results: Results) -> dict[tuple[str, str], tuple[float, float] | None]:
    """Per (row, teacher): the rates of its later seeds, or the best of its first one."""
    best: dict[tuple[str, str], tuple[float, float] | None] = {}
    top: dict[tuple[str, str], float] = {}
    first = min((job.seed for job in results), default=0)
    for job, result in results.items():
        key = (job.row, job.teacher)
        if job.seed == first and result["top1"] >= top.get(key, -1.0):
            top[key], best[key] = result["top1"], job.lr
    return best


def gather(results: Results) -> dict[str, Any]:
    """All results as one document: per teacher and row the seeds, their mean and the tests."""
    check_batches(results)
    rates = chosen_rates(results)
    teachers = list(dict.fromkeys(job.teacher for job in results))
    document: dict[str, Any] = {
        "budget": {
            "steps_per_phase": recipe.STEPS,
            "batch": recipe.BATCH,
            "lr": list(recipe.LEARNING_RATES),
            "lr_int4": list(recipe.LEARNING_RATES_INT4),
            "weight_decay": recipe.WEIGHT_DECAY,
            "loss": [recipe.ALPHA, recipe.BETA, recipe.GAMMA],
            "calibration_images": recipe.CALIBRATION_BATCHES * recipe.BATCH,
        },
        "teachers": {},
    }
    for teacher in teachers:
        seeds: dict[str, dict[int, dict[str, Any]]] = {}
        for job, result in results.items():
            if job.teacher == teacher and job.lr == rates[job.row, teacher]:
                seeds.setdefault(job.row, {})[job.seed] = result
        if "dense" in seeds:
            # Nothing about it is random: the same predictions meet the control's of every seed.
            result = next(iter(seeds["dense"].values()))
            seeds["dense"] = dict.fromkeys(seeds.get("control", seeds["dense"]), result)
        document["teachers"][teacher] = {
            row: summary(row, runs, seeds, rates[row, teacher])
            for row in ROWS
            if (runs := seeds.get(row))
        }
    return document


def summary(
    row: str,
    runs: dict[int, dict[str, Any]],
    others: dict[str, dict[int, dict[str, Any]]],
    lr: tuple[float, float] | None,
) -> dict[str, Any]:
    """One row on one teacher, tested against the control and what else it should be held to."""
    tops = [run["top1"] for run in runs.values()]
    any_run = next(iter(runs.values()))
    entry: dict[str, Any] = {
        "title": ROWS[row].title,
        "top1": mean(tops),
        "std": stdev(tops) if len(tops) > 1 else None,
        "seeds": {str(seed): run["top1"] for seed, run in runs.items()},
        "seconds": mean(run["seconds"]["compile"] for run in runs.values()),
        "layers": {
            key: any_run[key]
            for key in ("layers", "sparse_layers", "quantized_layers")
            if key in any_run
        },
    }
    if lr is not None:
        entry["lr"] = lr
    for name in rivals(row):
        shared = [seed for seed in runs if seed in others.get(name, {})]
        if row == name or not shared:
            continue
        entry.setdefault("against", {})[name] = compare(
            [recipe.from_hex(runs[seed]["right"]) for seed in shared],
            [recipe.from_hex(others[name][seed]["right"]) for seed in shared],
        )
    return entry


def rivals(row: str) -> list[str]:
    """The rows that a row is tested against: the control, its peer, its ablation's first row."""
    found = ["control"]
    bits = row.partition("-")[0]
    if bits not in ("int8", "int4"):
        return found
    if row.endswith((*ABLATION, "unlabelled")):
        return [*found, ROWS[row].rules]
    if ROWS[row].rules in SAME_BITS_AS_PEER:
        found.append(f"peer-{bits}")
    return [*found, bits]


def check_batches(results: Results) -> None:
    """Every fine-tuned row of one seed must have seen the same batches in the same order.

    A dense one has one phase in place of two, on the batches of the first.
    """
    seen: dict[int, Counter[tuple[str, ...]]] = {}
    for job, result in results.items():
        if result["batches"]:
            seen.setdefault(job.seed, Counter())[tuple(result["batches"])] += 1
    for seed, found in seen.items():
        longest = max(found, key=len)
        if any(batches != longest[: len(batches)] for batches in found):
            raise SystemExit(f"rows of seed {seed} saw different batches: {found}")


def markdown(document: dict[str, Any]) -> str:
    """The main table, then the ablation."""
    teachers = document["teachers"]
    budget = document["budget"]
    text = [
        f"Top-1 on the 10,000 test images of Fashion-MNIST, two phases of "
        f"{budget['steps_per_phase']} steps with {budget['batch']} images each.",
        "Mean and standard deviation over the seeds; the difference to the control in points with "
        "its 95 % interval, paired by image, and McNemar's exact p; the same against "
        "nvidia-modelopt with the same number of bits; seconds on one core.",
    ]
    for teacher, rows in teachers.items():
        main = {name: row for name, row in rows.items() if not name.endswith(tuple(ABLATION))}
        text += [
            "",
            f"| {teacher} | top-1 % | against the control | p | against the peer | p | s |",
        ]
        text += ["| --- |" + " ---: |" * 6]
        text += [_line(row, "control", _peer(row)) for row in main.values()]
    for teacher, rows in teachers.items():
        for bits in ("int8", "int4"):
            ablated = [name for name in rows if _is_ablation(name, bits)]
            if not ablated:
                continue
            text += ["", f"| {teacher}, {bits.upper()} ablation | top-1 % | against row 1 | p |"]
            text += ["| --- | ---: | ---: | ---: |"]
            base = ROWS[ablated[0]].rules
            first = rows[base]["seeds"]
            shown = {seed: first[seed] for seed in rows[ablated[0]]["seeds"] if seed in first}
            text += [f"| alpha 1, beta 10, gamma 5 | {_mean(list(shown.values()))} | | |"]
            text += [_line(rows[name], base) for name in ablated]
    return "\n".join(text) + "\n"


def _is_ablation(name: str, bits: str) -> bool:
    return name.startswith(f"{bits}-") and name.removeprefix(f"{bits}-") in ABLATION


def _peer(row: dict[str, Any]) -> str:
    """The row of the peer that this one was tested against, or a name that none has."""
    return next((name for name in row.get("against", {}) if name.startswith("peer-")), "peer")


def _line(row: dict[str, Any], *rivals: str) -> str:
    """Top-1 and the test against each rival; with several, the seconds too."""
    cells = [row["title"], _mean(list(row["seeds"].values()))]
    for rival in rivals:
        test = row.get("against", {}).get(rival)
        if test is None:
            cells += ["", ""]
        else:
            cells += [f"{test['difference']:+.2f} ± {test['interval']:.2f}", f"{test['p']:.2g}"]
    if len(rivals) > 1:
        cells.append(f"{row['seconds']:.0f}")
    return "| " + " | ".join(cells) + " |"


def _mean(values: Iterable[float]) -> str:
    values = list(values)
    spread = f" ± {stdev(values):.2f}" if len(values) > 1 else ""
    return f"{mean(values):.2f}{spread}"


def search_table(results: Results) -> str:
    """Top-1 on the validation images by learning rates."""
    lines = ["| teacher | row | lr sparse | lr quantize | validation top-1 % |"]
    lines += ["| --- | --- | ---: | ---: | ---: |"]
    for job, result in results.items():
        sparse, quantize = job.rates
        cells = [job.teacher, job.row, f"{sparse:g}", f"{quantize:g}", f"{result['top1']:.2f}"]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"
