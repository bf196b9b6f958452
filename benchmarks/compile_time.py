"""Compile time and peak memory of gpusq-compile against NVIDIA Model Optimizer.

    python benchmarks/compile_time.py [--models ...] [--repeats N]

Both read the same model file (`timm_model.py`: same weights, same calibration images and batch
size) and do the same work on the CPU: 2:4 by magnitude, INT8 with calibration, ONNX with a
dynamic batch. gpusq-compile also verifies what it wrote; Model Optimizer does not. Neither
fine-tunes nor builds an engine. Each compile is a process of its own, and the two take turns.

- `wall` is the whole process, interpreter and imports included.
- `compile` is `wall` without the start: the tool's imports and building the model. The peer script
  clocks its start; that of gpusq-compile is clocked in a process that does nothing else.
- `peak` is the high-water mark of the process's resident memory.

Writes `results/compile_time.json` and `results/compile_time.md`.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import signal
import subprocess
import sys
import sysconfig
import tempfile
import time
import venv
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import median
from typing import Any

from result_files import write_results

HERE = Path(__file__).resolve().parent
MODEL_FILE = HERE / "timm_model.py"
PEER_SCRIPT = HERE / "peer" / "modelopt_compile.py"
PEER_REQUIREMENTS = HERE / "peer" / "requirements.txt"
PEER_VENV = HERE / ".venv-peer"
RESULTS = HERE / "results"

MODELS = ("deit_tiny_patch16_224", "deit_small_patch16_224", "deit_base_patch16_224")
PACKAGES = (
    "gpusq-compile",
    "torch",
    "timm",
    "onnx",
    "onnx-ir",
    "onnxscript",
    "onnxruntime",
    "onnx-graphsurgeon",
    "numpy",
    "safetensors",
    "torchvision",
    "transformers",
    "tensorrt-rtx",
)
PEER_START = ("import", "model")
OUR_START = "import gpusq_compile.cli, gpusq_compile.api, timm_model; timm_model.model()"
MB = 1e6
POLL_SECONDS = 0.05


@dataclass(frozen=True)
class Run:
    """One compile in one process: seconds, and bytes of resident memory at the highest.

    `phases` are the steps that the tool itself clocks; what else it does (checks between passes,
    writing the report, ending) is in `compile_seconds` alone.
    """

    wall_seconds: float
    start_seconds: float
    peak_bytes: int
    load_before: float
    phases: dict[str, float]

    @property
    def compile_seconds(self) -> float:
        return self.wall_seconds - self.start_seconds


@dataclass(frozen=True)
class Ended:
    """A process that has ended: its `code`, wall seconds, and bytes of resident memory at most.

    `own_peak_bytes` is of the process alone, `peak_bytes` the largest of it and its children.
    """

    code: int
    seconds: float
    peak_bytes: int
    own_peak_bytes: int
    stdout: str
    stderr: str


def run_process(
    command: list[str], environment: dict[str, str], *, timeout: float | None = None
) -> Ended:
    """Run `command` to its end, or kill it and its children after `timeout` seconds.

    This process must stay small: the kernel counts the memory of the parent at the fork, too.
    """
    with tempfile.TemporaryFile("w+") as stdout, tempfile.TemporaryFile("w+") as stderr:
        start = time.perf_counter()
        process = subprocess.Popen(
            command,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=stdout,
            stderr=stderr,
            start_new_session=True,
        )
        own_peak, pid = 0, 0
        try:
            while not pid:
                own_peak = max(own_peak, high_water_mark(process.pid))
                pid, status, usage = os.wait4(process.pid, os.WNOHANG)
                seconds = time.perf_counter() - start
                if not pid:
                    if timeout is not None and seconds > timeout:
                        os.killpg(process.pid, signal.SIGKILL)
                    time.sleep(POLL_SECONDS)
        except BaseException:
            if process.returncode is None and not pid:
                os.killpg(process.pid, signal.SIGKILL)
            raise
        process.returncode = os.waitstatus_to_exitcode(status)
        stdout.seek(0)
        stderr.seek(0)
        return Ended(
            process.returncode,
            seconds,
            usage.ru_maxrss * 1024,
            own_peak or usage.ru_maxrss * 1024,
            stdout.read(),
            stderr.read(),
        )


def high_water_mark(pid: int) -> int:
    """Bytes of resident memory of a process at the highest so far; 0 where the system tells none.

    What a process takes in its last moments may be missed.
    """
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return 0
    found = [line.split()[1] for line in status.splitlines() if line.startswith("VmHWM:")]
    return int(found[0]) * 1024 if found else 0


def measure(command: list[str], environment: dict[str, str]) -> tuple[float, int, str]:
    """Runs `command`, which must succeed; wall seconds, peak resident bytes, standard output."""
    ended = run_process(command, environment)
    if ended.code != 0:
        sys.exit(f"{' '.join(command)}\nexit code {ended.code}\n{ended.stderr[-4000:]}")
    return ended.seconds, ended.peak_bytes, ended.stdout


def run_ours(environment: dict[str, str], rules: str, folder: Path) -> tuple[Run, dict[str, Any]]:
    command = [sys.executable, "-m", "gpusq_compile", str(MODEL_FILE), "--rules", rules]
    command += ["--no-finetune", "--engine", "none", "-o", str(folder)]
    paths = os.pathsep.join([str(HERE.parent), str(HERE)])
    environment = environment | {"PYTHONPATH": paths}
    load = os.getloadavg()[0]
    start, _, _ = measure([sys.executable, "-c", OUR_START], environment)
    seconds, peak, _ = measure(command, environment)
    report = json.loads((folder / "report.json").read_text())
    phases = {entry["name"]: entry["seconds"] for entry in report["passes"]}
    return Run(seconds, start, peak, load, phases), report


def run_peer(python: Path, environment: dict[str, str], folder: Path) -> tuple[Run, dict[str, Any]]:
    load = os.getloadavg()[0]
    seconds, peak, stdout = measure([str(python), str(PEER_SCRIPT), "-o", str(folder)], environment)
    answer = json.loads(stdout.splitlines()[-1])
    phases = answer["seconds"]
    start = sum(phases.pop(name) for name in PEER_START)
    return Run(seconds, start, peak, load, phases), answer


def peer_python() -> Path:
    """The interpreter of the peer's virtual environment, made when it is missing.

    It sees the torch and timm of this environment behind its own packages, so that both tools
    run on the same ones, and holds what the peer wants otherwise (an older onnx).
    """
    python = PEER_VENV / "bin" / "python"
    stamp = PEER_VENV / ".installed"
    wanted = PEER_REQUIREMENTS.read_text()
    if stamp.is_file() and stamp.read_text() == wanted:
        return python
    print(f"making {PEER_VENV}", file=sys.stderr)
    venv.create(PEER_VENV, clear=True, with_pip=True)
    own = subprocess.run(
        [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"],
        check=True, capture_output=True, text=True,
    ).stdout.strip()  # fmt: skip
    shared = dict.fromkeys([sysconfig.get_path("purelib"), sysconfig.get_path("platlib")])
    (Path(own) / "shared.pth").write_text("\n".join(shared) + "\n")
    # pip reports that the peer's onnx does not suit gpusq-compile, which it need not here.
    install = [str(python), "-m", "pip", "install", "-q", "-r", str(PEER_REQUIREMENTS)]
    done = subprocess.run(install, cwd=PEER_VENV, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        sys.exit(f"the peer cannot be installed:\n{done.stderr}")
    stamp.write_text(wanted)
    return python


def machine() -> dict[str, Any]:
    cpu = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        names = [line for line in cpuinfo.read_text().splitlines() if line.startswith("model name")]
        cpu = names[0].partition(":")[2].strip() if names else cpu
    return {
        "cpu": cpu,
        "cores": len(os.sched_getaffinity(0)),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "system": platform.platform(),
        "python": platform.python_version(),
    }


def versions() -> dict[str, str | None]:
    found: dict[str, str | None] = {}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = None
    return found


def summary(runs: list[Run]) -> dict[str, Any]:
    """Medians over the runs, and the runs themselves."""
    names = list(dict.fromkeys(name for run in runs for name in run.phases))
    return {
        "wall_seconds": median(run.wall_seconds for run in runs),
        "start_seconds": median(run.start_seconds for run in runs),
        "compile_seconds": median(run.compile_seconds for run in runs),
        "peak_bytes": median(run.peak_bytes for run in runs),
        "phases": {name: median(run.phases.get(name, 0.0) for run in runs) for name in names},
        "runs": [
            {
                "wall_seconds": run.wall_seconds,
                "start_seconds": run.start_seconds,
                "compile_seconds": run.compile_seconds,
                "peak_bytes": run.peak_bytes,
                "load_before": run.load_before,
                "phases": run.phases,
            }
            for run in runs
        ],
    }


def table(results: dict[str, Any]) -> str:
    """The results as two Markdown tables: totals, then seconds per step."""
    has_peer = any("peer" in result for result in results["models"].values())
    tools = ["gpusq-compile"] + (["nvidia-modelopt"] if has_peer else [])
    keys = ["gpusq"] + (["peer"] if has_peer else [])
    head = ["model", "FP32 weights MB"]
    head += [f"{what}, {tool}" for what in ("wall s", "compile s", "peak MB") for tool in tools]
    head += ["peak aim MB"]
    rows = [head, ["---"] + ["---:"] * (len(head) - 1)]
    for name, result in results["models"].items():
        rows.append(
            [name, f"{result['dense_fp32_bytes'] / MB:.1f}"]
            + [f"{result[key]['wall_seconds']:.1f}" for key in keys]
            + [f"{result[key]['compile_seconds']:.1f}" for key in keys]
            + [f"{result[key]['peak_bytes'] / MB:.0f}" for key in keys]
            + [f"{result['peak_aim_bytes'] / MB:.0f}"]
        )
    lines = ["| " + " | ".join(row) + " |" for row in rows]

    models = list(results["models"])
    for key, tool in zip(keys, tools, strict=True):
        steps = dict.fromkeys(
            step for name in models for step in results["models"][name][key]["phases"]
        )
        lines += ["", f"| {tool}, seconds | " + " | ".join(models) + " |"]
        lines += ["| --- |" + " ---: |" * len(models)]
        for step in steps:
            cells = [results["models"][name][key]["phases"].get(step) for name in models]
            shown = ["" if cell is None else f"{cell:.2f}" for cell in cells]
            lines.append(f"| {step} | " + " | ".join(shown) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--models", nargs="+", default=MODELS, help="timm names")
    parser.add_argument(
        "--repeats", type=int, default=3, help="compiles of each model by each tool"
    )
    parser.add_argument("--images", type=int, default=32, help="calibration images")
    parser.add_argument("--batch", type=int, default=8, help="calibration batch size")
    parser.add_argument("--rules", default=str(HERE / "int8_random_weights.yaml"))
    parser.add_argument("--no-peer", action="store_true", help="measure gpusq-compile alone")
    parser.add_argument("-o", "--output", type=Path, default=RESULTS, help="folder for the results")
    arguments = parser.parse_args()

    peer = None if arguments.no_peer else peer_python()
    results: dict[str, Any] = {
        "schema_version": 1,
        "machine": machine(),
        "versions": versions(),
        "settings": {
            "rules": Path(arguments.rules).name,
            "repeats": arguments.repeats,
            "calibration_images": arguments.images,
            "calibration_batch": arguments.batch,
            "environment": {
                name: os.environ[name]
                for name in ("OMP_NUM_THREADS", "OMP_WAIT_POLICY", "GOMP_SPINCOUNT")
                if name in os.environ
            },
        },
        "models": {},
    }
    for model in arguments.models:
        environment = os.environ | {
            "COMPILE_TIME_MODEL": model,
            "COMPILE_TIME_IMAGES": str(arguments.images),
            "COMPILE_TIME_BATCH": str(arguments.batch),
        }
        ours: list[Run] = []
        theirs: list[Run] = []
        result: dict[str, Any] = {}
        for repeat in range(1, arguments.repeats + 1):
            with tempfile.TemporaryDirectory() as folder:
                run, report = run_ours(environment, arguments.rules, Path(folder) / "gpusq")
                ours.append(run)
                progress = f"{model} {repeat}/{arguments.repeats}: gpusq {run.wall_seconds:.1f} s"
                if peer is not None:
                    run, answer = run_peer(peer, environment, Path(folder) / "peer")
                    theirs.append(run)
                    results["versions"]["peer"] = answer["versions"]
                    progress += f", peer {run.wall_seconds:.1f} s"
            print(progress, file=sys.stderr)
            result["dense_fp32_bytes"] = report["storage"]["dense_fp32_bytes"]
        result["peak_aim_bytes"] = 4 * result["dense_fp32_bytes"] + 1_000_000_000
        result["gpusq"] = summary(ours)
        if theirs:
            result["peer"] = summary(theirs)
        results["models"][model] = result

    text = table(results)
    write_results(arguments.output, "compile_time", results, text)
    print(text)


if __name__ == "__main__":
    main()
