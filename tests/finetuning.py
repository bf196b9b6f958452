"""A tiny ViT before its fine-tune, and one phase of it as its pass runs it."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from gpusq_compile.compilation import Compilation
from gpusq_compile.finetune import loop
from gpusq_compile.finetune.loop import train
from gpusq_compile.finetune.taps import taps_of
from gpusq_compile.finetune.teacher import zero_masked_weights
from gpusq_compile.language.training import Phase, QuantizePhase
from tests.compilations import EVERYTHING, TAPS, begin, make_rules
from tests.models import Shape, TinyViT, images, labelled, seeded

FINETUNE: dict[str, Any] = {
    "loss": {"alpha": 1, "beta": 10, "gamma": 5, "temperature": 2},
    "sparse": {"epochs": 1},
    "quantize": {"epochs": 1},
}
DATA = labelled(3)


def tiny(**rest: Any) -> Compilation:
    """A tiny ViT before its first pass, with the fine-tune on."""
    document = make_rules({**TAPS, "distill": {"theta": 2.0}}, EVERYTHING, finetune=FINETUNE)
    return begin_training(document, **rest)


def begin_training(document: dict[str, Any], **options: Any) -> Compilation:
    """A tiny ViT before its first pass, with the fine-tune on and `DATA` for it."""
    chosen = {"finetune": True, "train_data": DATA, "data": DATA, **options}
    return begin(seeded(TinyViT, Shape(depth=1)), images(2), document, **chosen)


def weights_of(compilation: Compilation) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in compilation.ir.named_parameters()}


def run_phase(compilation: Compilation, phase: Phase, teacher: Any = None) -> loop.PhaseReport:
    """One phase as its pass runs it."""
    second = isinstance(phase, QuantizePhase)
    name = "quantize" if second else "sparse"
    teacher = teacher or (compilation.sparse_teacher if second else compilation.dense_teacher)
    assert teacher is not None
    zero_masked_weights(compilation.ir)
    taps = [1.0] * len(taps_of(compilation.ir))
    return train(compilation, teacher, phase, name=name, tap_weights=taps)
