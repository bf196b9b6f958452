"""Check a compiled model before it is deployed:

    python examples/predeploy.py out/model --max-drop 1 --require-sparse 0.8 --baseline out/deployed

Exit code 0 where everything holds, 1 where something does not, 2 where the folder is no finished
run. It reads the folder alone and runs `gpusq-report` and ONNX Runtime; no GPU is needed.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

BATCHES = (1, 2, 5)


def main() -> int:
    parser = argparse.ArgumentParser(description="Check a compiled model before it is deployed.")
    parser.add_argument("folder", type=Path, help="what gpusq-compile was given with -o")
    parser.add_argument("--baseline", type=Path, help="the folder of what is deployed now")
    parser.add_argument("--max-drop", default="1", help="points of top-1 below the dense model")
    parser.add_argument("--require-sparse", default="0.5", help="share of the weights, 0 to 1")
    parser.add_argument("--max-loss", type=float, default=0.5, help="points below the baseline")
    options = parser.parse_args()
    try:
        report = read(options.folder / "report.json")
        manifest = read(options.folder / "manifest.json")
        baseline = read(options.baseline / "report.json") if options.baseline else None
    except (OSError, ValueError) as error:
        print(f"no finished run: {error}", file=sys.stderr)
        return 2
    faults = [
        *altered(options.folder, manifest),
        *unfinished(report),
        *gates(options.folder, options.max_drop, options.require_sparse),
    ]
    if not faults:
        faults += unusable(options.folder / "model.onnx")
    if baseline is not None:
        compare(options.baseline, options.folder)
        faults += worse(baseline, report, options.max_loss)
    for fault in faults:
        print(f"not to be deployed: {fault}", file=sys.stderr)
    if not faults:
        print(f"{options.folder}: may be deployed")
    return int(bool(faults))


def read(path: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return content


def altered(folder: Path, manifest: dict[str, Any]) -> list[str]:
    """Files that are not those that the compile wrote."""
    faults = []
    for name, expected in manifest["files"].items():
        path = folder / name
        if not path.is_file():
            faults.append(f"{name} is missing")
        elif hashlib.sha256(path.read_bytes()).hexdigest() != expected:
            faults.append(f"{name} is not the file that was compiled")
    return faults


def unfinished(report: dict[str, Any]) -> list[str]:
    if report["status"] == "ok":
        return []
    return [f"the compile failed: {report['error']['code']}: {report['error']['message']}"]


def gates(folder: Path, max_drop: str, require_sparse: str) -> list[str]:
    """What `gpusq-report` says where a gate does not hold; logs of a GPU build count too."""
    command = ["-m", "gpusq_compile.report_cli", str(folder), "--format", "json"]
    command += ["--max-drop", max_drop, "--require-sparse", require_sparse]
    run = subprocess.run([sys.executable, *command], capture_output=True, text=True, check=False)
    return [] if run.returncode == 0 else [run.stderr.strip()]


def unusable(model: Path) -> list[str]:
    """Whether the file runs with other batches than it was traced with."""
    import numpy
    import onnxruntime

    types = {"tensor(float)": numpy.float32, "tensor(int64)": numpy.int64, "tensor(bool)": bool}
    session = onnxruntime.InferenceSession(str(model))
    for batch in BATCHES:
        feed = {
            value.name: numpy.zeros(
                [batch if isinstance(size, str) else size for size in value.shape],
                types[value.type],
            )
            for value in session.get_inputs()
        }
        for value in session.run(None, feed):
            if value.dtype.kind == "f" and not numpy.isfinite(value).all():
                return [f"model.onnx gives NaN or infinity for black images (batch {batch})"]
    return []


def compare(before: Path, after: Path) -> None:
    """Print what changed against what is deployed."""
    command = ["-m", "gpusq_compile.report_cli", str(before), "--diff", str(after)]
    subprocess.run([sys.executable, *command], check=False)


def worse(before: dict[str, Any], after: dict[str, Any], points: float) -> list[str]:
    old, new = before["accuracy"]["onnx"], after["accuracy"]["onnx"]
    if old is None or new is None or 100 * (old - new) <= points:
        return []
    return [f"top-1 is {100 * (old - new):.2f} points below what is deployed ({old:.2%})"]


if __name__ == "__main__":
    sys.exit(main())
