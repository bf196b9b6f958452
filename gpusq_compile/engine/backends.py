"""Which builder is here, and for which GPUs it can build."""

from __future__ import annotations

import ctypes
import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, get_args

from gpusq_compile.engine import probe
from gpusq_compile.errors import InputError, did_you_mean
from gpusq_compile.language.schema import Compute

BACKENDS = ("auto", "none", "tensorrt", "tensorrt-rtx")
PORTABLE = "portable"

PROBE_SECONDS = 120
"""Time for a builder's library to load, from a slow disk that many read at once too."""

_FOUND: dict[str, dict[str, Any]] = {}
"""What the libraries that are here said of themselves."""

GET_RTX = "pip install 'gpusq-compile[rtx]' (any machine, no GPU needed)"
GET_TENSORRT = (
    "pip install 'gpusq-compile[tensorrt]', or run build_engine.sh on a machine that has trtexec"
)


@dataclass(frozen=True)
class Backend:
    """A builder that can run here.

    `gpu` is the compute capability of this machine's GPU ("sm89"), None for TensorRT-RTX, which
    builds without one. `targets` are the names `build_engines` takes.
    """

    name: str
    module: str
    version: str
    targets: tuple[str, ...]
    gpu: str | None = None


def choose_backend(name: str, targets: Sequence[str]) -> tuple[Backend | None, tuple[str, ...]]:
    """The backend that `name` asks for, with remarks on what was passed over.

    "auto" takes TensorRT where it is installed and the GPU is among `targets`, else TensorRT-RTX,
    else none, with a remark that says how to get one. Raises InputError (unknown-engine-backend,
    engine-backend-missing, engine-needs-gpu, unsupported-target) when what was asked for cannot
    be had.
    """
    if name not in BACKENDS:
        raise InputError(
            "unknown-engine-backend",
            f"engine backend '{name}' is not known",
            hint=did_you_mean(name, BACKENDS),
        )
    if name == "none":
        return None, ()
    if not targets:
        raise InputError(
            "no-engine-target", "an engine was asked for, for no GPU", hint=f"name one: {PORTABLE}"
        )
    if name == "tensorrt":
        backend = _tensorrt()
        _check_targets(backend, targets)
        return backend, ()
    if name == "tensorrt-rtx":
        backend = _tensorrt_rtx()
        _check_targets(backend, targets)
        return backend, ()
    return _auto(targets)


def _auto(targets: Sequence[str]) -> tuple[Backend | None, tuple[str, ...]]:
    remarks: list[str] = []
    try:
        full = _tensorrt()
        unsupported = [t for t in targets if t not in full.targets]
        if not unsupported:
            return full, ()
        remarks.append(
            f"TensorRT {full.version} builds for this machine's GPU ({full.gpu}) alone, not for "
            f"{', '.join(unsupported)}: TensorRT-RTX was tried instead"
        )
    except InputError as error:
        if not probe_library("tensorrt").get("missing"):
            # Somebody installed it to have it used.
            remarks.append(f"{error.message}: TensorRT-RTX was tried instead")
    try:
        rtx = _tensorrt_rtx()
    except InputError as error:
        return None, (f"no engine was built: {error.message}; {error.hint}", *remarks)
    _check_targets(rtx, targets)
    return rtx, tuple(remarks)


def probe_library(module: str) -> dict[str, Any]:
    """What probe.py finds of a builder's library; this process does not load it.

    It is asked once where it is there. What is missing may be installed while this process lives.
    """
    if module not in _FOUND:
        found = _run_probe(module)
        if "error" in found:
            return found
        _FOUND[module] = found
    return _FOUND[module]


def _run_probe(module: str) -> dict[str, Any]:
    try:
        done = subprocess.run(
            [sys.executable, "-P", probe.__file__, module],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            encoding="utf-8",
            errors="replace",
            timeout=PROBE_SECONDS,
        )
    except subprocess.TimeoutExpired:
        error = f"loading it takes more than {PROBE_SECONDS} seconds"
        return {"missing": False, "error": error}
    except OSError as error_of_system:
        error = f"no process of {sys.executable or 'Python'} can be started: {error_of_system}"
        return {"missing": False, "error": error}
    try:
        found = json.loads(done.stdout)
    except ValueError:
        found = None
    if isinstance(found, dict):
        return found
    said = done.stderr.strip().splitlines() or ["it says nothing"]
    error = f"its process ended with code {done.returncode}: {said[-1]}"
    return {"missing": False, "error": error}


def _require_library(module: str, name: str, hint: str) -> dict[str, Any]:
    found = probe_library(module)
    if "error" in found:
        why = "is not installed" if found["missing"] else f"cannot be imported: {found['error']}"
        raise InputError(
            "engine-backend-missing", f"engine backend '{name}': {module} {why}", hint=hint
        )
    return found


def _tensorrt_rtx() -> Backend:
    found = _require_library("tensorrt_rtx", "tensorrt-rtx", GET_RTX)
    targets = (PORTABLE, *found["capabilities"])
    return Backend("tensorrt-rtx", "tensorrt_rtx", found["version"], targets)


def _tensorrt() -> Backend:
    version = _require_library("tensorrt", "tensorrt", GET_TENSORRT)["version"]
    if int(version.split(".")[0]) < 10:
        raise InputError(
            "engine-backend-missing",
            f"engine backend 'tensorrt': TensorRT {version} is too old, 10 or later reads "
            "a strongly typed ONNX file of opset 21",
            hint=GET_TENSORRT,
        )
    gpu = gpu_capability()
    if gpu is None:
        raise InputError(
            "engine-needs-gpu",
            "engine backend 'tensorrt' builds on a machine with an NVIDIA GPU; none was found",
            hint="use --engine tensorrt-rtx, which builds without one, or run build_engine.sh "
            "on the machine with the GPU",
        )
    targets = (PORTABLE, gpu) if int(gpu[2:]) >= 80 else (gpu,)
    return Backend("tensorrt", "tensorrt", version, targets, gpu)


def _check_targets(backend: Backend, targets: Sequence[str]) -> None:
    for target in targets:
        if target not in backend.targets:
            raise InputError(
                "unsupported-target",
                f"{backend.name} {backend.version} cannot build an engine for '{target}'",
                hint=f"it can for {', '.join(sorted({*backend.targets} & {*get_args(Compute)}))}; "
                "or --engine none, and run build_engine.sh on a machine with that GPU",
            )


def gpu_capability() -> str | None:
    """Compute capability of the first NVIDIA GPU ("sm89"), None without one.

    Asks the CUDA driver itself, so that it needs neither the CUDA toolkit nor a CUDA build of
    PyTorch (https://docs.nvidia.com/cuda/cuda-driver-api/group__CUDA__DEVICE.html).
    """
    library = "nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1"
    try:
        cuda = ctypes.CDLL(library)
    except OSError:
        return None
    major_attribute, minor_attribute = 75, 76
    device, major, minor = ctypes.c_int(), ctypes.c_int(), ctypes.c_int()
    calls: tuple[Callable[[], int], ...] = (
        lambda: cuda.cuInit(0),
        lambda: cuda.cuDeviceGet(ctypes.byref(device), 0),
        lambda: cuda.cuDeviceGetAttribute(ctypes.byref(major), major_attribute, device),
        lambda: cuda.cuDeviceGetAttribute(ctypes.byref(minor), minor_attribute, device),
    )
    if any(call() != 0 for call in calls):
        return None
    return f"sm{major.value}{minor.value}"
