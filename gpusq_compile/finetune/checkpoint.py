"""Checkpoints of a fine-tune: safetensors and JSON, whole or not there, for `--resume`.

    checkpoint/run.json                      what the run was started with
    checkpoint/sparse-0000120/state.safetensors, state.json
    checkpoint/quantize-0000040/...          the newest of each phase; of a finished one ...-end

A checkpoint is written to a temporary folder, flushed to the disk and renamed, so that a process
killed at any moment leaves the one before. Everything but the two phases is computed again by a
resumed run: it is deterministic.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from gpusq_compile.errors import InputError, Location, relative_to_cwd
from gpusq_compile.output import digest, write_json

FOLDER = "checkpoint"
RUN = "run.json"
TENSORS = "state.safetensors"
STATE = "state.json"
TEMPORARY = ".writing"

INTERVAL_S = 300.0
"""Seconds between two checkpoints where no number of steps is given."""
SHOWN_DIFFERENCES = 5

Tensors = dict[str, torch.Tensor]


@dataclass
class Checkpoints:
    """Where a run keeps its checkpoints.

    `run` is what the run was started with, `every` the steps between two checkpoints (by time
    where it is None). Of several processes one alone `writes`.
    """

    folder: Path
    run: dict[str, Any]
    every: int | None = None
    writes: bool = True
    last_saved: float = field(default_factory=time.monotonic)

    def due(self, step: int) -> bool:
        if not self.writes:
            return False
        if self.every is not None:
            return step % self.every == 0
        return time.monotonic() - self.last_saved >= INTERVAL_S

    def save(
        self, phase: str, step: int, tensors: Tensors, state: dict[str, Any], *, end: bool = False
    ) -> None:
        """Write the checkpoint of a phase after `step` and remove that phase's older ones.

        That of the phase's `end` has a name of its own: the one before it stands until it is whole.
        """
        temporary = self.folder / TEMPORARY
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        if not (self.folder / RUN).exists():
            write_json(self.folder / RUN, self.run)
        save_tensors(tensors, temporary / TENSORS)
        about = {"step": step, "sha256": digest(temporary / TENSORS), **state}
        # Unlike in the report, a metric may be NaN here.
        (temporary / STATE).write_text(json.dumps(about))
        for path in (temporary / TENSORS, temporary / STATE, temporary):
            flush(path)
        older = self._of_phase(phase)
        final = self.folder / (f"{phase}-{step:07d}" + ("-end" if end else ""))
        os.replace(temporary, final)
        flush(self.folder)
        for path in older:
            shutil.rmtree(path, ignore_errors=True)
        self.last_saved = time.monotonic()

    def load(self, phase: str) -> tuple[Tensors, dict[str, Any]] | None:
        """The newest checkpoint of a phase, None where there is none.

        Raises:
            InputError: it is damaged: cut short, or not what its digest says.
        """
        found = self._of_phase(phase)
        if not found:
            return None
        path = found[-1]
        try:
            state = json.loads((path / STATE).read_text())
            whole = state["sha256"] == digest(path / TENSORS)
            tensors = load_file(path / TENSORS) if whole else {}
        except (OSError, ValueError, TypeError, KeyError, SafetensorError):
            whole = False
        if not whole:
            raise damaged(path, "it is cut short or was changed")
        return tensors, state

    def has(self, phase: str) -> bool:
        return bool(self._of_phase(phase))

    def _of_phase(self, phase: str) -> list[Path]:
        return sorted(path for path in self.folder.glob(f"{phase}-*") if path.is_dir())


def save_tensors(tensors: Tensors, path: Path) -> None:
    """Write a safetensors file. Tied parameters share their memory, which the format refuses."""
    path.touch()
    mode = path.stat().st_mode
    save_file({n: t.detach().cpu().clone().contiguous() for n, t in tensors.items()}, path)
    # The library takes the right to read from everybody else.
    path.chmod(mode)


def damaged(path: Path, reason: str) -> InputError:
    return InputError(
        "checkpoint-damaged",
        f"the checkpoint cannot be used: {reason}",
        location=Location(relative_to_cwd(path)),
        hint="run without --resume to start from the beginning",
    )


def check_resumable(folder: Path, fingerprint: dict[str, Any]) -> bool:
    """Whether there is a run to resume in `folder`.

    Raises:
        InputError: the run was started with something else; the differences are named.
    """
    path = folder / RUN
    if not path.exists():
        return False
    try:
        before = json.loads(path.read_text())
    except (OSError, ValueError):
        raise damaged(path, "it is no JSON") from None
    found = differences(before, json.loads(json.dumps(fingerprint)))
    if found:
        shown = "; ".join(found[:SHOWN_DIFFERENCES])
        more = len(found) - SHOWN_DIFFERENCES
        raise InputError(
            "resume-differs",
            f"the run in {relative_to_cwd(folder)} was started with something else: {shown}"
            + (f"; and {more} more" if more > 0 else ""),
            hint="undo the difference, or run without --resume to start from the beginning",
        )
    return True


def differences(before: Any, now: Any, name: str = "") -> list[str]:
    """What differs between two JSON values, each as a sentence with its dotted name."""
    if isinstance(before, dict) and isinstance(now, dict):
        keys = [*before, *(key for key in now if key not in before)]
        return [
            line
            for key in keys
            for line in differences(before.get(key), now.get(key), f"{name}.{key}".lstrip("."))
        ]
    if isinstance(before, list) and isinstance(now, list) and len(before) == len(now):
        return [
            line
            for index, (old, new) in enumerate(zip(before, now, strict=True))
            for line in differences(old, new, f"{name}[{index}]")
        ]
    return [] if before == now else [f"{name} was {_shown(before)} and is {_shown(now)}"]


def _shown(value: Any) -> str:
    text = "not there" if value is None else json.dumps(value)
    return text if len(text) <= 40 else text[:37] + "..."


def flush(path: Path) -> None:
    """Have the system write a file, or a folder's list of names, to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def random_state(device: torch.device) -> tuple[Tensors, dict[str, Any]]:
    """The state of every global random generator, as tensors and as JSON."""
    tensors = {"rng/torch": torch.get_rng_state()}
    if device.type == "cuda":
        tensors["rng/cuda"] = torch.cuda.get_rng_state(device)
    kind, keys, *rest = np.random.get_state()
    return tensors, {"python": random.getstate(), "numpy": [kind, np.asarray(keys).tolist(), *rest]}


def restore_random_state(device: torch.device, tensors: Tensors, state: dict[str, Any]) -> None:
    torch.set_rng_state(tensors["rng/torch"])
    if device.type == "cuda":
        torch.cuda.set_rng_state(tensors["rng/cuda"], device)
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    kind, keys, *rest = state["numpy"]
    np.random.set_state((kind, np.array(keys, dtype=np.uint32), *rest))


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> Tensors:
    """An optimizer's state as `optimizer/INDEX/KEY` tensors; all of it is tensors."""
    return {
        f"optimizer/{index}/{key}": torch.as_tensor(value)
        for index, entries in optimizer.state_dict()["state"].items()
        for key, value in entries.items()
        if value is not None
    }


def restore_optimizer(optimizer: torch.optim.Optimizer, tensors: Tensors) -> None:
    state: dict[int, dict[str, torch.Tensor]] = {}
    for name, value in tensors.items():
        kind, _, rest = name.partition("/")
        if kind == "optimizer":
            index, _, key = rest.partition("/")
            state.setdefault(int(index), {})[key] = value
    groups = optimizer.state_dict()["param_groups"]
    optimizer.load_state_dict({"state": state, "param_groups": groups})


def prefixed(prefix: str, tensors: Tensors) -> Tensors:
    return {f"{prefix}/{name}": value for name, value in tensors.items()}


def without_prefix(prefix: str, tensors: Tensors) -> Tensors:
    start = f"{prefix}/"
    return {n.removeprefix(start): value for n, value in tensors.items() if n.startswith(start)}
