"""What TensorRT-RTX makes of whole models: the type of each GEMM and attention in the engine.

    make bench-engine-types
    python benchmarks/engine_types.py [--models ...] [--rules ...] [--targets ...]

Compiles timm models with random weights by the shipped rules, with masks by magnitude and without
fine-tune (`rules/engine-types*.yaml`), and builds an engine for each target, all on the CPU. What
became of each layer is read from the builder's log, as in every compile; here it is counted. Types
depend on shapes and on the graph, not on the values of the weights.

- `GEMMs` is how many layers with weights the engine multiplies in the type that the rules plan, of
  how many that the rules changed; `half` is how many of them it multiplies in FP16.
- `attentions` is how many it fuses in one INT8 kernel each, of how many the model has.
- `build` is the builder's time for one target, with whatever else the machine did meanwhile.

Writes `results/engine_types.json` and `results/engine_types.md`.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

from compile_time import HERE, MB, MODEL_FILE, RESULTS, machine, versions
from result_files import write_results

MODELS = ("deit_tiny_patch16_224", "swin_tiny_patch4_window7_224", "swinv2_tiny_window8_256")
RULES = {
    "int8": HERE / "rules" / "engine-types.yaml",
    "int8-attention": HERE / "rules" / "engine-types-attention.yaml",
}
TARGETS = ("sm80", "sm86", "sm89", "sm120", "portable")
IMAGES = 4


def compiled(model: str, rules: Path, targets: list[str]) -> dict[str, Any]:
    """The report of one compile in a process of its own, in a folder that is then removed."""
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(HERE.parent), str(HERE)]),
        "COMPILE_TIME_MODEL": model,
        "COMPILE_TIME_IMAGES": str(IMAGES),
        "COMPILE_TIME_BATCH": str(IMAGES),
    }
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "gpusq_compile", str(MODEL_FILE), "--rules", str(rules)]
        command += ["--no-finetune", "--engine", "tensorrt-rtx", "--target", ",".join(targets)]
        command += ["--quiet", "-o", folder + "/out"]
        done = subprocess.run(
            command, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True
        )
        if done.returncode != 0:
            sys.exit(f"{' '.join(command)}\nexit code {done.returncode}\n{done.stderr[-4000:]}")
        report: dict[str, Any] = json.loads((Path(folder) / "out" / "report.json").read_text())
    return report


def counted(report: dict[str, Any]) -> dict[str, Any]:
    """What the engines of one compile hold, and what is missing from them with its reason."""
    layers, attentions = report["layers"], report["attentions"]
    return {
        "layers": len(layers),
        "attentions": len(attentions),
        "not_asked": [
            {"name": layer["name"], "shape": layer["shape"]}
            for layer in layers
            if not any(layer["requested"].values())
        ],
        "refused": [
            {"name": part["name"], "reasons": part["reasons"]}
            for part in [*layers, *attentions]
            if part["reasons"]
        ],
        "targets": {name: in_engine(built) for name, built in report["engine"]["targets"].items()},
    }


def in_engine(built: dict[str, Any]) -> dict[str, Any]:
    gemms, attentions = built["gemms"], built["attentions"]
    return {
        "gemms": len(gemms),
        "planned_type": sum(gemm["status"] == "passed" for gemm in gemms),
        "types": Counter(gemm["actual"] for gemm in gemms),
        "attentions_planned": len(attentions),
        "attentions_fused": sum(attention["status"] == "passed" for attention in attentions),
        "missed": [
            {key: part[key] for key in ("name", "expected", "actual", "reason")}
            for part in [*gemms, *attentions]
            if part["status"] != "passed"
        ],
        "build_seconds": built["seconds"],
        "bytes": built["bytes"],
    }


def table(results: dict[str, Any]) -> str:
    """A row for each engine, then what is not in the planned type and what no rule asks for."""
    head = ["model", "rules", "target", "GEMMs", "half", "attentions", "build s", "engine MB"]
    rows = [head, ["---"] * 3 + ["---:"] * (len(head) - 3)]
    notes: list[str] = []
    for model, by_rules in results["models"].items():
        for rules, found in by_rules.items():
            asked = any(engine["attentions_planned"] for engine in found["targets"].values())
            for target, engine in found["targets"].items():
                fused = f"{engine['attentions_fused']} of {found['attentions']}" if asked else ""
                right = f"{engine['planned_type']} of {engine['gemms']}"
                half = str(engine["types"].get("fp16", 0))
                seconds, size = f"{engine['build_seconds']:.1f}", f"{engine['bytes'] / MB:.1f}"
                rows.append([model, rules, target, right, half, fused, seconds, size])
                notes += [
                    f"{model}, {rules}, {target}: {part['name']} is {part['actual']}, not "
                    f"{part['expected']}: {part['reason']}"
                    for part in engine["missed"]
                ]
            notes += [
                f"{model}, {rules}: {part['name']}: {'; '.join(part['reasons'])}"
                for part in found["refused"]
            ]
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    lines += ["", "Not as planned:", *(f"- {note}" for note in notes or ["nothing"])]
    lines += ["", "No rule asks for anything on:"]
    for model, by_rules in results["models"].items():
        left = next(iter(by_rules.values()))["not_asked"]
        lines.append(f"- {model}: {', '.join(alike(left)) or 'no layer'}")
    return "\n".join(lines) + "\n"


def alike(layers: list[dict[str, Any]]) -> list[str]:
    """Layers that differ in their blocks' numbers alone, as one: count, name and sizes."""
    groups: dict[str, list[str]] = {}
    for layer in layers:
        name = re.sub(r"\.\d+(?=\.)", ".*", layer["name"])
        groups.setdefault(name, []).append("x".join(str(length) for length in layer["shape"]))
    return [
        f"{len(sizes)} `{name}` ({', '.join(dict.fromkeys(sizes))})"
        for name, sizes in groups.items()
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--models", nargs="+", default=MODELS, help="timm names")
    parser.add_argument("--rules", nargs="+", default=list(RULES), choices=list(RULES))
    parser.add_argument("--targets", nargs="+", default=list(TARGETS))
    parser.add_argument("-o", "--output", type=Path, default=RESULTS, help="folder for the results")
    arguments = parser.parse_args()

    results: dict[str, Any] = {
        "schema_version": 1,
        "machine": machine(),
        "versions": versions(),
        "settings": {"images": IMAGES, "targets": arguments.targets},
        "models": {},
    }
    for model in arguments.models:
        for rules in arguments.rules:
            load = os.getloadavg()[0]
            report = compiled(model, RULES[rules], arguments.targets)
            engine = report["engine"]
            results["versions"][engine["backend"]] = engine["version"]
            found = {"load_before": load, **counted(report)}
            results["models"].setdefault(model, {})[rules] = found
            right = {name: e["planned_type"] for name, e in found["targets"].items()}
            print(f"{model}, {rules}: GEMMs in the planned type {right}", file=sys.stderr)
            # A long run that is stopped keeps what it has.
            write_results(arguments.output, "engine_types", results, table(results))
    print(table(results))


if __name__ == "__main__":
    main()
