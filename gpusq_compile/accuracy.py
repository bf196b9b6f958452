"""What the model achieves on the evaluation data: top-1, and the user's own metrics."""

from __future__ import annotations

import math
import numbers
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from gpusq_compile.compilation import Compilation
from gpusq_compile.data import Batch, batches, check_labels, has_logits, logits_of
from gpusq_compile.errors import GpusqError, InputError
from gpusq_compile.model_source import ModelSource
from gpusq_compile.randomness import isolated_random
from gpusq_compile.user_code import call_user, defined_at, described, user_error

EVAL_DATA = "eval_data"
TOP1 = "top1"


@dataclass
class _Sums:
    """Counts over the batches: of right answers, and of each metric times its samples."""

    right: int = 0
    labelled: int = 0
    images: int = 0
    top1: bool = True
    metrics: dict[str, float] = field(default_factory=dict)
    samples: dict[str, int] = field(default_factory=dict)

    def means(self) -> dict[str, float]:
        return {name: total / self.samples[name] for name, total in self.metrics.items()}

    def top1_share(self) -> float | None:
        return self.right / self.labelled if self.top1 and self.labelled else None


def measure(compilation: Compilation, stage: str, stand_in: nn.Module) -> None:
    """Record what the user's model with `stand_in` at the compiled scope achieves at a stage.

    `compilation.accuracy` gets top-1, in [0, 1], or None where the model came without evaluation
    data, its batches have no class labels or its outputs no logits; `compilation.metrics` gets
    the means of the user's metrics, where he gave any.
    """
    compilation.accuracy[stage] = None
    if compilation.source.eval_data is None:
        return
    sums = _evaluate(compilation, stand_in, stage)
    top1 = compilation.accuracy[stage] = sums.top1_share()
    if top1 is not None:
        compilation.console.info(f"top-1 {stage}: {top1:.2%} of {sums.labelled} images")
    if sums.metrics:
        means = compilation.metrics[stage] = sums.means()
        text = ", ".join(f"{name} {value:.4g}" for name, value in means.items())
        compilation.console.info(f"metrics {stage}: {text} over {sums.images} images")


def evaluate(compilation: Compilation, stand_in: nn.Module) -> dict[str, float]:
    """The user's metrics in their order, then top-1 in [0, 1] as `top1`; what there is of them.

    Metrics are means over the evaluation data, each batch weighted by its size. Evaluating leaves
    the random state alone and starts from the same one each time. A metric of the user's that is
    called `top1` stands for the compiler's here.

    Raises:
        InputError: the data or the user's `metrics` fails, or returns what is no metric.
    """
    if compilation.source.eval_data is None:
        return {}
    sums = _evaluate(compilation, stand_in, "evaluation")
    measured, top1 = sums.means(), sums.top1_share()
    if top1 is not None:
        measured.setdefault(TOP1, top1)
    shown = ", ".join(f"{name} {value:.4g}" for name, value in measured.items())
    compilation.console.note(shown)
    return measured


def criterion(measured: Mapping[str, float]) -> float | None:
    """What the best checkpoint is chosen by, higher is better: the first of what was measured.

    NaN is worse than any number. None where nothing was measured.
    """
    first = next(iter(measured.values()), None)
    return -math.inf if first is not None and math.isnan(first) else first


def _evaluate(compilation: Compilation, stand_in: nn.Module, stage: str) -> _Sums:
    source, console = compilation.source, compilation.console
    assert source.eval_data is not None
    sums = _Sums()
    with (
        torch.no_grad(),
        isolated_random(compilation.device, compilation.options.seed),
        console.progress(f"evaluate {stage}", None) as advance,
    ):
        for index, batch in enumerate(batches(source.eval_data, EVAL_DATA, compilation.device)):
            advance()
            if batch.labels is None and source.metrics is None:
                continue
            where = f"{EVAL_DATA}() batch {index}"
            outputs = _outputs(compilation, stand_in, batch, where)
            _count_right(sums, source, outputs, batch, where)
            for name, value in user_metrics(source, outputs, batch, where).items():
                sums.metrics[name] = sums.metrics.get(name, 0.0) + value * batch.size
                sums.samples[name] = sums.samples.get(name, 0) + batch.size
            sums.images += batch.size
    return sums


def _outputs(compilation: Compilation, stand_in: nn.Module, batch: Batch, where: str) -> Any:
    """The whole model's outputs; what the user's own part of it raises names his line."""
    network = compilation.network
    if network.scope is None:
        return network.run(stand_in, batch.inputs)
    try:
        return network.run(stand_in, batch.inputs)
    except GpusqError:
        raise
    except Exception as error:
        what = f"forward() on {where}"
        raise user_error(error, compilation.source.file, what, "forward-failed") from error


def _count_right(sums: _Sums, source: ModelSource, outputs: Any, batch: Batch, where: str) -> None:
    """Count the top-1 answers that are right.

    With a `loss` or `metrics` of the user's, labels and outputs may mean something else: then one
    batch that has no logits [batch, classes], or labels outside them, ends the count.
    """
    if batch.labels is None or not sums.top1:
        return
    own = source.loss is not None or source.metrics is not None
    if own and not has_logits(outputs, source.logits):
        sums.top1 = False
        return
    logits = logits_of(outputs, source.logits)
    labels = batch.labels.to(logits.device)
    if own:
        inside = int(labels.min()) >= 0 and int(labels.max()) < logits.shape[1]
        sums.top1 = inside and logits.shape[0] == batch.size
        if not sums.top1:
            return
    check_labels(labels, logits.shape[1], where)
    sums.right += int((logits.argmax(dim=1) == labels).sum())
    sums.labelled += batch.size


def user_metrics(source: ModelSource, outputs: Any, batch: Batch, where: str) -> dict[str, float]:
    """The user's `metrics` of one batch as floats; empty where there is no such function.

    Raises:
        InputError: it raised, or returned anything but numbers by name.
    """
    if source.metrics is None:
        return {}
    found: Any = call_user(source.metrics, source.file, f"metrics() on {where}", outputs, batch.raw)
    if not isinstance(found, Mapping) or not found:
        kind = "an empty dictionary" if isinstance(found, Mapping) else described(found)
        raise _metrics_error(source, where, kind, 'return {"name": number}')
    return {
        _metric_name(source, name, where): _metric_value(source, name, value, where)
        for name, value in found.items()
    }


def _metric_name(source: ModelSource, name: Any, where: str) -> str:
    if isinstance(name, str) and name:
        return name
    raise _metrics_error(source, where, f"the key {name!r}", "names of metrics are strings")


def _metric_value(source: ModelSource, name: Any, value: Any, where: str) -> float:
    if isinstance(value, torch.Tensor) and value.numel() == 1 and not value.is_complex():
        return float(value)
    if isinstance(value, numbers.Real):
        return float(value)
    found = f"a tensor {list(value.shape)}" if isinstance(value, torch.Tensor) else described(value)
    hint = "return one number per metric, such as the mean over the batch"
    raise _metrics_error(source, where, f"{found} for {name!r}", hint)


def _metrics_error(source: ModelSource, where: str, found: str, hint: str) -> InputError:
    assert source.metrics is not None
    return InputError(
        "metrics-kind",
        f"metrics() on {where} returned {found}, expected a dictionary of numbers by name",
        location=defined_at(source.metrics),
        hint=hint,
    )
