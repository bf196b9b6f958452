"""The output folder: staged beside its final place, published by rename, listed in a manifest."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import shutil
import signal
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from gpusq_compile.errors import InputError

MANIFEST = "manifest.json"
REPRO = "repro"
FOLDERS = ("engine", "dumps", "triton", REPRO)
REPORT = "report.json"
STAGING_PREFIX = ".gpusq-staging-"


@contextmanager
def staging(output: Path | None, *, written: bool = True) -> Iterator[Path]:
    """A fresh folder to write in, on the file system of `output`; removed at the end in any case.

    Args:
        written: whether anything is going to be; otherwise no folder is made, and `output` need
            not be writable.

    Raises:
        InputError: `output` is a file, or cannot be created or written.
    """
    if output is None and written:
        with tempfile.TemporaryDirectory(prefix="gpusq-") as folder:
            yield Path(folder)
        return
    if output is not None:
        _check_free(output)
    if output is None or not written:
        # Whoever writes all the same fails at once, as nothing can lie below a device.
        yield Path(os.devnull) / "unwritten"
        return
    missing = [folder for folder in (output, *output.parents) if not folder.exists()]
    try:
        output.mkdir(parents=True, exist_ok=True)
        _remove_abandoned(output)
        stage = Path(tempfile.mkdtemp(prefix=f"{STAGING_PREFIX}{os.getpid()}-", dir=output))
    except OSError as error:
        _remove_empty(missing)
        raise InputError(
            "output-not-writable",
            f"cannot write to {output}: {error.strerror}",
            hint="choose another folder with -o",
        ) from None
    try:
        yield stage
    finally:
        shutil.rmtree(stage, ignore_errors=True)
        _remove_empty(missing)


def _check_free(output: Path) -> None:
    """Raise InputError where a file lies in place of `output` or of a folder in it."""
    if output.exists() and not output.is_dir():
        raise InputError(
            "output-is-a-file", f"{output} is a file", hint="-o takes a folder, made when missing"
        )
    blocked = [name for name in FOLDERS if output.is_dir() and (output / name).is_file()]
    if blocked:
        raise InputError(
            "output-in-the-way", f"{output / blocked[0]} is a file where a folder must go"
        )


def _remove_abandoned(output: Path) -> None:
    """Remove the staging folders of processes of this machine that were killed."""
    for path in output.glob(f"{STAGING_PREFIX}*"):
        owner = path.name.removeprefix(STAGING_PREFIX).partition("-")[0]
        if owner.isdecimal() and not _is_running(int(owner)):
            shutil.rmtree(path, ignore_errors=True)


def _is_running(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True  # Another user's.
    return True


def _remove_empty(folders: list[Path]) -> None:
    """Remove the folders that this run made, innermost first, as long as they are empty."""
    for folder in folders:
        try:
            folder.rmdir()
        except OSError:
            return


def stale_logs(output: Path, names: list[str]) -> list[Path]:
    """The logs of engines that were built here from an earlier run's model."""
    engine = output / "engine"
    found = [*engine.glob("*.log"), *engine.glob("*.layers.json")]
    return [path for path in found if str(path.relative_to(output)) not in names]


def publish(stage: Path, output: Path, about: dict[str, Any]) -> list[Path]:
    """Move every staged file into `output`, the manifest last.

    Everything that can fail for want of space is done before the first rename, and signals wait
    until the last one: the folder holds one run or the other. Files that an earlier run listed in
    its manifest and this one did not write are removed, and so is the `repro/` of a crash. What
    `build_engine.sh` logged of the earlier run's model is kept as `*.old`, so that nobody reads it
    as this one's. `about` is what the manifest says beside its files.

    Returns:
        All files of this run, the manifest last.
    """
    staged = sorted(path for path in stage.rglob("*") if path.is_file())
    names = [str(path.relative_to(stage)) for path in staged]
    manifest = {**about, "files": {n: digest(p) for n, p in zip(names, staged, strict=True)}}
    write_json(stage / MANIFEST, manifest)
    stale = sorted(set(_listed(output)) - set(names))
    for name in names:
        (output / name).parent.mkdir(parents=True, exist_ok=True)
    with signals_held():
        for name in (*names, MANIFEST):
            os.replace(stage / name, output / name)
        for name in stale:
            (output / name).unlink(missing_ok=True)
            _remove_empty([p for p in (output / name).parents if output in p.parents])
        shutil.rmtree(output / REPRO, ignore_errors=True)
        for log in stale_logs(output, names):
            os.replace(log, log.with_name(f"{log.name}.old"))
    return [output / name for name in (*names, MANIFEST)]


@contextmanager
def signals_held() -> Iterator[None]:
    """Let Ctrl-C and its like wait until the block is done.

    A blocked mask would hold for this thread alone, and any other thread of the process, such as
    one of torch's, would take the signal and have Python run its handler here all the same.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    came: list[int] = []
    held = [signal.SIGINT, signal.SIGTERM, signal.SIGHUP]
    # None is a handler that was not set from Python, and could not be put back.
    before = {number: old for number in held if (old := signal.getsignal(number)) is not None}
    before = {number: old for number, old in before.items() if old != signal.SIG_IGN}
    for number in before:
        signal.signal(number, lambda number, _: came.append(number))
    try:
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, old)
        for caught in came:
            signal.raise_signal(caught)


def _listed(output: Path) -> list[str]:
    """The files an earlier run's manifest lists, as long as they are files inside the folder."""
    try:
        manifest = json.loads((output / MANIFEST).read_text())
    except (OSError, ValueError):
        return []
    files = manifest.get("files") if isinstance(manifest, dict) else None
    names = [name for name in files if isinstance(name, str)] if isinstance(files, dict) else []
    root = output.resolve()
    return [
        name
        for name in names
        if (output / name).is_file() and (output / name).resolve().is_relative_to(root)
    ]


def digest(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_json(path: Path, value: Any) -> None:
    """Write `value` to a temporary name and rename it, so that no reader sees half of it."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(json.dumps(value, indent=2, allow_nan=False) + "\n")
    os.replace(temporary, path)


def versions() -> dict[str, str]:
    """Versions of what the result depends on."""
    found = {"python": platform.python_version()}
    for package in (
        "torch",
        "onnx",
        "onnxruntime",
        "onnx-graphsurgeon",
        "tensorrt-rtx",
        "tensorrt",
    ):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found
