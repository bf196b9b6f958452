"""Build one engine in a process of its own: `python worker.py`, a job on standard input.

The builder holds the process for minutes, polls for cancellation only between its phases, may
need more memory than there is, and may abort. In a child process none of this can hang or end the
compiler. This file imports nothing of the package, so that the child starts without it.

The job is one line of JSON (see `Job`); the parent keeps standard input open while it lives.
Events are lines of JSON on standard output: `progress` (phase, fraction 0..1), `error` (kind,
message, node, op), `done` (seconds, version). The builder's messages go to builder.log in the job's
scratch folder, one JSON pair [severity, message] a line. Should the parent die, the worker removes
the scratch folder and the half-written plan, and ends.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable
from typing import Any, TextIO, TypedDict


class Job(TypedDict):
    """What to build.

    `plan` is the file to write, `target` "portable" or a compute capability such as "sm89",
    `batch` min, opt and max, `scratch` a folder that is the job's own.
    """

    module: str
    onnx: str
    plan: str
    scratch: str
    target: str
    batch: tuple[int, int, int]
    sparse: bool


LOG_NAME = "builder.log"

Emit = Callable[[dict[str, Any]], None]


def main() -> int:
    # The terminal's Ctrl-C reaches the whole process group: the parent decides what it means.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    job: Job = json.loads(sys.stdin.readline())
    events = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    threading.Thread(target=_exit_with_parent, args=(job,), daemon=True).start()
    lock = threading.Lock()

    def emit(event: dict[str, Any]) -> None:
        with lock:
            print(json.dumps(event), file=events, flush=True)

    log_file = os.path.join(job["scratch"], LOG_NAME)
    with open(log_file, "w", encoding="utf-8", buffering=1) as log:
        return build(job, log, emit)


def _exit_with_parent(job: Job) -> None:
    while os.read(0, 4096):
        pass
    with contextlib.suppress(OSError):
        os.unlink(job["plan"])
    shutil.rmtree(job["scratch"], ignore_errors=True)
    os._exit(1)


def build(job: Job, log: TextIO, emit: Emit) -> int:
    start = time.monotonic()
    # One API for two libraries without a common typed interface: hence Any.
    trt: Any = importlib.import_module(job["module"])
    logger = _logger(trt, log)
    builder = trt.Builder(logger)
    # TensorRT 11 knows no other networks, and may drop the flag.
    flag = getattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)
    network = builder.create_network(0 if flag is None else 1 << int(flag))
    parser = trt.OnnxParser(network, logger)
    parsed = parser.parse_from_file(job["onnx"])
    if not parsed or network.num_inputs == 0:
        for index in range(parser.num_errors):
            error = parser.get_error(index)
            emit(
                {
                    "event": "error",
                    "kind": "parse",
                    "message": error.desc(),
                    "node": error.node_name(),
                    "op": error.node_operator(),
                }
            )
        if parsed:
            emit({"event": "error", "kind": "parse", "message": "the file holds no graph"})
        return 1
    config = builder.create_builder_config()
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    if job["sparse"]:
        config.set_flag(trt.BuilderFlag.SPARSE_WEIGHTS)
    if not _set_target(trt, config, job):
        emit({"event": "error", "kind": "build", "message": f"target {job['target']} refused"})
        return 1
    problem = _set_batch(builder, network, config, job["batch"])
    if problem is not None:
        emit({"event": "error", "kind": "shape", "message": problem})
        return 1
    monitor = _monitor(trt, emit)
    config.progress_monitor = monitor
    plan = builder.build_serialized_network(network, config)
    if plan is None:
        emit({"event": "error", "kind": "build", "message": "the builder returned no engine"})
        return 1
    try:
        with open(job["plan"], "wb") as file:
            file.write(memoryview(plan))
    except OSError as error:
        emit(
            {
                "event": "error",
                "kind": "write",
                "message": error.strerror or str(error),
                "errno": error.errno,
            }
        )
        return 1
    seconds = time.monotonic() - start
    emit({"event": "done", "seconds": seconds, "version": trt.__version__})
    return 0


def _set_target(trt: Any, config: Any, job: Job) -> bool:
    if job["module"] == "tensorrt_rtx":
        # Without a target TensorRT-RTX builds for compute capability 8.0, 8.6, 8.9, 12.0 and later.
        if job["target"] == "portable":
            return True
        config.num_compute_capabilities = 1
        capability = getattr(trt.ComputeCapability, job["target"].upper())
        return bool(config.set_compute_capability(capability, 0))
    config.builder_optimization_level = 4
    if job["target"] == "portable":
        config.hardware_compatibility_level = trt.HardwareCompatibilityLevel.AMPERE_PLUS
    return True


def _set_batch(builder: Any, network: Any, config: Any, batch: tuple[int, int, int]) -> str | None:
    """Add the profile of batch sizes; the reason when the inputs do not allow it."""
    profile = builder.create_optimization_profile()
    dynamic = False
    for index in range(network.num_inputs):
        tensor = network.get_input(index)
        shape = tuple(tensor.shape)
        others = [axis for axis, size in enumerate(shape) if size == -1 and axis > 0]
        if others:
            return (
                f"input '{tensor.name}' has shape {list(shape)}: dimension {others[0]} is dynamic, "
                "and only the first, the batch, may be"
            )
        if shape and shape[0] == -1:
            dynamic = True
            profile.set_shape(tensor.name, *((size, *shape[1:]) for size in batch))
    if dynamic and config.add_optimization_profile(profile) < 0:
        return "the builder refused the batch sizes"
    return None


def _logger(trt: Any, log: TextIO) -> Any:
    # mypy sees a base class of type Any: the module is a parameter.
    class Logger(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)

        def log(self, severity: Any, message: str) -> None:
            log.write(json.dumps([severity.name, message]) + "\n")

    return Logger()


def _monitor(trt: Any, emit: Emit) -> Any:
    class Monitor(trt.IProgressMonitor):  # type: ignore[misc]
        """Turns the builder's nested phases into one fraction."""

        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self.phases: list[tuple[str, int]] = []
            self.done: dict[str, int] = {}
            self.shown = (-1, "")

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            self.phases.append((phase_name, max(num_steps, 1)))
            self.done[phase_name] = 0
            self.show()

        def phase_finish(self, phase_name: str) -> None:
            self.phases = [p for p in self.phases if p[0] != phase_name]
            self.show()

        def step_complete(self, phase_name: str, step: int) -> bool:
            self.done[phase_name] = max(self.done.get(phase_name, 0), step + 1)
            self.show()
            return True

        def show(self) -> None:
            fraction, share = 0.0, 1.0
            for name, steps in self.phases:
                fraction += share * min(self.done[name], steps) / steps
                share /= steps
            phase = self.phases[-1][0] if self.phases else "Writing engine"
            percent = int(100 * fraction) if self.phases else 100
            percent = max(percent, self.shown[0])
            if (percent, phase) != self.shown:
                self.shown = (percent, phase)
                emit({"event": "progress", "phase": phase, "fraction": percent / 100})

    return Monitor()


if __name__ == "__main__":
    sys.exit(main())
