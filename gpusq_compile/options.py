"""What the caller chose beside the rules."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, cast, get_args

import torch

from gpusq_compile.errors import InputError, did_you_mean
from gpusq_compile.language.schema import Compute

EngineChoice = Literal["auto", "none", "tensorrt", "tensorrt-rtx"]
EMITTED = ("triton",)
"""What `--emit` writes beside the usual files."""
LARGEST_SEED = 2**32 - 1
"""The largest that numpy takes."""


@dataclass(frozen=True)
class Options:
    """What the caller chose beside the rules. `steps` and `epochs` override the rules' budgets."""

    finetune: bool = True
    steps: int | None = None
    epochs: float | None = None
    engine: EngineChoice = "auto"
    targets: tuple[str, ...] | None = None
    device: str = "cpu"
    seed: int = 0
    dump_after: tuple[str, ...] = ()
    emit: tuple[str, ...] = ()
    dry_run: bool = False
    resume: bool = False
    checkpoint_every: int | None = None


def engine_choice(engine: str | None, output: Path | None) -> EngineChoice:
    """The engine asked for; by default `auto` where there is a folder to put one in."""
    if engine is None:
        return "auto" if output is not None else "none"
    for choice in get_args(EngineChoice):
        if engine == choice:
            return cast(EngineChoice, choice)
    raise InputError(
        "unknown-engine",
        f"no engine '{engine}'",
        hint=did_you_mean(engine, get_args(EngineChoice)),
    )


def check_options(options: Options, passes: Sequence[str]) -> None:
    """Raise InputError for an option whose value cannot be, or that another one contradicts."""
    for target in options.targets or ():
        if target not in get_args(Compute):
            raise InputError(
                "unknown-target",
                f"no target '{target}'",
                # The number nearest to a GPU's is another GPU.
                hint="valid: " + ", ".join(sorted(get_args(Compute)))
                if re.fullmatch(r"sm\d+", target)
                else did_you_mean(target, get_args(Compute)),
            )
    if options.steps is not None and options.steps < 1:
        raise InputError("steps", f"{options.steps} steps: expected 1 or more")
    if options.epochs is not None and not 0 < options.epochs < math.inf:
        raise InputError(
            "epochs",
            f"{options.epochs:g} epochs: expected a number greater than 0, such as 0.5",
            hint="--no-finetune skips the fine-tune",
        )
    if options.steps is not None and options.epochs is not None:
        raise InputError("steps-and-epochs", "both steps and epochs were given: choose one budget")
    if not options.finetune and (options.steps is not None or options.epochs is not None):
        name = "epochs" if options.steps is None else "steps"
        raise InputError(
            "budget-without-finetune", f"{name} were given for the fine-tune that is switched off"
        )
    if options.checkpoint_every is not None and options.checkpoint_every < 1:
        raise InputError(
            "checkpoint-every", f"{options.checkpoint_every} steps: expected 1 or more"
        )
    if options.resume and not options.finetune:
        raise InputError(
            "resume-without-finetune",
            "a run without fine-tune has nothing to resume",
            hint="leave out --resume, or --no-finetune",
        )
    if not 0 <= options.seed <= LARGEST_SEED:
        raise InputError("seed", f"seed {options.seed}: expected 0 to {LARGEST_SEED}")
    for name in options.dump_after:
        if name not in (*passes, "changed", "all"):
            raise InputError(
                "unknown-pass",
                f"no pass '{name}' to dump after",
                hint=did_you_mean(name, [*passes, "changed", "all"]),
            )
    for name in options.emit:
        if name not in EMITTED:
            raise InputError(
                "unknown-emit",
                f"nothing to emit is called '{name}'",
                hint=did_you_mean(name, EMITTED),
            )
    if options.dump_after and options.dry_run:
        raise InputError(
            "options-conflict",
            "--dump-after writes files, and --dry-run writes none",
            hint="leave out --dry-run; --no-finetune --engine none is nearly as fast",
        )
    if options.emit and options.dry_run:
        raise InputError(
            "options-conflict", f"--emit {options.emit[0]} writes files, and --dry-run writes none"
        )
    try:
        kind = torch.device(options.device).type
    except RuntimeError:
        kind = "unknown"
    if kind not in ("cpu", "cuda"):
        raise InputError(
            "unknown-device",
            f"no device '{options.device}'",
            hint=did_you_mean(options.device, ["cpu", "cuda"]),
        )
    if kind == "cuda" and not torch.cuda.is_available():
        raise InputError(
            "no-cuda",
            f"device '{options.device}' was asked for, but torch sees no CUDA GPU",
            hint="leave --device out to run on the CPU; check the driver with nvidia-smi",
        )
    index = torch.device(options.device).index or 0
    if kind == "cuda" and index >= torch.cuda.device_count():
        raise InputError(
            "no-cuda", f"no GPU {index}: torch sees {torch.cuda.device_count()}, counted from 0"
        )
