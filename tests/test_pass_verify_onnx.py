"""verify_onnx: the written file is read back, judged layer by layer, and run on real batches."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import numpy_helper
from torch import Tensor, nn

from gpusq_compile.compilation import Compilation
from gpusq_compile.errors import CheckFailed
from gpusq_compile.language.schema import Verify
from gpusq_compile.lowering import runtime
from gpusq_compile.lowering.runtime import (
    Expected,
    Numerics,
    SessionModule,
    compare,
    open_session,
    record,
    run_session,
)
from gpusq_compile.output_cache import same
from gpusq_compile.passes import verify_onnx
from gpusq_compile.passes.verify_onnx import way_out
from gpusq_compile.remarks import Kind
from tests.compilations import begin, fork, make_rules, remarks_of, run_until
from tests.models import Shape, TinyViT, images, labelled, noise, seeded


@pytest.fixture(scope="module")
def operated() -> Compilation:
    model = seeded(TinyViT, Shape(depth=1))
    compilation = begin(model, images(4), "int8", data=labelled(2), eval_data=labelled(3, seed=2))
    return run_until(compilation, "store_int4")


@pytest.fixture
def ready(operated: Compilation, tmp_path: Path) -> Compilation:
    """A copy with a model and a folder of its own, about to be verified."""
    compilation = fork(operated)
    compilation.workdir = tmp_path
    assert operated.onnx_model is not None
    compilation.onnx_model = onnx.ModelProto()
    compilation.onnx_model.CopyFrom(operated.onnx_model)
    return compilation


def limited(compilation: Compilation, **limits: Any) -> Compilation:
    file = compilation.rules.file.model_copy(update={"verify": Verify(**limits)})
    rules = compilation.rules
    compilation.rules = type(rules)(file, rules.rules, rules.sources)
    return compilation


def failure(compilation: Compilation) -> CheckFailed:
    with pytest.raises(CheckFailed) as caught:
        run_until(compilation, "verify_onnx")
    assert caught.value.code == "verify"
    assert caught.value.exit_code == 1
    assert compilation.verify["ok"] is False
    return caught.value


def test_a_model_as_compiled_is_verified_and_the_numbers_are_told(ready: Compilation) -> None:
    run_until(ready, "verify_onnx")
    assert (ready.workdir / "model.onnx").is_file()
    assert ready.verify["ok"] is True
    assert ready.verify["structure"] == {"layers": 5, "attentions": 0, "faults": []}
    numerics = ready.verify["numerics"]
    assert numerics["samples"] == 16
    assert 0.999 < numerics["min_cosine"] <= 1.000001
    assert numerics["top1_agreement"] == 1.0
    assert 0 < numerics["max_difference"] < 0.1
    assert ready.verify["limits"] == Verify().model_dump(mode="json")
    assert ready.facts >= {"verified"}
    assert {remark.code for remark in remarks_of(ready, "verify_onnx", Kind.PASSED)} == {
        "structure"
    }


def test_top1_of_the_file_is_measured_on_the_evaluation_data(ready: Compilation) -> None:
    run_until(ready, "verify_onnx")
    session = onnxruntime.InferenceSession(str(ready.workdir / "model.onnx"))
    right = sum(
        int((session.run(None, {"x": inputs.numpy()})[0].argmax(axis=1) == labels.numpy()).sum())
        for inputs, labels in labelled(3, seed=2)
    )
    assert ready.accuracy["onnx"] == right / 24


@pytest.mark.parametrize(
    ("limits", "name"),
    [
        ({"min_cosine": 1.0}, "limit min_cosine 1.0"),
        ({"max_difference": 1e-9}, "limit max_difference 1e-09"),
    ],
)
def test_a_limit_that_is_not_kept_fails_by_its_name(
    ready: Compilation, limits: dict[str, float], name: str
) -> None:
    error = failure(limited(ready, **limits))
    assert name in error.message


def test_a_file_that_computes_something_else_fails(ready: Compilation) -> None:
    """The structure is perfect, and two output channels are swapped."""
    assert ready.onnx_model is not None
    for tensor in ready.onnx_model.graph.initializer:
        if tensor.name == "logits.weight":
            swapped = np.array(numpy_helper.to_array(tensor))[::-1]
            tensor.CopyFrom(numpy_helper.from_array(np.ascontiguousarray(swapped), tensor.name))
    error = failure(ready)
    assert "limit min_cosine" in error.message
    assert "more, in the report" in error.message
    assert ready.verify["structure"]["faults"] == []


def test_a_file_with_a_broken_layer_fails_by_the_layers_name(ready: Compilation) -> None:
    assert ready.onnx_model is not None
    for tensor in ready.onnx_model.graph.initializer:
        if tensor.name == "layers.0.feed.up.weight":
            dense = np.maximum(np.array(numpy_helper.to_array(tensor)), 1)
            tensor.CopyFrom(numpy_helper.from_array(dense, tensor.name))
    error = failure(ready)
    assert error.message.startswith("layers.0.feed.up: ")
    assert "groups break 2:4" in error.message
    [fault] = ready.verify["structure"]["faults"]
    assert fault.startswith("layers.0.feed.up: ")


# --- the comparison ------------------------------------------------------------------------------


def first(outputs: list[Tensor]) -> Tensor:
    return outputs[0]


def compared(*pairs: tuple[Tensor, Tensor], logits: bool = False) -> Numerics:
    """(found, reference) of each output, in one batch; with `logits` the first output is them."""
    found, reference = [pair[0] for pair in pairs], [pair[1] for pair in pairs]
    return compare([Expected([reference[0]], reference)], [found], first if logits else None)


def test_equal_outputs_are_equal_whatever_their_shape() -> None:
    for output in (noise(3, 5), noise(3, 2, 4), noise(3), torch.zeros(3, 5), torch.ones(1, 1)):
        numerics = compared((output, output))
        assert numerics.min_cosine == pytest.approx(1.0)
        assert (numerics.max_difference, numerics.top1_agreement) == (0.0, None)
        assert numerics.shortfalls(Verify()) == []


def test_the_worst_sample_and_the_worst_output_count() -> None:
    good = torch.eye(4)
    bad = good.clone()
    bad[2] = -good[2]
    numerics = compared((good, good), (bad, good), logits=True)
    assert numerics.min_cosine == pytest.approx(-1.0)
    assert numerics.worst_output == 1
    assert numerics.max_difference == pytest.approx(2 / good.std(correction=0).item())
    assert numerics.top1_agreement == 1.0


def test_differences_are_in_standard_deviations_of_the_reference() -> None:
    reference = torch.tensor([[0.0, 2.0, 0.0, 2.0]])
    numerics = compared((reference + 0.5, reference))
    assert numerics.max_difference == pytest.approx(0.5)
    scaled = compared((100 * reference + 50, 100 * reference))
    assert scaled.max_difference == pytest.approx(0.5)


def test_top1_agrees_unless_the_classes_are_clearly_apart() -> None:
    rows, flipped = torch.tensor([[1.0, 0.99, -1.0], [1.0, 0.5, -1.0]] * 4), slice(0, 2)
    reference, found = rows, rows.clone()
    found[:, flipped] = found[:, flipped].flip(1)
    numerics = compared((found, reference), logits=True)
    assert numerics.disagreements == 4
    assert numerics.top1_agreement == 0.5
    shortfalls = " ".join(numerics.shortfalls(Verify(min_cosine=-1)))
    assert "top-1 on 50.0% of 8 samples, limit min_top1_agreement 97.0%" in shortfalls


def test_of_few_samples_one_may_differ() -> None:
    reference = torch.tensor([[1.0, 0.5, -1.0]] * 8)
    found = reference.clone()
    found[3] = found[3, [1, 0, 2]]
    numerics = compared((found, reference), logits=True)
    assert numerics.disagreements == 1
    assert numerics.shortfalls(Verify(min_cosine=-1, max_difference=10)) == []


def flipped(compilation: Compilation) -> Compilation:
    """The same file, and a graph that is told to have named another class for every sample."""
    compilation.expected = [
        Expected(batch.inputs, [-output for output in batch.outputs])
        for batch in compilation.expected
    ]
    return limited(compilation, min_cosine=-1, max_difference=1e6)


def test_on_generated_noise_top1_is_told_and_no_limit(ready: Compilation) -> None:
    ready.source.synthetic = True
    run_until(flipped(ready), "verify_onnx")
    assert ready.verify["ok"] is True
    assert ready.verify["numerics"]["top1_agreement"] == 0.0
    assert ready.verify["limits"]["min_top1_agreement"] == 0.0
    remark = next(r for r in remarks_of(ready, "verify_onnx") if r.code == "top1-on-noise")
    assert "16 of 16 top-1 answers differ" in remark.reason


def test_a_model_that_hardly_decides_is_told_apart_from_one_that_is_wrong(
    ready: Compilation,
) -> None:
    error = failure(flipped(ready))
    assert "agrees with the graph's top-1 on 0.0%" in error.message
    assert error.hint is not None
    assert "min_top1_agreement: 0" in error.hint
    decided = Numerics(16, 0.9, 0.1, 0, disagreements=8, median_lead=2.0)
    assert "calibration data" in (way_out(decided, "limit min_top1_agreement 97.0%") or "")
    assert way_out(decided, "limit min_cosine 0.99") is None


def test_the_median_lead_is_between_the_two_best_classes() -> None:
    reference = torch.tensor([[3.0, 1.0, -1.0, -3.0]] * 3 + [[3.0, 3.0, -3.0, -3.0]])
    numerics = compared((reference, reference), logits=True)
    assert numerics.median_lead == pytest.approx(2.0 / reference.std(correction=0).item())


@pytest.mark.parametrize("where", [0, 1, 2])
def test_a_nan_in_any_output_fails_every_limit_it_touches(where: int) -> None:
    outputs = [noise(4, 6) for _ in range(3)]
    found = [output.clone() for output in outputs]
    found[where][1, 2] = float("nan")
    numerics = compared(*zip(found, outputs, strict=True))
    shortfalls = " ".join(numerics.shortfalls(Verify()))
    assert "limit min_cosine" in shortfalls
    assert "limit max_difference" in shortfalls
    assert numerics.worst_output == where


def test_a_nan_in_an_earlier_batch_is_not_forgotten() -> None:
    good, bad = noise(4, 6), torch.full((4, 6), float("nan"))
    records = [Expected([], [good]), Expected([], [good])]
    numerics = compare(records, [[bad], [good]], None)
    assert len(numerics.shortfalls(Verify())) == 2


# --- the runtime in the model's place ------------------------------------------------------------


def test_what_was_verified_is_not_run_again_to_measure(
    ready: Compilation, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran: list[Tensor] = []

    def counted(session: onnxruntime.InferenceSession, inputs: list[torch.Tensor]) -> Any:
        ran.append(inputs[0])
        return run_session(session, inputs)

    for module in (verify_onnx, runtime):
        monkeypatch.setattr(module, "run_session", counted)
    assert ready.source.eval_data is not None
    data = [batch for batch, _ in ready.source.eval_data()]
    compilation = run_until(ready, "verify_onnx")
    assert len(ran) == len(data) == 3 > len(ready.expected)
    assert all(map(torch.equal, ran, data)), "each of them once"
    assert compilation.accuracy["onnx"] is not None


def test_the_runtime_gives_what_the_module_gave(ready: Compilation) -> None:
    compilation = run_until(ready, "verify_onnx")
    assert compilation.convention is not None
    session = open_session(compilation.workdir / "model.onnx")
    module = SessionModule(session, compilation.convention, torch.device("cpu"))
    assert torch.equal(module(images(3)), run_session(session, [images(3)])[0])


def test_one_run_takes_the_graph_as_it_is_and_many_the_same_results_of_a_folded_one(
    ready: Compilation,
) -> None:
    path = run_until(ready, "verify_onnx").workdir / "model.onnx"
    one, many = open_session(path, runs=1), open_session(path)
    levels = onnxruntime.GraphOptimizationLevel
    assert level_of(one) == levels.ORT_DISABLE_ALL
    assert level_of(many) == level_of(open_session(path, runs=2)) == levels.ORT_ENABLE_BASIC
    [once], [often] = run_session(one, [images(3)]), run_session(many, [images(3)])
    torch.testing.assert_close(once, often)


def test_the_runtime_keeps_the_order_of_the_file(ready: Compilation) -> None:
    """What ends in an output, as an extreme that is measured, would else wait until the last one
    is made, and keep what it reads."""
    session = open_session(run_until(ready, "verify_onnx").workdir / "model.onnx")
    order = session.get_session_options().execution_order
    assert order == onnxruntime.ExecutionOrder.PRIORITY_BASED


def level_of(session: onnxruntime.InferenceSession) -> onnxruntime.GraphOptimizationLevel:
    return session.get_session_options().graph_optimization_level


def test_inputs_of_another_type_are_other_inputs() -> None:
    whole = torch.tensor([0, 1])
    assert same([whole], [whole.clone()])
    assert not same([whole], [whole.int()])
    assert not same([whole], [whole.float()])
    assert not same([whole], [whole[:1]])
    assert not same([whole], [])


def test_what_is_recorded_is_no_tensor_of_the_users(ready: Compilation) -> None:
    given = images(2)
    expected = record(ready.ir, (given,), {})
    given.zero_()
    [output] = expected.outputs
    assert torch.equal(ready.ir(*expected.inputs), output)
    echo = record(torch.fx.symbolic_trace(nn.Identity()), (given,), {})
    given.fill_(1.0)
    assert not echo.outputs[0].any()


class Answers(nn.Module):
    """Classes in place of logits, and tokens that have the batch second."""

    def __init__(self, tokens: bool) -> None:
        super().__init__()
        self.first, self.last, self.tokens = nn.Linear(16, 32), nn.Linear(32, 10), tokens

    def forward(self, x: Tensor) -> Any:
        y = self.last(self.first(x).relu())
        return (y.transpose(0, 1), y.mean(1)) if self.tokens else y.mean(1).argmax(1)


def test_samples_are_counted_by_the_inputs(tmp_path: Path) -> None:
    compilation = begin(seeded(Answers, True), noise(4, 40, 16), make_rules(), tmp_path)
    assert run_until(compilation, "verify_onnx").verify["numerics"]["samples"] == 4


def test_answers_that_are_no_floats_are_compared(tmp_path: Path) -> None:
    compilation = begin(seeded(Answers, False), noise(4, 40, 16), make_rules(), tmp_path)
    run_until(compilation, "set_precision")
    wrong = replace(compilation.expected[0], outputs=[torch.full((4,), 11)])
    compilation.expected = [wrong, *compilation.expected[1:]]
    with pytest.raises(CheckFailed, match="answers, and the model has no output in floats"):
        run_until(compilation, "verify_onnx")
    assert compilation.verify["numerics"]["equal_answers"] <= 0.5
    assert compilation.verify["numerics"]["floats"] is False
