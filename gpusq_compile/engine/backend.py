"""Build TensorRT engines from an ONNX file, with TensorRT or TensorRT-RTX."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

import onnx as onnx_library

from gpusq_compile.engine import worker
from gpusq_compile.engine.attention import find_attentions
from gpusq_compile.engine.backends import PORTABLE, Backend, choose_backend
from gpusq_compile.engine.builder_log import BuilderLog, find_gemms, parse_builder_log
from gpusq_compile.engine.report import (
    BatchRange,
    BuiltEngine,
    EngineReport,
    MarkedAttention,
    MarkedGemm,
)
from gpusq_compile.errors import CheckFailed, InputError, relative_to_cwd

# Called with the target, the builder's phase and the finished fraction, 0 to 1.
Progress = Callable[[str, str, float], None]

_ERROR_LINES = 12
# Q/DQ, a transpose, a bias and an activation lie between a GEMM and what belongs to it.
_NEAR = 5
# Said by every build on a machine without a GPU, at error level, and of no consequence.
_HARMLESS = ("Thread context has not been set", "CUDA driver version is insufficient")


def build_engines(
    onnx: Path,
    out_dir: Path,
    *,
    backend: Literal["auto", "none", "tensorrt", "tensorrt-rtx"] = "auto",
    targets: Sequence[str] = (PORTABLE,),
    gemms: Sequence[MarkedGemm] = (),
    attentions: Sequence[MarkedAttention] = (),
    batch: BatchRange | None = None,
    progress: Progress | None = None,
) -> EngineReport:
    """Build `out_dir/engine/NAME.plan` (portable) or `NAME.smXX.plan` for each target.

    `onnx` is a strongly typed file of opset 21 whose inputs are dynamic in the first dimension at
    most; NAME is its stem. "portable" means compute capability 8.0, 8.6, 8.9, 12.0 and later with
    TensorRT-RTX, Ampere and later with TensorRT. Every engine is built in a child process, written
    to a temporary name and renamed; Ctrl-C ends the child and leaves no file.

    Each of `gemms` and `attentions` is looked up in the builder's log; one that has not the type it
    should have is in the report with its reason (`EngineReport.missed()`), no error.

    Raises InputError: onnx-file-missing, bad-batch-range, engine-not-writable, disk-full, and those
    of `choose_backend`. Raises CheckFailed: engine-parse-failed, engine-build-failed,
    engine-dynamic-shape.
    """
    batch = _checked(batch or BatchRange())
    targets = tuple(dict.fromkeys(targets))
    chosen, remarks = choose_backend(backend, targets)
    if chosen is None:
        return EngineReport("none", None, {}, remarks)
    if not onnx.is_file():
        raise InputError("onnx-file-missing", f"no ONNX file {relative_to_cwd(onnx)}")
    folder = out_dir / "engine"
    built: dict[str, BuiltEngine] = {}
    logs: list[BuilderLog] = []
    for target in targets:
        name = f"{onnx.stem}.plan" if target == PORTABLE else f"{onnx.stem}.{target}.plan"
        run = _build(chosen, onnx, folder / name, target, batch, gemms, progress)
        log = parse_builder_log(message for _, message in run.log)
        logs.append(log)
        built[target] = BuiltEngine(
            file=f"engine/{name}",
            bytes=(folder / name).stat().st_size,
            seconds=round(run.seconds, 3),
            gemms=find_gemms(log, gemms),
            attentions=find_attentions(log, attentions),
        )
    remarks = (*remarks, *_remarks(chosen, targets, gemms, logs))
    return EngineReport(chosen.name, chosen.version, built, remarks)


@dataclass(frozen=True)
class _Run:
    """What a worker left behind; `seconds` is set when it finished its engine."""

    log: list[tuple[str, str]]
    errors: list[dict[str, Any]]
    seconds: float
    exit_code: int
    stderr: str


def _checked(batch: BatchRange) -> BatchRange:
    if not 1 <= batch.min <= batch.opt <= batch.max:
        raise InputError(
            "bad-batch-range",
            f"batch sizes are min {batch.min}, opt {batch.opt}, max {batch.max}; "
            "expected 1 <= min <= opt <= max",
        )
    return batch


def _remarks(
    backend: Backend,
    targets: Sequence[str],
    gemms: Sequence[MarkedGemm],
    logs: Sequence[BuilderLog],
) -> tuple[str, ...]:
    remarks = []
    if any(g.sparse for g in gemms) and all(log.eligible is None for log in logs):
        why = (
            "TensorRT-RTX picks kernels on the GPU that runs the engine"
            if backend.name == "tensorrt-rtx"
            else "its log has no sparsity lines"
        )
        remarks.append(
            f"whether {backend.name} uses sparse kernels is unknown: {why}; build_engine.sh shows "
            "it on the GPU, with TensorRT"
        )
    if backend.name == "tensorrt" and PORTABLE in targets:
        remarks.append(
            f"a portable TensorRT engine gives up speed on this GPU: target '{backend.gpu}' builds "
            "for it alone"
        )
    unread = sum(log.unread for log in logs)
    if unread:
        remarks.append(f"{unread} layer lines of the builder log have an unknown form")
    return tuple(remarks)


def _build(
    backend: Backend,
    onnx: Path,
    plan: Path,
    target: str,
    batch: BatchRange,
    gemms: Sequence[MarkedGemm],
    progress: Progress | None,
) -> _Run:
    partial = plan.with_name(f".{plan.name}.{os.getpid()}.partial")
    try:
        plan.parent.mkdir(parents=True, exist_ok=True)
        # Minutes of building are not spent before it is known that the result can be written.
        partial.touch()
        with tempfile.TemporaryDirectory(prefix="gpusq-engine-") as scratch:
            job: worker.Job = {
                "module": backend.module,
                "onnx": str(onnx.resolve()),
                "plan": str(partial.resolve()),
                "scratch": scratch,
                "target": target,
                "batch": (batch.min, batch.opt, batch.max),
                "sparse": any(g.sparse for g in gemms),
            }
            run = _run_worker(job, target, progress)
        if run.exit_code != 0:
            raise _failure(run, onnx, plan, target, gemms)
        os.replace(partial, plan)
        return run
    except OSError as error:
        raise _not_written(plan, error.errno, error.strerror or str(error)) from error
    finally:
        with contextlib.suppress(OSError):
            partial.unlink()


def _run_worker(job: worker.Job, target: str, progress: Progress | None) -> _Run:
    stderr_file = Path(job["scratch"]) / "stderr"
    errors: list[dict[str, Any]] = []
    seconds = 0.0
    command = [sys.executable, "-P", str(Path(worker.__file__))]
    with stderr_file.open("w", encoding="utf-8") as stderr:
        try:
            process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=stderr, text=True
            )
        except OSError as error:
            raise CheckFailed(
                "engine-build-failed",
                f"the builder for {target} cannot be started as a process: {error}",
            ) from error
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            # A process that has ended already says by its exit code and its last words why.
            with contextlib.suppress(BrokenPipeError):
                process.stdin.write(json.dumps(job) + "\n")
                process.stdin.flush()
            for line in process.stdout:
                event = json.loads(line)
                if event["event"] == "progress" and progress is not None:
                    progress(target, event["phase"], event["fraction"])
                elif event["event"] == "error":
                    errors.append(event)
                elif event["event"] == "done":
                    seconds = event["seconds"]
            exit_code = process.wait()
        finally:
            # Reached with the child alive on Ctrl-C, or when `progress` raised.
            process.kill()
            process.wait()
            process.stdout.close()
            with contextlib.suppress(BrokenPipeError):
                process.stdin.close()
    log_file = Path(job["scratch"]) / worker.LOG_NAME
    lines = log_file.read_text(encoding="utf-8").splitlines() if log_file.exists() else []
    return _Run(
        log=[cast("tuple[str, str]", tuple(json.loads(line))) for line in lines],
        errors=errors,
        seconds=seconds,
        exit_code=exit_code,
        stderr=stderr_file.read_text(encoding="utf-8", errors="replace").strip(),
    )


def _failure(
    run: _Run, onnx: Path, plan: Path, target: str, gemms: Sequence[MarkedGemm]
) -> InputError | CheckFailed:
    first = run.errors[0] if run.errors else None
    if first is not None and first["kind"] == "write":
        return _not_written(plan, first["errno"], first["message"])
    if first is not None and first["kind"] == "shape":
        return CheckFailed("engine-dynamic-shape", f"{relative_to_cwd(onnx)}: {first['message']}")
    said = _error_lines(run)
    if first is not None and first["kind"] == "parse":
        node = first.get("node") or ""
        layer = layer_of_node(onnx, node, gemms) if node else None
        where = f" at node '{node}' ({first['op']})" if node else ""
        whose = f", layer '{layer}'" if layer else ""
        return CheckFailed(
            "engine-parse-failed",
            f"{relative_to_cwd(onnx)}: the builder cannot read the file{where}{whose}:\n{said}",
        )
    if run.exit_code < 0:
        name = signal.Signals(-run.exit_code).name
        memory = ": most likely the machine ran out of memory" if name == "SIGKILL" else ""
        return CheckFailed(
            "engine-build-failed",
            f"{relative_to_cwd(onnx)}: the builder for {target} was ended by {name}{memory}\n"
            f"{said}",
            hint="build on a machine with more memory, or use build_engine.sh on the GPU machine"
            if memory
            else None,
        )
    named = _named_gemm(run, gemms)
    whose = f" at layer '{named}'" if named else ""
    return CheckFailed(
        "engine-build-failed",
        f"{relative_to_cwd(onnx)}: the builder for {target} failed{whose}:\n{said}",
    )


def _error_lines(run: _Run) -> str:
    """The builder's own words: what the parser says, else its error messages and stderr."""
    said = [e["message"] for e in run.errors if e["kind"] == "parse"]
    if not said:
        said = [m for severity, m in run.log if "ERROR" in severity]
        said += run.stderr.splitlines()[-_ERROR_LINES:]
    lines = dict.fromkeys(
        line.strip() for message in said for line in message.split("\n") if line.strip()
    )
    kept = [line for line in lines if not any(text in line for text in _HARMLESS)]
    if run.errors and not kept:
        kept = [run.errors[0]["message"]]
    return "\n".join(f"  {line}" for line in kept[:_ERROR_LINES])


def _named_gemm(run: _Run, gemms: Sequence[MarkedGemm]) -> str | None:
    said = [m for severity, m in run.log if "ERROR" in severity]
    named = [g.name for g in gemms if any(g.name in message for message in said)]
    return max(named, key=len) if named else None


def layer_of_node(onnx: Path, node: str, gemms: Sequence[MarkedGemm]) -> str | None:
    """The marked layer that the ONNX node belongs to: the nearest by the graph's edges.

    Of two as near, the one that the node feeds. None where no marked layer is within a few nodes.
    """
    marked = {g.name for g in gemms}
    graph = onnx_library.load(str(onnx), load_external_data=False).graph
    readers: dict[str, list[str]] = {}
    writers: dict[str, str] = {}
    ends = {n.name: (list(n.input), list(n.output)) for n in graph.node}
    for n in graph.node:
        for tensor in n.input:
            readers.setdefault(tensor, []).append(n.name)
        for tensor in n.output:
            writers[tensor] = n.name

    def after(name: str) -> list[str]:
        return [r for tensor in ends[name][1] for r in readers.get(tensor, [])]

    def before(name: str) -> list[str]:
        return [writers[tensor] for tensor in ends[name][0] if tensor in writers]

    start = [node] if node in ends else []
    downstream, upstream = start, start
    for _ in range(_NEAR):
        for name in (*downstream, *upstream):
            if name in marked:
                return name
        downstream = list(dict.fromkeys(n for name in downstream for n in after(name)))
        upstream = list(dict.fromkeys(n for name in upstream for n in before(name)))
    return None


def _not_written(plan: Path, number: int | None, message: str) -> InputError:
    where = relative_to_cwd(plan)
    if number in (errno.ENOSPC, errno.EDQUOT):
        return InputError(
            "disk-full",
            f"no space left to write {where}",
            hint="free some space and run again; nothing half-written was left",
        )
    return InputError(
        "engine-not-writable",
        f"cannot write {where}: {message}",
        hint="choose another output folder with -o",
    )
