"""What the engine makes of a layer follows from its types and its pattern, and is said why."""

from __future__ import annotations

import io
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from gpusq_compile.compilation import Compilation
from gpusq_compile.execution import Execution, Precision, execution
from gpusq_compile.language.schema import Quantize
from gpusq_compile.plan import LayerPlan
from gpusq_compile.report.document import make_report
from gpusq_compile.report.terminal import show_plan, show_report
from tests.compilations import begin, make_rules, run_until
from tests.models import Perceptron, noise, seeded


def of(
    applied: dict[str, str] | None = None,
    precision: Precision = "fp16",
    block: int | None = None,
    targets: tuple[str, ...] = ("portable",),
) -> Execution:
    quantize = None
    if block is not None:
        quantize = Quantize.model_validate({"weight": "int4", "activation": "none", "block": block})
    plan = LayerPlan("layer", "linear", (), "layer.weight", (64, 128), quantize=quantize)
    return execution(plan.apply(**(applied or {})), precision, targets)


INT8 = {"weight": "int8", "activation": "int8"}
FOUR = {"weight": "int4", "activation": "int4"}


@pytest.mark.parametrize("types", [INT8, FOUR, {"weight": "int4", "activation": "int8"}])
@pytest.mark.parametrize("precision", ["fp16", "fp32"])
def test_integer_operands_run_on_int8_kernels_that_skip_what_is_two_of_four(
    types: dict[str, str], precision: Precision
) -> None:
    kinds = {
        pattern: of({**types, "output": "int8", "sparsity": pattern}, precision).kind
        for pattern in ("2:4", "portable", "pair4:8")
    }
    assert kinds == {"2:4": "sparse int8", "portable": "sparse int8", "pair4:8": "dense int8"}
    assert of(types, precision).kind == "dense int8"


def test_half_precision_runs_on_fp16_kernels_that_skip_what_is_two_of_four() -> None:
    assert of({"sparsity": "2:4"}).kind == of({"sparsity": "portable"}).kind == "sparse fp16"
    assert of({"sparsity": "pair4:8"}).kind == of().kind == "dense fp16"
    assert of({"activation": "int8"}).kind == "dense fp16"
    assert of({"activation": "int8", "sparsity": "2:4"}).kind == "sparse fp16"


@pytest.mark.parametrize("pattern", ["2:4", "portable", "pair4:8"])
def test_single_precision_is_dense(pattern: str) -> None:
    found = of({"sparsity": pattern}, "fp32")
    assert found.kind == "dense fp32"
    assert found.why.startswith("accuracy and storage only: ")


@pytest.mark.parametrize("sparsity", [{}, {"sparsity": "2:4"}])
def test_a_weight_alone_is_stored_small_and_multiplied_dense(sparsity: dict[str, str]) -> None:
    assert of({"weight": "int8", **sparsity}).kind == "weight-only int8"
    in_blocks = of({"weight": "int4", **sparsity}, block=128)
    assert in_blocks.kind == "weight-only int4"
    assert "stored as INT4, and multiplied as fp16" in in_blocks.why
    # Without blocks 4-bit values are stored in 8 bits.
    per_channel = of({"weight": "int4", **sparsity})
    assert per_channel.kind == "weight-only int8"
    assert "4-bit values in INT8" in per_channel.why
    assert per_channel.why.startswith("accuracy and storage only: ") == bool(sparsity)


def test_the_reason_names_what_stands_in_the_way() -> None:
    pairs = of({**FOUR, "sparsity": "pair4:8", "output": "int8"}).why
    assert pairs == (
        "accuracy and storage only: 4-bit weights and activations in INT8 containers; pair4:8 is "
        "for sparse INT4 tensor cores, and TensorRT has no kernel for it"
    )
    assert (
        of({**INT8, "sparsity": "2:4", "output": "int8"}).why
        == "sparse INT8 kernels take a 2:4 mask"
    )
    assert of({**FOUR, "sparsity": "2:4", "output": "int8"}).why.endswith("take pairs, not 2:4")
    assert "take pairs" not in of({**FOUR, "sparsity": "portable", "output": "int8"}).why
    assert of().why == "the layer was left as it is"


@pytest.mark.parametrize("precision", ["fp16", "fp32"])
def test_no_plan_says_sparse_and_accuracy_only_at_once(precision: Precision) -> None:
    types = ("int8", "int4", None)
    patterns = ("2:4", "pair4:8", "portable", None)
    for weight, activation, sparsity in product(types, types, patterns):
        applied = {"weight": weight, "activation": activation, "sparsity": sparsity}
        kind, why = of({k: v for k, v in applied.items() if v is not None}, precision)
        useless = sparsity is not None and not kind.startswith("sparse")
        assert why.startswith("accuracy and storage only: ") == useless
        assert why.endswith(tuple("abcdefghijklmnopqrstuvwxyz0123456789`"))


@pytest.mark.parametrize("types", [INT8, FOUR])
@pytest.mark.parametrize(
    ("targets", "kind"),
    [
        (("sm90",), "sparse int8"),
        (("sm80", "sm90"), "dense int8"),
        (("sm86",), "dense int8"),
        (("portable",), "dense int8"),
    ],
)
def test_a_float_output_has_sparse_int8_kernels_on_one_architecture_alone(
    types: dict[str, str], targets: tuple[str, ...], kind: str
) -> None:
    found = of({**types, "sparsity": "portable"}, targets=targets)
    assert found.kind == kind
    why = "no sparse INT8 kernel of these GPUs writes floats: `output: auto` or `int8`"
    assert found.why.endswith(why) == (kind == "dense int8")
    with_output = of({**types, "sparsity": "portable", "output": "int8"}, targets=targets)
    assert with_output.kind == "sparse int8"


def test_a_report_that_stops_at_the_plan_says_what_is_to_come() -> None:
    rule = {
        "id": "a",
        "match": {"name": "first"},
        "sparsity": {"pattern": "2:4"},
        "quantize": {**INT8, "output": "auto"},
    }
    compilation = begin(
        seeded(Perceptron), noise(8, 32), make_rules(rule, precision="fp16"), dry_run=True
    )
    run_until(compilation, "mark")
    report = make_report(compilation, None, Path("unused"))
    found = {layer["name"]: layer["execution"] for layer in report["layers"]}
    assert found["first"] == {"kind": "sparse int8", "why": "sparse INT8 kernels take a 2:4 mask"}
    assert found["second"] == {"kind": "dense fp16", "why": "the layer was left as it is"}


def test_the_terminal_says_what_runs_as_what_before_and_after() -> None:
    rules = [
        {
            "id": "pairs",
            "match": {"name": "first"},
            "sparsity": {"pattern": "pair4:8"},
            "quantize": FOUR,
        },
        {"id": "half", "match": {"name": "second"}, "sparsity": {"pattern": "2:4"}},
    ]
    document = make_rules(*rules, precision="fp16")
    compilation = run_until(begin(seeded(Perceptron), noise(8, 32), document), "mark")
    plan = shown(compilation, show_plan)
    run_until(compilation, "quantize")
    whole = shown(compilation, show_report)
    lines = [line for line in plan if line in whole and ("runs as" in line or "accuracy" in line)]
    assert lines == [
        "runs as: 1 layer dense int8, 1 sparse fp16",
        "  1 dense int8: accuracy and storage only: 4-bit weights and activations in INT8 "
        "containers; pair4:8 is for sparse INT4 tensor cores, and TensorRT has no kernel for it",
    ]
    assert "  INT4 x INT4 as on INT4 tensor cores; TensorRT multiplies INT8" in whole
    [header] = [line for line in whole if "asked" in line]
    assert "sparse" in header
    assert "2:4" not in header


def test_the_terminal_speaks_of_int4_hardware_only_where_it_counts() -> None:
    rule = {"id": "a", "match": {"name": "first"}, "quantize": INT8}
    document = make_rules(rule, precision="fp16")
    compilation = run_until(begin(seeded(Perceptron), noise(8, 32), document), "quantize")
    lines = shown(compilation, show_report)
    assert "runs as: 1 layer dense int8, 1 dense fp16 (left as it is)" in lines
    assert not any("INT4 tensor cores" in line for line in lines)


def shown(compilation: Compilation, view: Callable[[dict[str, Any], Console], None]) -> list[str]:
    """The lines that a view of the report prints, on a wide terminal."""
    stream = io.StringIO()
    view(make_report(compilation, None, Path("unused")), Console(file=stream, width=300))
    return stream.getvalue().splitlines()


def test_the_report_says_it_for_each_layer() -> None:
    rule = {
        "id": "a",
        "match": {"name": "first"},
        "sparsity": {"pattern": "pair4:8"},
        "quantize": FOUR,
    }
    compilation = begin(seeded(Perceptron), noise(8, 32), make_rules(rule, precision="fp16"))
    run_until(compilation, "quantize")
    layers = make_report(compilation, None, Path("unused"))["layers"]
    found = {layer["name"]: layer["execution"] for layer in layers}
    assert found["first"]["kind"] == "dense int8"
    assert "pair4:8 is for sparse INT4 tensor cores" in found["first"]["why"]
    assert found["second"] == {"kind": "dense fp16", "why": "the layer was left as it is"}
