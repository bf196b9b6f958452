"""The driver keeps the passes in order, checks their promises, and records what they did."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gpusq_compile.compilation import Compilation
from gpusq_compile.driver import MEASURED_AFTER, run_passes
from gpusq_compile.errors import CheckFailed, InternalError
from gpusq_compile.finetune.optimizer import mark_as_written
from gpusq_compile.graph.edit import set_tensor
from gpusq_compile.graph.query import aten
from gpusq_compile.pass_base import Pass, PassResult
from gpusq_compile.passes import PIPELINE
from gpusq_compile.remarks import missed
from tests.compilations import begin, fork, make_rules, run_until
from tests.models import Perceptron, Shape, TinyViT, images, labelled, noise, seeded


@pytest.fixture(scope="module")
def canonical() -> Compilation:
    return run_until(begin(seeded(Perceptron), noise(4, 32), make_rules()), "canonicalize")


@pytest.fixture
def compilation(canonical: Compilation) -> Compilation:
    return fork(canonical)


def step(run: Callable[[Compilation], object] | None = None, **promises: object) -> Pass:
    def body(compilation: Compilation) -> PassResult:
        found = run(compilation) if run else None
        return found if isinstance(found, PassResult) else PassResult(matched=1, changed=1)

    return Pass("mine", "a pass of the test", body, **promises)  # type: ignore[arg-type]


def scale_the_output(by: float) -> Callable[[Compilation], None]:
    def run(compilation: Compilation) -> None:
        with torch.no_grad():
            compilation.ir.get_parameter("second.weight").mul_(by)
            compilation.ir.get_parameter("second.bias").mul_(by)

    return run


# --- order ---------------------------------------------------------------------------------------


def test_the_pipeline_is_in_an_order_in_which_every_requirement_is_ensured() -> None:
    facts: set[str] = set()
    for known in PIPELINE:
        assert set(known.requires) <= facts, known.name
        facts = (facts - set(known.removes)) | set(known.ensures)


def test_every_pass_is_named_as_its_file_and_says_what_it_does() -> None:
    assert len({known.name for known in PIPELINE}) == len(PIPELINE)
    for known in PIPELINE:
        module = __import__(f"gpusq_compile.passes.{known.name}", fromlist=["PASS"])
        assert module.PASS is known
        assert (module.__doc__ or "").startswith(f"{known.name}: ")
        assert known.summary


def test_a_pass_whose_requirement_is_missing_is_refused(compilation: Compilation) -> None:
    with pytest.raises(InternalError) as caught:
        run_passes(compilation, [step(requires=("graph", "marked"))])
    assert caught.value.code == "pass-order"
    assert "pass 'mine' requires marked" in caught.value.message
    assert compilation.records[-1].name == "canonicalize"


def test_facts_come_and_go_with_the_passes(compilation: Compilation) -> None:
    run_passes(compilation, [step(ensures=("new",), removes=("canonical",))])
    assert "new" in compilation.facts
    assert "canonical" not in compilation.facts


# --- numerical promises --------------------------------------------------------------------------


def test_a_pass_that_claims_to_keep_the_function_and_does_not_is_stopped(
    compilation: Compilation,
) -> None:
    with pytest.raises(InternalError) as caught:
        run_passes(compilation, [step(scale_the_output(1.5), preserves=1e-4)])
    assert caught.value.code == "not-preserved"
    assert "pass 'mine' changed the outputs by" in caught.value.message
    assert "its limit is 0.0001" in caught.value.message


@pytest.mark.parametrize("way", ["in place", "another tensor", "another node"])
def test_a_pass_that_says_it_changed_nothing_is_checked_all_the_same(
    compilation: Compilation, way: str
) -> None:
    def run(compilation: Compilation) -> PassResult:
        graph_module = compilation.ir
        if way == "in place":
            scale_the_output(1.5)(compilation)
        elif way == "another tensor":
            weight = graph_module.get_parameter("second.weight").detach() * 1.5
            set_tensor(graph_module, "second.weight", weight, trainable=True)
        else:
            gelu = next(n for n in graph_module.graph.nodes if n.target is aten.gelu.default)
            gelu.target = aten.relu.default
            graph_module.recompile()
        return PassResult(matched=1, changed=0)

    with pytest.raises(InternalError, match="not-preserved"):
        run_passes(compilation, [step(run, preserves=1e-4)])


def test_the_graph_is_run_only_behind_passes_that_touched_it(
    compilation: Compilation, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = []
    graph_type = type(compilation.ir)
    forward = graph_type.forward

    def counted(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        runs.append(self)
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(graph_type, "forward", counted)
    run_passes(compilation, [step(preserves=0.0), step()])
    assert not runs
    assert [record.change for record in compilation.records[-2:]] == [0.0, 0.0]
    run_passes(compilation, [step(scale_the_output(1.0), preserves=0.0)])
    assert runs == [compilation.ir]


def test_a_change_within_the_promise_is_recorded(compilation: Compilation) -> None:
    run_passes(compilation, [step(scale_the_output(1 + 1e-6), preserves=1e-4)])
    change = compilation.records[-1].change
    assert change is not None
    assert 0 < change < 1e-4


def test_a_lossy_passes_change_is_measured_in_standard_deviations(compilation: Compilation) -> None:
    before = compilation.reference[0]
    run_passes(compilation, [step(scale_the_output(1.5))])
    expected = 0.5 * before.abs().max() / before.std(correction=0)
    assert compilation.records[-1].change == pytest.approx(float(expected), rel=1e-4)


def test_each_change_is_measured_from_the_pass_before(compilation: Compilation) -> None:
    run_passes(compilation, [step(scale_the_output(1.5)), step(preserves=0.0)])
    assert compilation.records[-1].change == 0.0


class Amplifying(nn.Module):
    """A rounding of the input is a thousand roundings of the output."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.sin(x * 4096.0)


@pytest.mark.parametrize("factor", [1 + 2**-23, 1 + 2**-18])
def test_a_change_that_rounding_the_inputs_makes_too_is_rounding(factor: float) -> None:
    compilation = run_until(begin(Amplifying(), noise(4, 64), make_rules()), "canonicalize")

    def run(compilation: Compilation) -> PassResult:
        [product] = compilation.ir.graph.find_nodes(op="call_function", target=aten.mul.Tensor)
        product.args = (product.args[0], 4096.0 * factor)
        compilation.ir.recompile()
        return PassResult(matched=1, changed=1)

    if factor < 1 + 2**-20:
        run_passes(compilation, [step(run, preserves=1e-4)])
        change = compilation.records[-1].change
        assert change is not None
        assert change > 1e-4
    else:
        with pytest.raises(InternalError, match="not-preserved"):
            run_passes(compilation, [step(run, preserves=1e-4)])


def test_outputs_that_become_nan_are_no_preserved_outputs(compilation: Compilation) -> None:
    with pytest.raises(InternalError, match="not-preserved"):
        run_passes(compilation, [step(scale_the_output(float("nan")), preserves=1e-4)])


class Scalar(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(32, 8)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = self.layer(x)
        return y, y.mean()


def test_a_scalar_output_has_a_change_too() -> None:
    compilation = run_until(begin(Scalar().eval(), noise(2, 32), make_rules()), "canonicalize")

    def shift(compilation: Compilation) -> None:
        with torch.no_grad():
            compilation.ir.get_parameter("layer.bias").add_(1.0)

    run_passes(compilation, [step(shift)])
    change = compilation.records[-1].change
    assert change is not None
    assert change > 1.0


# --- records -------------------------------------------------------------------------------------


def test_what_an_optimizer_changed_is_measured() -> None:
    """Its fused kernels alone would leave the version of a tensor as it was."""
    compilation = run_until(begin(Scalar().eval(), noise(2, 32), make_rules()), "canonicalize")

    def train(compilation: Compilation) -> PassResult:
        bias = compilation.ir.get_parameter("layer.bias").requires_grad_()
        bias.grad = torch.ones_like(bias)
        optimizer = torch.optim.AdamW([bias], lr=1.0, fused=True)
        optimizer.register_step_post_hook(mark_as_written)
        optimizer.step()
        bias.requires_grad_(False)
        return PassResult(matched=1, changed=1)

    run_passes(compilation, [step(train)])
    change = compilation.records[-1].change
    assert change is not None
    assert change > 1.0


def test_a_record_holds_what_the_pass_reported(compilation: Compilation) -> None:
    result = PassResult(matched=3, changed=2, skipped=1, remarks=[missed("no", "why", "layer")])
    run_passes(compilation, [step(lambda _: result)])
    record = compilation.records[-1]
    assert (record.name, record.matched, record.changed, record.skipped) == ("mine", 3, 2, 1)
    assert record.seconds >= 0
    assert [remark.as_dict() for remark in record.remarks] == [
        {"kind": "missed", "code": "no", "layer": "layer", "reason": "why"}
    ]


def test_a_pass_that_fails_leaves_no_record(compilation: Compilation) -> None:
    def fail(_: Compilation) -> None:
        raise CheckFailed("mine", "no")

    with pytest.raises(CheckFailed):
        run_passes(compilation, [step(fail)])
    assert compilation.records[-1].name == "canonicalize"


def test_a_law_is_checked_after_every_pass(compilation: Compilation) -> None:
    def lose_shapes(compilation: Compilation) -> None:
        for node in compilation.ir.graph.nodes:
            node.meta.pop("val", None)

    with pytest.raises(InternalError, match="after pass 'mine'"):
        run_passes(compilation, [step(lose_shapes)])


# --- dumps and accuracy --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wanted", "files"),
    [
        (("mark",), ["03-mark.txt"]),
        # Marking writes plans and changes no operator.
        (("changed",), ["01-trace.txt", "02-canonicalize.diff", "07-sparsify.diff"]),
        (
            ("changed", "sparsify"),
            ["01-trace.txt", "02-canonicalize.diff", "07-sparsify.diff", "07-sparsify.txt"],
        ),
        (
            ("all",),
            [
                *("01-trace.txt", "02-canonicalize.txt", "03-mark.txt"),
                *("04-split_attention.txt", "05-permute.txt", "06-tap.txt", "07-sparsify.txt"),
            ],
        ),
        ((), []),
    ],
)
def test_graphs_are_written_after_the_passes_that_were_asked_for(
    tmp_path: Path, wanted: tuple[str, ...], files: list[str]
) -> None:
    model = seeded(TinyViT, Shape(depth=1))
    run_until(begin(model, images(2), make_rules(), tmp_path, dump_after=wanted), "sparsify")
    assert sorted(path.name for path in tmp_path.glob("dumps/*")) == files
    for path in tmp_path.glob("dumps/*"):
        assert "aten.linear.default(" in path.read_text()


def test_what_a_pass_changed_is_written_and_nothing_else(tmp_path: Path) -> None:
    model = seeded(TinyViT, Shape(depth=1))
    wanted = ("changed", "tap", "sparsify")
    run_until(begin(model, images(2), make_rules(), tmp_path, dump_after=wanted), "sparsify")
    before, after = (
        (tmp_path / "dumps" / name).read_text().splitlines()
        for name in ("06-tap.txt", "07-sparsify.txt")
    )
    diff = (tmp_path / "dumps" / "07-sparsify.diff").read_text().splitlines()
    assert diff[:2] == ["--- before sparsify", "+++ after sparsify"]
    assert {line[1:] for line in diff[2:] if line[0] == "+"} == set(after) - set(before)
    assert {line[1:] for line in diff[2:] if line[0] == "-"} == set(before) - set(after)
    assert any("gpusq.mask" in line for line in diff if line[0] == "+")
    assert len(diff) < len(after)


def test_top1_is_measured_dense_sparse_and_quantized() -> None:
    held_out = labelled(3, seed=3)
    model = seeded(TinyViT, Shape(depth=1))
    right = sum(int((model(inputs).argmax(dim=1) == labels).sum()) for inputs, labels in held_out)
    compilation = begin(model, images(4), make_rules(), eval_data=held_out)
    run_until(compilation, "finetune_quantized")
    assert compilation.accuracy["dense"] == right / 24
    assert list(compilation.accuracy) == ["dense", *MEASURED_AFTER.values()]
    assert all(value is not None for value in compilation.accuracy.values())


def test_without_labels_there_is_no_top1() -> None:
    batches = [(inputs, None) for inputs, _ in labelled(2)]
    compilation = begin(seeded(TinyViT, Shape(depth=1)), images(2), make_rules(), eval_data=batches)
    run_until(compilation, "sparsify")
    assert compilation.accuracy == {"dense": None}
