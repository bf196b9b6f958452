"""Accuracy after a short fine-tune: a fair control, the rules' INT8 and INT4, and the peer.

    python benchmarks/accuracy.py [--plan] [--jobs N] [--teachers ...] [--rows ...] [--seeds ...]

Two transformers trained on Fashion-MNIST (`train_teachers.py`) are compressed in every way of the
table (`accuracy_rows.py`), each with the budget, batches and losses of `accuracy_recipe.py`, and
their finished, folded functions predict the 10,000 test images. Each row of each teacher and seed
is a process on one thread and leaves a JSON file in `results/accuracy/`; a run that was cut off
goes on where it stopped, and a row runs again when its settings or its teacher change.

The learning rates of the recipe were chosen on validation images (`--search`). The peer gets the
best of three on the *test* images of the first seed, which favours it.

Writes `results/accuracy.json` and `results/accuracy.md`.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from pathlib import Path
from statistics import median
from typing import Any

import accuracy_recipe as recipe
import accuracy_table
from accuracy_recipe import Job
from accuracy_rows import ABLATION, ROWS, resolved_rules
from compile_time import machine, peer_python, versions
from result_files import write_results

HERE = Path(__file__).resolve().parent
TEACHERS = ("deit", "swin")
SEEDS = (0, 1, 2)
ABLATION_SEEDS = (0,)
ONE_SEED_ROWS = ("int4-pairwise", "int4-a8", "int4-weight-only")
MAIN_ROWS = ("dense", "control", "int8", "int4", "peer-int8", "peer-int4")
PEER_ROWS = ("peer-int8", "peer-int4")

# Tried by --search on the validation images; the peer's are tried on the test images.
SEARCH_ROWS = ("control", "int8", "int4")
SEARCH_RATES = ((1e-4, 5e-5), (3e-4, 1.5e-4), (1e-3, 5e-4))
PEER_RATES = SEARCH_RATES

# Seconds of a row on one core of the machine that the recipe was made on, for --plan.
GUESSED_SECONDS = {"dense": 15, "control": 65, "compile": 95, "peer": 105}


def jobs() -> list[Job]:
    """Every job, the most telling rows first."""
    rest = [row for row in ROWS if row not in MAIN_ROWS]
    ablated = [row for row in rest if row.endswith(tuple(ABLATION))]
    rest = [row for row in rest if row not in ablated]
    ablated += [row for row in rest if row in ONE_SEED_ROWS]
    rest = [row for row in rest if row not in ONE_SEED_ROWS]
    found = [Job(row, t, SEEDS[0], lr=lr) for t in TEACHERS for row, lr in _first(MAIN_ROWS)]
    found += [Job(row, t, seed) for seed in SEEDS[1:] for row in MAIN_ROWS for t in TEACHERS]
    found += [Job(row, t, seed) for row in rest for seed in SEEDS for t in TEACHERS]
    found += [Job(row, t, seed) for row in ablated for seed in ABLATION_SEEDS for t in TEACHERS]
    return [job for job in found if not (job.row == "dense" and job.seed != SEEDS[0])]


def _first(rows: tuple[str, ...]) -> list[tuple[str, tuple[float, float] | None]]:
    """The rows of the first seed: those of the peer with each of its rates."""
    return [(row, lr) for row in rows for lr in (PEER_RATES if row in PEER_ROWS else (None,))]


def search_jobs() -> list[Job]:
    rows = [(row, lr) for row in SEARCH_ROWS for lr in SEARCH_RATES]
    return [Job(row, t, SEEDS[0], "validation", lr) for t in TEACHERS for row, lr in rows]


def with_peer_rates(job: Job, folder: Path, stale: bool = False) -> Job:
    """A peer's job of a later seed, with the rates that did best at the first one."""
    if job.row not in PEER_ROWS or job.lr is not None:
        return job
    tried = [Job(job.row, job.teacher, SEEDS[0], job.split, lr) for lr in PEER_RATES]
    results = [(read(other, folder, stale), other.lr) for other in tried]
    done = [(result["top1"], lr) for result, lr in results if result is not None]
    if not done:
        raise LookupError(f"{job.name} waits for the first seed of {job.row}")
    return Job(job.row, job.teacher, job.seed, job.split, max(done)[1])


def waits_for_rates(job: Job, unfinished: Sequence[Job]) -> bool:
    """Whether a peer's job of a later seed has to wait for one that tries a rate for it."""
    if job.row not in PEER_ROWS or job.lr is not None:
        return False
    return any(
        other.lr is not None
        and (other.row, other.teacher, other.split) == (job.row, job.teacher, job.split)
        for other in unfinished
    )


def read(job: Job, folder: Path, stale: bool = False) -> dict[str, Any] | None:
    """The result of a job, None if there is none.

    Unless `stale` ones will do, one that was made with other settings, another teacher or other
    rules is none.
    """
    path = job.save_to(folder)
    if not path.is_file():
        return None
    result: dict[str, Any] = json.loads(path.read_text())
    if stale:
        return result
    same = result["fingerprint"] == recipe.fingerprint(job)
    if ROWS[job.row].maker == "compile":
        same = same and result["rules"] == resolved_rules(job)
    return result if same else None


def finished(job: Job, folder: Path) -> dict[str, Any] | None:
    """The result of a job, a peer's with the rates that it would run with; else None."""
    try:
        return read(with_peer_rates(job, folder), folder)
    except LookupError:
        return None


def run(job: Job, folder: Path, peer: Path | None) -> str | None:
    """Run one job in its own process; what it said if it failed."""
    if job.row in PEER_ROWS:
        job = with_peer_rates(job, folder)
        if read(job, folder) is not None:
            return None
        assert peer is not None
        command = [str(peer), str(HERE / "peer" / "modelopt_finetune.py")]
    else:
        command = [sys.executable, str(HERE / "accuracy_rows.py")]
    command += [*job.arguments(), "-o", str(folder)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
    paths = [str(HERE.parent), environment.get("PYTHONPATH", "")]
    environment["PYTHONPATH"] = os.pathsep.join(path for path in paths if path)
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    return done.stderr.strip()[-2000:] if done.returncode != 0 else None


def run_all(wanted: list[Job], folder: Path, workers: int) -> int:
    """Run what is missing, `workers` at a time; the number of jobs that failed."""
    missing = [job for job in wanted if read(job, folder) is None]
    peer = peer_python() if any(job.row in PEER_ROWS for job in missing) else None
    started, failed, finished = time.monotonic(), 0, 0
    waiting = list(missing)
    running: dict[Future[str | None], Job] = {}
    with ThreadPoolExecutor(workers) as pool:
        while waiting or running:
            while len(running) < workers:
                unfinished = [*waiting, *running.values()]
                ready = (job for job in waiting if not waits_for_rates(job, unfinished))
                job = next(ready, None)
                if job is None:
                    break
                waiting.remove(job)
                running[pool.submit(run, job, folder, peer)] = job
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                job = running.pop(future)
                error = future.exception() or future.result()
                finished += 1
                failed += error is not None
                result = read(with_peer_rates(job, folder), folder) if error is None else None
                outcome = f"{result['top1']:.2f} %" if result else f"FAILED\n{error}"
                minutes = (time.monotonic() - started) / 60
                left = f"{finished}/{len(missing)}, {minutes:.1f} min"
                print(f"[{left}] {job.name}: {outcome}", file=sys.stderr, flush=True)
    return failed


def show_plan(wanted: list[Job], folder: Path, workers: int) -> None:
    """Print what would run and how long that takes, from rows of the same kind that are done."""
    spent: dict[tuple[str, str], list[float]] = {}
    for job in wanted:
        result = finished(job, folder)
        if result is not None:
            key = (ROWS[job.row].maker, job.teacher)
            spent.setdefault(key, []).append(result["seconds"]["total"])
    seconds = 0.0
    for job in wanted:
        if finished(job, folder) is None:
            maker = ROWS[job.row].maker
            known = spent.get((maker, job.teacher))
            guess = median(known) if known else GUESSED_SECONDS[maker]
            seconds += guess
            print(f"{job.name:40} {guess:5.0f} s")
    print(f"about {seconds / workers / 60:.0f} minutes with {workers} at a time")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--plan", action="store_true", help="say what would run, and how long")
    parser.add_argument("--search", action="store_true", help="try learning rates, on validation")
    parser.add_argument(
        "--gather", action="store_true", help="run nothing, make the tables of all that is there"
    )
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="rows at a time")
    parser.add_argument("--teachers", nargs="+", choices=TEACHERS, default=TEACHERS)
    parser.add_argument("--rows", nargs="+", choices=ROWS, metavar="ROW", help="these rows alone")
    parser.add_argument("--seeds", nargs="+", type=int, default=SEEDS)
    parser.add_argument("--no-peer", action="store_true", help="leave nvidia-modelopt out")
    parser.add_argument("-o", "--output", type=Path, default=HERE / "results")
    given = parser.parse_args()
    folder = given.output / "accuracy"
    everything = search_jobs() if given.search else jobs()
    wanted = [
        job
        for job in everything
        if job.teacher in given.teachers
        and job.seed in given.seeds
        and (given.rows is None or job.row in given.rows)
        and not (given.no_peer and job.row in PEER_ROWS)
    ]
    if given.plan:
        show_plan(wanted, folder, given.jobs)
        return
    failed = 0 if given.gather else run_all(wanted, folder, given.jobs)
    results = {}
    for job in everything:
        try:
            chosen = with_peer_rates(job, folder, given.gather)
        except LookupError:
            continue
        result = read(chosen, folder, given.gather)
        if result is not None:
            results[chosen] = result
    if given.search:
        text = accuracy_table.search_table(results)
    else:
        document = {
            "schema_version": 1,
            "machine": machine(),
            "versions": versions(),
            **accuracy_table.gather(results),
        }
        text = accuracy_table.markdown(document)
        write_results(given.output, "accuracy", document, text)
    print(text)
    if failed:
        sys.exit(f"{failed} rows failed")


if __name__ == "__main__":
    main()
