"""Top-1 of the model at four points of a compilation: dense, sparse, quantized, onnx."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from gpusq_compile.compilation import Compilation
from gpusq_compile.data import batches, check_labels, logits_of

EVAL_DATA = "eval_data"


def measure_top1(compilation: Compilation, name: str, stand_in: nn.Module) -> None:
    """Record top-1, in [0, 1], of the user's model with `stand_in` at the compiled scope.

    None where the model came without evaluation data, or its batches have no labels.
    """
    compilation.accuracy[name] = None
    factory = compilation.source.eval_data
    if factory is None:
        return
    right = total = 0
    console = compilation.console
    with torch.no_grad(), console.progress(f"top-1 {name}", None) as advance:
        for index, batch in enumerate(batches(factory, EVAL_DATA, compilation.device)):
            advance()
            if batch.labels is None:
                continue
            outputs: Any = compilation.network.run(stand_in, batch.inputs)
            logits = logits_of(outputs, compilation.source.logits)
            labels = batch.labels.to(logits.device)
            check_labels(labels, logits.shape[1], f"{EVAL_DATA}() batch {index}")
            right += int((logits.argmax(dim=1) == labels).sum())
            total += batch.size
    if total:
        compilation.accuracy[name] = right / total
        console.info(f"top-1 {name}: {right / total:.2%} of {total} images")
