"""What the engine makes of a layer follows from its types and its pattern, and is said why."""

from __future__ import annotations

from itertools import product
from pathlib import Path

import pytest

from gpusq_compile.execution import Execution, Precision, execution
from gpusq_compile.language.schema import Quantize
from gpusq_compile.plan import LayerPlan
from gpusq_compile.report.document import make_report
from tests.compilations import begin, make_rules, run_until
from tests.models import Perceptron, noise, seeded


def of(
    applied: dict[str, str] | None = None,
    precision: Precision = "fp16",
    block: int | None = None,
) -> Execution:
    quantize = None
    if block is not None:
        quantize = Quantize.model_validate({"weight": "int4", "activation": "none", "block": block})
    plan = LayerPlan("layer", "linear", (), "layer.weight", (64, 128), quantize=quantize)
    return execution(plan.apply(**(applied or {})), precision)


INT8 = {"weight": "int8", "activation": "int8"}
FOUR = {"weight": "int4", "activation": "int4"}


@pytest.mark.parametrize("types", [INT8, FOUR, {"weight": "int4", "activation": "int8"}])
@pytest.mark.parametrize("precision", ["fp16", "fp32"])
def test_integer_operands_run_on_int8_kernels_that_skip_what_is_two_of_four(
    types: dict[str, str], precision: Precision
) -> None:
    kinds = {
        pattern: of({**types, "sparsity": pattern}, precision).kind
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
    assert of({**INT8, "sparsity": "2:4"}).why.endswith("are for compute capability 9.0 alone")
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
        assert why.endswith(tuple("abcdefghijklmnopqrstuvwxyz0123456789"))


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
