"""Every model family, and many another ViT, compiled to INT8 and INT4: what comes of each.

    make bench-models
    python benchmarks/models.py [--only GLOB ...] [--rules NAME ...] [--engine none] [--list]

Each row is one `gpusq-compile` in a process of its own, with random weights, without fine-tune, by
the shipped rules: timm's models with generated images, the examples with theirs. What is reported
is what the compiler does to a model, and what it takes; accuracy is another benchmark's.

- `seconds` is the whole process with imports, `compile` that without building the engine.
- `peak` is the high-water mark of the compiling process, in MB and over the FP32 weights of the
  whole model; the engine's builder is a process of its own. `own forward` is that of a process
  that runs the model once (own_forward.py).
- `GEMMs` are the operators with weights: how many are compressed, for how many of these there are
  sparse kernels, what was refused, and what no rule asked for.

`results/models.json` is written after every row and read at the start: a row is left out that is
there from the same sources, versions, machine and options, so a run that was stopped goes on.
`--again` compiles it all the same. A row that fails is a row with its error.

Writes `results/models.json`, `results/models.md`, and from them the table in the README.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from compile_time import HERE, RESULTS, Ended, machine, run_process, versions
from models_rows import FAMILIES, ROWS, Row
from models_table import RULES, brief, tables
from result_files import read_rows, write_results

ROOT = HERE.parent
SOURCES = ("gpusq_compile", "passes", "rules")
BEGIN = "<!-- written by benchmarks/models.py -->"
END = "<!-- end of what benchmarks/models.py wrote -->"
EXIT_CODES = {1: "check failed", 2: "bad input", 3: "internal error"}
EXAMPLES_OF_A_REASON = 3
SCHEMA = 3


def compile_row(row: Row, rules: str, engine: str, timeout: float) -> dict[str, Any]:
    """Compile one row by one rules file; what the results hold of it."""
    options = ["--no-finetune", "--engine", engine]
    with tempfile.TemporaryDirectory() as name:
        load = os.getloadavg()[0]
        output, ended = run_row(row, rules, Path(name), options, timeout, verify=row.verify)
        found = result_of(ended, output)
        if "gemms" in found:
            found |= of_memory(ended, run_forward(row, Path(name), timeout))
    return {
        "name": row.name,
        "family": row.family,
        "rules": rules,
        "model": row.spec or dict(row.config or {}),
        "environment": dict(row.environment),
        "verify": dict(row.verify),
        "aim_seconds": row.aim_seconds,
        "load_before": load,
        **found,
    }


def run_row(
    row: Row,
    rules: str,
    folder: Path,
    options: Sequence[str],
    timeout: float,
    **changes: Mapping[str, Any],
) -> tuple[Path, Ended]:
    """Run `gpusq-compile` with `options` on a row, in a process of its own; where it wrote, and how
    it ended.

    `changes` are sections of the rules that differ from those of the file named `rules`.
    """
    applied = str(Path(rules).resolve()) if Path(rules).is_file() else rules
    changed = {name: dict(section) for name, section in changes.items() if section}
    if changed:
        # JSON is YAML.
        path = folder / "rules.yaml"
        path.write_text(json.dumps({"version": 1, "extends": applied, **changed}))
        applied = str(path)
    output = folder / "out"
    command = [sys.executable, "-m", "gpusq_compile", spec_of(row, folder), "--rules", applied]
    command += [*row.arguments, *options, "--quiet", "-o", str(output)]
    return output, run_at_root(command, row, timeout)


def run_forward(row: Row, folder: Path, timeout: float) -> Ended:
    """Run the model of a row once, in a process of its own; see own_forward.py."""
    command = [sys.executable, str(HERE / "own_forward.py"), spec_of(row, folder)]
    return run_at_root(command, row, timeout)


def spec_of(row: Row, folder: Path) -> str:
    """What `gpusq-compile` is given as the model of a row; a configuration is put in `folder`."""
    if row.config is None:
        return row.spec
    path = folder / "config.json"
    path.write_text(json.dumps(dict(row.config)))
    return f"hf:{path}"


def run_at_root(command: list[str], row: Row, timeout: float) -> Ended:
    environment = os.environ | {"PYTHONPATH": str(ROOT), **row.environment}
    # A path in a spec is relative to the repository.
    here = os.getcwd()
    os.chdir(ROOT)
    try:
        return run_process(command, environment, timeout=timeout)
    finally:
        os.chdir(here)


def said_last(ended: Ended) -> str:
    """The error that a process ended with, in a line."""
    said = [line for line in ended.stderr.strip().splitlines() if line.strip()]
    errors = [line for line in said if "error[" in line]
    return (errors or said or [f"exit code {ended.code}"])[-1].strip()


def result_of(ended: Ended, output: Path) -> dict[str, Any]:
    """What came of a compile: from its process, its report and its files."""
    found: dict[str, Any] = {
        "status": "ok" if ended.code == 0 else EXIT_CODES.get(ended.code, "killed"),
        "exit_code": ended.code,
        "error": None,
        "seconds": round(ended.seconds, 2),
        "peak_bytes": ended.own_peak_bytes,
        "peak_bytes_with_builder": ended.peak_bytes,
    }
    if ended.code < 0:
        found["error"] = f"ended by signal {-ended.code} after {ended.seconds:.0f} s"
        return found
    path = output / "report.json"
    if not path.is_file():
        found["error"] = said_last(ended)
        return found
    report = json.loads(path.read_text())
    if report["error"] is not None:
        found["error"] = f"error[{report['error']['code']}]: {report['error']['message']}"
    return found | of_report(report, found) | {"sizes": sizes(output)}


def of_report(report: dict[str, Any], process: dict[str, Any]) -> dict[str, Any]:
    phases = {entry["name"]: entry["seconds"] for entry in report["passes"]}
    dense = report["storage"]["dense_fp32_bytes"]
    return {
        "compile_seconds": round(process["seconds"] - phases.get("build_engine", 0.0), 2),
        "phases": phases,
        "parameters": dense // 4,
        "dense_fp32_bytes": dense,
        "gemms": gemms(report),
        "taps": dict(Counter(taps(report))),
        "numerics": report["verify"].get("numerics"),
        "storage": report["storage"],
        "engine": engine(report),
        "missed": dict(
            Counter(
                remark["code"]
                for entry in report["passes"]
                for remark in entry["remarks"]
                if remark["kind"] == "missed"
            )
        ),
    }


def of_memory(compiled: Ended, forward: Ended) -> dict[str, Any]:
    """What a compile took beside what the whole model takes by itself."""
    if forward.code != 0:
        sys.exit(f"the model's own forward: {said_last(forward)}")
    weights = 4 * int(forward.stdout.splitlines()[-1])
    return {
        "weights_fp32_bytes": weights,
        "peak_ratio": compiled.own_peak_bytes / weights,
        "peak_aim_bytes": 4 * weights + 1_000_000_000,
        "own_forward_peak_bytes": forward.own_peak_bytes,
    }


def gemms(report: dict[str, Any]) -> dict[str, Any]:
    """The operators with weights by what became of them, each reason with its first layers."""
    layers = report["layers"]
    refused: dict[str, list[str]] = {}
    untouched: dict[str, list[str]] = {}
    compressed = eligible = 0
    for layer in layers:
        for reason in layer["reasons"]:
            refused.setdefault(reason, []).append(layer["name"])
        if any(layer["applied"].values()):
            compressed += 1
            eligible += layer["execution"]["kind"].startswith("sparse")
        elif not layer["reasons"]:
            untouched.setdefault(why_untouched(layer), []).append(layer["name"])
    return {
        "total": len(layers),
        "compressed": compressed,
        "eligible": eligible,
        "refused": counted(refused),
        "untouched": counted(untouched),
        "roles": dict(Counter(layer["role"] or "none" for layer in layers)),
    }


def why_untouched(layer: dict[str, Any]) -> str:
    """Why a layer without a refusal was left as it is: the rules say so, or reach it not at all."""
    actions = [line for line in layer["rules"] if not line.endswith(": distill")]
    shape = "x".join(map(str, layer["shape"]))
    if actions:
        return f"left by rule '{actions[-1].split(':')[-2].split()[-1]}'"
    return f"no rule asks for a {layer['op']} of {shape}"


def counted(names: dict[str, list[str]]) -> dict[str, dict[str, Any]]:
    return {
        reason: {"layers": len(found), "first": found[:EXAMPLES_OF_A_REASON]}
        for reason, found in names.items()
    }


def taps(report: dict[str, Any]) -> list[str]:
    """The role of each tap: `stage_end` is there once for each stage."""
    marked = next((entry for entry in report["passes"] if entry["name"] == "mark"), None)
    remarks = marked["remarks"] if marked else []
    said = [
        remark["reason"].removeprefix("distill at ").partition(":")[0]
        for remark in remarks
        if remark["code"] == "tap-marked"
    ]
    return ["stage_end" if text.startswith("end of stage") else text for text in said]


def engine(report: dict[str, Any]) -> dict[str, Any] | None:
    """Per target the engine's size and seconds, and what type each compressed GEMM is in."""
    built = report["engine"]
    if built is None:
        return None
    targets = {
        name: {
            "bytes": target["bytes"],
            "seconds": target["seconds"],
            "gemms": dict(Counter(f"{g['status']} {g['actual']}" for g in target["gemms"])),
        }
        for name, target in built["targets"].items()
    }
    return {"backend": built["backend"], "version": built["version"], "targets": targets}


def sizes(output: Path) -> dict[str, int]:
    """The bytes of each artifact."""
    files = sorted(path for path in output.rglob("*") if path.is_file())
    return {str(path.relative_to(output)): path.stat().st_size for path in files}


def fingerprint(row: Row, options: dict[str, Any]) -> str:
    """A digest of all that a row's result depends on: sources, versions, machine, options."""
    digest = hashlib.sha256()
    files = [path for folder in SOURCES for path in (ROOT / folder).rglob("*")]
    if row.spec.endswith(".py"):
        files += (ROOT / row.spec).parent.glob("*")
    for path in sorted(files):
        if path.is_file() and path.suffix in {".py", ".yaml", ".safetensors"}:
            digest.update(str(path.relative_to(ROOT)).encode() + path.read_bytes())
    about = [repr(row), machine(), versions(), options]
    digest.update(json.dumps(about, sort_keys=True).encode())
    return digest.hexdigest()


def commit() -> str:
    """The commit that is checked out; "+" behind it says that files differ from it."""
    git = ["git", "-C", str(ROOT)]
    try:
        head = subprocess.run(
            [*git, "rev-parse", "--short=12", "HEAD"], check=True, capture_output=True, text=True
        ).stdout.strip()
        changed = subprocess.run(
            [*git, "status", "--porcelain", "--untracked-files=no"],
            check=True, capture_output=True, text=True,
        ).stdout.strip()  # fmt: skip
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return head + ("+" if changed else "")


def chosen(patterns: Sequence[str]) -> list[Row]:
    """The rows whose name or family one of the globs matches; all where there is none."""
    if not patterns:
        return list(ROWS)
    rows = [
        row
        for row in ROWS
        if any(fnmatch(name, glob) for glob in patterns for name in (row.name, row.family))
    ]
    return rows or sys.exit(f"no row matches {' '.join(patterns)}; --list shows them")


def write(results: dict[str, Any], folder: Path) -> None:
    """Write what there is, its rows in the order of `ROWS`."""
    order = {f"{row.name} / {rules}": None for row in ROWS for rules in RULES}
    names = [name for name in (*order, *results["rows"]) if name in results["rows"]]
    results["rows"] = {name: results["rows"][name] for name in dict.fromkeys(names)}
    write_results(folder, "models", results, tables(results))


def write_readme(results: dict[str, Any], path: Path) -> None:
    """Put the brief table between its two marks."""
    families: dict[str, list[str]] = {}
    for row in FAMILIES:
        families.setdefault(row.family, []).append(row.name)
    before, begun, rest = path.read_text().partition(BEGIN)
    _, ended, after = rest.partition(END)
    if not begun or not ended:
        sys.exit(f"{path} has no place for the table, between {BEGIN} and {END}")
    path.write_text(f"{before}{BEGIN}\n{brief(results, families)}\n{END}{after}")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", nargs="+", default=(), metavar="GLOB", help="names or families")
    parser.add_argument("--rules", nargs="+", default=RULES, help="shipped names or files")
    parser.add_argument("--engine", default="tensorrt-rtx", choices=["none", "tensorrt-rtx"])
    parser.add_argument("--timeout", type=float, default=3600, help="seconds for one row")
    parser.add_argument("--again", action="store_true", help="compile rows that are there, too")
    parser.add_argument("--list", action="store_true", help="print the rows and end")
    parser.add_argument("-o", "--output", type=Path, default=RESULTS, help="folder for the results")
    arguments = parser.parse_args()

    rows = chosen(arguments.only)
    if arguments.list:
        print("\n".join(f"{row.family}: {row.name}" for row in rows))
        return
    results = read_rows(arguments.output / "models.json", schema_version=SCHEMA)
    # Of each row, as a run that goes on may do so elsewhere.
    about = {"machine": machine(), "versions": versions(), "commit": commit()}
    options = {"engine": arguments.engine}
    todo = [(row, rules) for row in rows for rules in arguments.rules]
    for position, (row, rules) in enumerate(todo, start=1):
        name = f"{row.name} / {rules}"
        key = fingerprint(row, {**options, "rules": rules})
        label = f"{position}/{len(todo)} {name}"
        old = results["rows"].get(name)
        kept = old is not None and old["fingerprint"] == key and old["status"] != "killed"
        if kept and not arguments.again:
            print(f"{label}: is there", file=sys.stderr)
            continue
        found = compile_row(row, rules, arguments.engine, arguments.timeout)
        results["rows"][name] = {**found, **about, "fingerprint": key}
        write(results, arguments.output)
        said = found["error"] or f"{found['seconds']:.1f} s"
        print(f"{label}: {found['status']}: {said}", file=sys.stderr)
    write(results, arguments.output)
    if arguments.output == RESULTS:
        write_readme(results, ROOT / "README.md")
    print(tables(results))


if __name__ == "__main__":
    main()
