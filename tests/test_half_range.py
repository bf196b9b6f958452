"""What half has no room for stays in FP32, by what an evaluator says that rounds to half."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx.reference import ReferenceEvaluator
from torch import Tensor, nn

from gpusq_compile import CheckFailed
from gpusq_compile.compilation import Compilation
from gpusq_compile.lowering.half_range import MOVES, MeasuredRun, run_measured, with_extremes
from gpusq_compile.numerics import cosine_per_sample
from gpusq_compile.passes import set_precision
from tests.compilations import begin, make_rules, remarks_of, run_until
from tests.models import noise, seeded

Compute = Callable[[Tensor], Tensor]


class Between(nn.Module):
    """Two linears, and `compute` on activations [B, 8, 32] between them."""

    def __init__(self, compute: Compute, scale: float = 1.0) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(16, 32), nn.Linear(32, 10)
        self.compute, self.scale = compute, scale

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.compute(self.first(x) * self.scale)).mean(1)


def masked(x: Tensor) -> Tensor:
    scores = x @ x.mT
    hidden = torch.zeros(8, 8).masked_fill(torch.ones(8, 8).triu(1) > 0, torch.finfo().min)
    return (scores + hidden).softmax(-1) @ x


LARGE: dict[str, tuple[Compute, float]] = {
    "a sum of squares, divided": (lambda x: x * torch.rsqrt((x * x).sum(-1, True) / 32 + 1), 300),
    "a variance": (lambda x: (x - x.mean(-1, True)) / (x.var(-1, keepdim=True) + 1).sqrt(), 300),
    "an einsum with itself": (
        lambda x: x * torch.rsqrt(torch.einsum("bnd,bnd->bn", x, x)[..., None] / 32 + 1),
        300,
    ),
    "a product that is scaled down": (lambda x: (x * 1000) * x.tanh() * 1e-4, 300),
    "numbers beyond half": (lambda x: x * 1e-6, 1e6),
    "an index as a float": (
        lambda x: x * ((x > -1e9).long() * torch.arange(99990, 100022)).float() / 99999,
        1,
    ),
}


def compiled(compute: Compute, scale: float, folder: Path) -> Compilation:
    rules = make_rules(
        {"id": "none", "match": {"op": "linear"}, "quantize": "none"}, precision="fp16"
    )
    model = seeded(Between, compute, scale)
    return run_until(begin(model, noise(4, 8, 16), rules, folder), "verify_onnx")


def in_half(compilation: Compilation) -> tuple[Tensor, Tensor]:
    """The outputs of the final model where every operator rounds to its type, and the graph's."""
    assert compilation.onnx_model is not None
    batch = compilation.expected[0]
    names = [value.name for value in compilation.onnx_model.graph.input]
    feeds = dict(zip(names, (given.numpy() for given in batch.inputs), strict=True))
    with np.errstate(all="ignore"):
        [found] = ReferenceEvaluator(compilation.onnx_model).run(None, feeds)
    return torch.as_tensor(found), batch.outputs[0]


@pytest.mark.parametrize("case", LARGE)
def test_an_engine_in_half_computes_what_was_verified(case: str, tmp_path: Path) -> None:
    compute, scale = LARGE[case]
    compilation = compiled(compute, scale, tmp_path)
    found, wanted = in_half(compilation)
    assert bool(found.isfinite().all())
    assert float(cosine_per_sample(found, wanted).min()) > 0.999


def test_what_stays_in_float_is_said_with_its_line(tmp_path: Path) -> None:
    compilation = compiled(*LARGE["a product that is scaled down"], tmp_path)
    [remark] = [r for r in remarks_of(compilation, "set_precision") if r.code == "kept-fp32"]
    assert "test_half_range.py:" in remark.reason
    assert "stay FP32" in remark.reason


def test_a_measured_model_is_as_it_was_and_what_moves_values_is_as_wide(tmp_path: Path) -> None:
    def moved(x: Tensor) -> Tensor:
        return (x * 1e6).transpose(1, 2).reshape(-1, 4, 64).relu().view(-1, 8, 32) * 1e-6

    rules = make_rules({"id": "none", "match": {"op": "linear"}, "quantize": "none"})
    compilation = run_until(
        begin(seeded(Between, moved), noise(4, 8, 16), rules, tmp_path), "surgery"
    )
    model = compilation.onnx_model
    assert model is not None
    before = model.SerializeToString(deterministic=True)
    with with_extremes(model.graph) as names:
        behind = [node.op_type for node in model.graph.node]
        assert len(model.graph.output) == 1 + 2 * len(names)
    assert model.SerializeToString(deterministic=True) == before
    kinds = {name: node.op_type for node in model.graph.node for name in node.output}
    assert not {kinds[name] for name in names} & MOVES
    assert all(
        kind in MOVES or behind[index + 1 : index + 3] == ["ReduceMin", "ReduceMax"]
        for index, kind in enumerate(behind)
        if not kind.startswith("Reduce")
    )
    run = run_measured(model, compilation.expected[0].inputs, tmp_path / "ranges.onnx")
    found = {kinds[name]: largest for name, largest in run.wide.items()}
    assert {"Mul", "Transpose", "Reshape", "Relu"} <= found.keys()
    assert found["Mul"] == found["Transpose"] > 65504
    torch.testing.assert_close(run.outputs, compilation.expected[0].outputs)


@pytest.mark.parametrize("compute", [torch.relu, masked])
def test_masks_and_ordinary_numbers_are_half(compute: Compute, tmp_path: Path) -> None:
    compilation = compiled(compute, 1.0, tmp_path)
    assert not [r for r in remarks_of(compilation, "set_precision") if r.code == "kept-fp32"]
    assert compilation.onnx_model is not None
    casts = [node for node in compilation.onnx_model.graph.node if node.op_type == "Cast"]
    assert len(casts) == 2
    found, wanted = in_half(compilation)
    assert float(cosine_per_sample(found, wanted).min()) > 0.999


def test_a_quantized_layer_that_half_has_no_room_for_is_refused(tmp_path: Path) -> None:
    model = seeded(Between, torch.relu)
    with torch.no_grad():
        model.last.weight.mul_(1e7)
    rules = make_rules(precision="fp16")
    with pytest.raises(CheckFailed) as caught:
        run_until(begin(model, noise(4, 8, 16), rules, tmp_path), "set_precision")
    assert caught.value.code == "half-overflow"
    assert "the output of last reaches" in caught.value.message
    assert "fp32" in (caught.value.hint or "")


@pytest.mark.parametrize("samples", [2, 5])
def test_the_check_of_the_surgery_shows_what_is_wide_on_its_batch(
    samples: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compute, scale = LARGE["a product that is scaled down"]
    rules = make_rules(
        {"id": "none", "match": {"op": "linear"}, "quantize": "none"}, precision="fp16"
    )
    model = seeded(Between, compute, scale)
    given = begin(model, noise(2, 8, 16), rules, tmp_path, data=[noise(samples, 8, 16)])
    run_until(given, "surgery")
    runs = []

    def counted(model: onnx.ModelProto, inputs: list[Tensor], path: Path) -> MeasuredRun:
        runs.append(len(inputs[0]))
        return run_measured(model, inputs, path)

    monkeypatch.setattr(set_precision, "run_measured", counted)
    run_until(given, "set_precision")
    assert runs == ([] if samples == 2 else [5])
    assert [r for r in remarks_of(given, "set_precision") if r.code == "kept-fp32"]
