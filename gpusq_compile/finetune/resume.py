"""Taking up an earlier run: what it was started with, compared with what this one is."""

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path
from typing import Any

import torch

from gpusq_compile import __version__
from gpusq_compile.compilation import Compilation
from gpusq_compile.data import batches
from gpusq_compile.finetune.checkpoint import RUN, Checkpoints, check_resumable
from gpusq_compile.finetune.feed import bytes_of, digest
from gpusq_compile.model_source import DATA_FUNCTIONS, DataFactory
from gpusq_compile.output import digest as file_digest
from gpusq_compile.randomness import derived_seed, isolated_random


def open_checkpoints(compilation: Compilation, folder: Path) -> Checkpoints:
    """The checkpoints of this run in `folder`: an earlier run's with `--resume`, else none yet.

    Raises:
        InputError: the earlier run was started with something else; the differences are named.
    """
    run = fingerprint(compilation)
    console, first = compilation.console, compilation.processes.first
    if compilation.options.resume:
        if not check_resumable(folder, run):
            console.warn(f"no checkpoint in {folder}: the run starts from the beginning")
    elif first and (folder / RUN).exists():
        console.warn(f"dropping the checkpoint of an earlier run in {folder} (--resume goes on)")
    if first and not compilation.options.resume:
        shutil.rmtree(folder, ignore_errors=True)
    return Checkpoints(folder, run, every=compilation.options.checkpoint_every, writes=first)


def fingerprint(compilation: Compilation) -> dict[str, Any]:
    """The rules, the model with its weights, the data and the options of a compilation.

    Of the data it has the length and the first batch, read with a seed of its own.
    """
    options, source = compilation.options, compilation.source
    return {
        "tool": __version__,
        "rules": compilation.rules.as_dict(),
        "model": {
            "class": type(source.module).__name__,
            "structure": hashlib.sha256(repr(source.module).encode()).hexdigest(),
            "weights": weights_digest(source.module),
            "file": None if source.file is None else file_digest(source.file),
        },
        "data": {
            name: data_digest(factory, name, options.seed)
            for name in DATA_FUNCTIONS
            if (factory := getattr(source, name)) is not None
        },
        "options": {
            "seed": options.seed,
            "steps": options.steps,
            "epochs": options.epochs,
            "scope": compilation.network.scope,
            # `output: auto` depends on them.
            "targets": list(compilation.targets),
            "device": compilation.device.type,
            "processes": compilation.processes.world,
        },
        "torch": torch.__version__,
    }


def weights_digest(module: torch.nn.Module) -> str:
    """SHA-256 over the names and values of a module's parameters and buffers."""
    found = hashlib.sha256()
    for name, value in module.state_dict().items():
        if isinstance(value, torch.Tensor):
            found.update(f"{name} {value.dtype} {list(value.shape)}".encode())
            found.update(bytes_of(value))
    return found.hexdigest()


def data_digest(factory: DataFactory, name: str, seed: int) -> dict[str, Any]:
    data = factory()
    cpu = torch.device("cpu")
    with isolated_random(cpu, derived_seed(seed, "fingerprint")):
        first = next(batches(lambda: data, name, cpu, limit=1))
    try:
        length = len(data)  # type: ignore[arg-type]
    except TypeError:
        length = None
    return {"batches": length, "first": digest(first)}
