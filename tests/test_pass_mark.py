"""mark: every weighted operator gets a plan; what its shape forbids is refused with a reason."""

from __future__ import annotations

import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gpusq_compile.compilation import Compilation
from gpusq_compile.errors import CheckFailed, InputError
from gpusq_compile.plan import TAP_PLAN, Treatment
from gpusq_compile.remarks import Kind
from tests.compilations import (
    INT8,
    SPARSE,
    TAPS,
    begin,
    make_rules,
    plan_of,
    plans_of,
    remarks_of,
    run_until,
)
from tests.models import Convolution, Perceptron, Shape, TinyViT, images, noise, seeded

EVERYTHING = {
    "id": "all",
    "match": {"op": ["linear", "conv2d"]},
    "sparsity": SPARSE,
    "quantize": INT8,
}


def marked(model: nn.Module, inputs: Tensor, *rules: Any, **rest: Any) -> Compilation:
    document = make_rules(*(rules or (EVERYTHING,)), **rest)
    return run_until(begin(model.eval(), inputs, document), "mark")


def test_a_plan_says_what_was_asked_for_and_nothing_is_applied_yet() -> None:
    plan = plan_of(marked(seeded(Perceptron), noise(2, 32)), "first")
    assert (plan.op, plan.weight, plan.shape) == ("linear", "first.weight", (64, 32))
    assert plan.requested == Treatment(sparsity="2:4", weight="int8", activation="int8")
    assert plan.applied == Treatment()
    assert plan.reasons == ()
    assert plan.sparsity is not None
    assert plan.quantize is not None


def test_a_layer_that_no_rule_names_has_an_empty_plan() -> None:
    rule = {**EVERYTHING, "match": {"name": "first"}}
    plan = plan_of(marked(seeded(Perceptron), noise(2, 32), rule), "second")
    assert plan.requested == Treatment()
    assert plan.rules == ()


def test_a_plan_names_each_rule_that_matched_with_its_file_and_line(tmp_path: Path) -> None:
    file = tmp_path / "my.yaml"
    file.write_text(
        textwrap.dedent(
            """\
            version: 1
            rules:
              - id: everything
                match: {op: linear}
                sparsity: {pattern: "2:4"}
                quantize: {weight: int8}
              - id: dense-second
                match: {name: second}
                sparsity: none
            """
        )
    )
    compilation = run_until(begin(seeded(Perceptron), noise(2, 32), file), "mark")
    plan = plan_of(compilation, "second")
    assert plan.requested.sparsity is None
    assert plan.requested.weight == "int8"
    assert plan.rules == (
        f"{file}:3 everything: sparsity (overridden), quantize",
        f"{file}:7 dense-second: sparsity",
    )


# --- refusals ------------------------------------------------------------------------------------


class Computed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(32, 32))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight / self.weight.norm())


class Shared(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.same = nn.Linear(32, 32)

    def forward(self, x: Tensor) -> Tensor:
        return self.same(F.relu(self.same(x)))


class Constant(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(1, 32))
        self.position = nn.Linear(32, 32)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.position(self.table)


class Buffered(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("basis", torch.randn(32, 32))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.get_buffer("basis"))


REFUSED: dict[str, tuple[nn.Module, Tensor, str, str]] = {
    "computed weight": (
        Computed(),
        noise(2, 32),
        "linear",
        "the weight is computed in the graph, not stored",
    ),
    "constant input": (
        Constant(),
        noise(2, 32),
        "position",
        "its input is a constant, so the layer runs once, when the engine is built",
    ),
    "grouped convolution": (
        Convolution(8, 8, 3, groups=2),
        noise(2, 8, 8, 8),
        "conv",
        "grouped convolution (2 groups)",
    ),
    "weight in a buffer": (
        Buffered(),
        noise(2, 32),
        "basis",
        "the weight basis is a buffer, not a parameter",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_layer_that_cannot_be_compressed_is_left_whole_with_the_reason(name: str) -> None:
    model, inputs, layer, reason = REFUSED[name]
    compilation = marked(model, inputs)
    plan = plan_of(compilation, layer)
    assert plan.reasons == (reason,)
    assert plan.sparsity is None
    assert plan.quantize is None
    assert plan.requested.weight == "int8"
    remarks = remarks_of(compilation, "mark", Kind.MISSED)
    assert (remarks[0].code, remarks[0].layer, remarks[0].reason) == ("refused", layer, reason)
    record = compilation.records[-1]
    assert record.changed == 0
    assert record.skipped == record.matched == len(plans_of(compilation))


@pytest.mark.parametrize(
    ("compute", "sparsity", "activation", "output"),
    [
        (["portable"], SPARSE, "int8", "int8"),
        (["sm80", "sm90"], SPARSE, "int8", "int8"),
        (["sm90"], SPARSE, "int8", None),
        (["sm80"], "none", "int8", None),
        (["sm80"], SPARSE, "none", None),
        (["sm80"], {"pattern": "portable"}, "int8", "int8"),
        (["sm80"], {"pattern": "pair4:8"}, "int8", None),
    ],
)
def test_an_automatic_output_is_int8_where_sparse_kernels_of_the_target_write_nothing_else(
    compute: list[str], sparsity: Any, activation: str, output: str | None
) -> None:
    document = make_rules(
        {
            "id": "all",
            "match": {"op": "linear"},
            "sparsity": sparsity,
            "quantize": {"weight": "int8", "activation": activation, "output": "auto"},
        }
    )
    document["target"]["compute"] = compute
    compilation = run_until(begin(seeded(Perceptron), noise(2, 32), document), "quantize")
    plan = plan_of(compilation, "first")
    assert plan.requested.output == plan.applied.output == output


def test_an_automatic_output_stays_float_where_the_mask_is_refused() -> None:
    rule = {**EVERYTHING, "quantize": {**INT8, "output": "auto"}}
    compilation = marked(seeded(Perceptron, (66, 64, 32)), noise(2, 66), rule)
    first, second = plan_of(compilation, "first"), plan_of(compilation, "second")
    assert first.reasons == ("2:4 needs a reduction axis that is a multiple of 4, found 66",)
    assert (first.requested.output, second.requested.output) == (None, "int8")


@pytest.mark.parametrize(("size", "found"), [(64, ["first"]), (128, [])])
def test_a_weight_of_one_block_is_remarked(size: int, found: list[str]) -> None:
    quantize = {"weight": "int4", "activation": "none", "block": 64}
    rule = {"id": "blocks", "match": {"name": "first"}, "quantize": quantize}
    compilation = marked(seeded(Perceptron, (size, 64, 32)), noise(2, size), rule)
    remarks = [r for r in remarks_of(compilation, "mark") if r.code == "single-block"]
    assert [remark.layer for remark in remarks] == found


def test_targets_of_the_command_line_settle_outputs_in_place_of_those_of_the_rules() -> None:
    document = make_rules(
        {
            "id": "all",
            "match": {"op": "linear"},
            "sparsity": SPARSE,
            "quantize": {**INT8, "output": "auto"},
        }
    )
    compilation = begin(seeded(Perceptron), noise(2, 32), document, targets=("sm90",))
    assert plan_of(run_until(compilation, "mark"), "first").requested.output is None


def test_a_reduction_axis_that_has_no_groups_of_four_is_quantized_dense() -> None:
    plan = plan_of(marked(seeded(Perceptron, (30, 64, 32)), noise(2, 30)), "first")
    assert plan.reasons == ("2:4 needs a reduction axis that is a multiple of 4, found 30",)
    assert plan.sparsity is None
    assert plan.quantize is not None


@pytest.mark.parametrize(("pattern", "group"), [("2:4", 4), ("pair4:8", 8), ("portable", 4)])
def test_channels_are_never_padded_to_fit_a_pattern(pattern: str, group: int) -> None:
    """Neither a linear's nor a convolution's: half a group too many refuses the pattern."""
    rule = {**EVERYTHING, "sparsity": {"pattern": pattern}}
    size = 24 + group // 2
    reason = f"{pattern} needs a reduction axis that is a multiple of {group}, found {size}"
    for model, inputs, layer in (
        (seeded(Perceptron, (size, 64, 32)), noise(2, size), "first"),
        (seeded(Convolution, size, 8, 3), noise(2, size, 8, 8), "conv"),
    ):
        compilation = marked(model, inputs, rule)
        plan = plan_of(compilation, layer)
        assert plan.reasons == (reason,)
        assert plan.sparsity is None
        assert plan.quantize is not None
        assert [r.reason for r in remarks_of(compilation, "mark", Kind.MISSED)] == [reason]
    fits = plan_of(marked(seeded(Perceptron, (24, 64, 32)), noise(2, 24), rule), "first")
    assert fits.reasons == ()


FOUR = {"weight": "int4", "activation": "int4"}
NO_KERNEL = [
    ("pair4:8", INT8, "fp16", "no-sparse-kernel", "dense int8"),
    ("pair4:8", FOUR, "fp16", "no-sparse-kernel", "dense int8"),
    ("pair4:8", None, "fp16", "no-sparse-kernel", "dense fp16"),
    ("2:4", None, "fp32", "no-sparse-kernel", "dense fp32"),
    ("2:4", {**INT8, "activation": "none"}, "fp16", "no-sparse-kernel", "weight-only int8"),
    ("2:4", INT8, "fp16", "no-sparse-kernel", "writes floats: `output: auto` or `int8`"),
    ("2:4", FOUR, "fp16", "no-sparse-kernel", "writes floats: `output: auto` or `int8`"),
    (
        "2:4",
        {**FOUR, "output": "auto"},
        "fp16",
        "no-sparse-int4",
        "sparse INT4 tensor cores take pairs, not 2:4",
    ),
]


@pytest.mark.parametrize(("pattern", "quantize", "precision", "code", "text"), NO_KERNEL)
def test_a_pattern_that_the_target_cannot_use_is_remarked(
    pattern: str, quantize: dict[str, str] | None, precision: str, code: str, text: str
) -> None:
    rule = {"id": "a", "match": {"name": "first"}, "sparsity": {"pattern": pattern}}
    if quantize is not None:
        rule["quantize"] = quantize
    compilation = marked(seeded(Perceptron), noise(2, 32), rule, precision=precision)
    [remark] = remarks_of(compilation, "mark", Kind.ANALYSIS)
    assert (remark.code, remark.layer) == (code, "first")
    assert text in remark.reason
    assert plan_of(compilation, "first").sparsity is not None


@pytest.mark.parametrize(
    ("pattern", "quantize"),
    [
        ("2:4", {**INT8, "output": "auto"}),
        ("2:4", None),
        ("portable", {**FOUR, "output": "auto"}),
        ("portable", {**INT8, "output": "int8"}),
        ("portable", None),
    ],
)
def test_a_pattern_that_the_target_uses_is_not_remarked(
    pattern: str, quantize: dict[str, str] | None
) -> None:
    rule = {"id": "a", "match": {"name": "first"}, "sparsity": {"pattern": pattern}}
    if quantize is not None:
        rule["quantize"] = quantize
    compilation = marked(seeded(Perceptron), noise(2, 32), rule, precision="fp16")
    assert remarks_of(compilation, "mark", Kind.ANALYSIS) == []


@pytest.mark.parametrize(("target", "remarks"), [("sm90", 0), ("sm86", 1)])
def test_the_targets_of_the_command_line_decide_on_sparse_kernels_with_float_outputs(
    target: str, remarks: int
) -> None:
    rule = {
        "id": "a",
        "match": {"name": "first"},
        "sparsity": {"pattern": "2:4"},
        "quantize": INT8,
    }
    document = make_rules(rule, precision="fp16")
    compilation = begin(seeded(Perceptron), noise(2, 32), document, targets=(target,))
    run_until(compilation, "mark")
    assert len(remarks_of(compilation, "mark", Kind.ANALYSIS)) == remarks


def test_a_refused_pattern_is_not_remarked_again() -> None:
    rule = {**EVERYTHING, "match": {"name": "first"}, "sparsity": {"pattern": "pair4:8"}}
    compilation = marked(seeded(Perceptron, (36, 64, 32)), noise(2, 36), rule)
    assert remarks_of(compilation, "mark", Kind.ANALYSIS) == []


def test_a_refused_layer_can_still_be_compiled_around() -> None:
    """The refusal is the last word: no later pass touches the layer."""
    for model, inputs, layer, _ in REFUSED.values():
        compilation = run_until(begin(model.eval(), inputs, make_rules(EVERYTHING)), "fold")
        assert plan_of(compilation, layer).applied == Treatment()


# --- names ---------------------------------------------------------------------------------------


class Alike(nn.Module):
    """Two layers whose names differ only in the character that cannot be in an attribute."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Sequential(nn.Linear(32, 32))
        self.a_0 = nn.Linear(32, 32)

    def forward(self, x: Tensor) -> Tensor:
        return self.a_0(F.relu(self.a(x)))


def test_layers_of_nearly_the_same_name_keep_apart_through_every_pass() -> None:
    compilation = run_until(begin(Alike().eval(), noise(2, 32), make_rules(EVERYTHING)), "quantize")
    assert list(plans_of(compilation)) == ["a.0", "a_0"]
    modules = [node.target for node in compilation.ir.graph.nodes if node.op == "call_module"]
    assert len(modules) == len(set(modules)) == 6


def test_a_weight_that_is_used_twice_is_two_layers() -> None:
    assert list(plans_of(marked(Shared(), noise(2, 32)))) == ["same", "same#2"]


# --- taps and rules ------------------------------------------------------------------------------


def tap_names(compilation: Compilation) -> list[str]:
    nodes = compilation.ir.graph.nodes
    return [node.meta[TAP_PLAN].name for node in nodes if TAP_PLAN in node.meta]


@pytest.mark.parametrize(("every", "expected"), [(1, [0, 1, 2]), (2, [1, 2]), (3, [2]), (5, [2])])
def test_every_nth_layer_is_tapped_and_always_the_last(every: int, expected: list[int]) -> None:
    rule = {"id": "t", "match": {"name": "**.down"}, "distill": {"every": every}}
    compilation = marked(seeded(TinyViT, Shape(depth=3)), images(2), rule)
    assert tap_names(compilation) == [f"layers.{index}.feed.down" for index in expected]


def test_a_tap_carries_its_theta_and_role() -> None:
    rule = {**TAPS, "distill": {"theta": 2.5}}
    compilation = marked(seeded(TinyViT), images(2), rule)
    plans = [n.meta[TAP_PLAN] for n in compilation.ir.graph.nodes if TAP_PLAN in n.meta]
    assert [(plan.role, plan.distill.theta) for plan in plans] == [
        ("patch_embed", 2.5),
        ("stage_end", 2.5),
        ("final_projection", 2.5),
    ]


@pytest.mark.parametrize(
    ("match", "kind"),
    [({"op": "layer_norm"}, Kind.MISSED), ({"name": "layers.**"}, Kind.ANALYSIS)],
)
def test_compression_asked_of_an_operator_without_a_weight_is_remarked(
    match: dict[str, str], kind: Kind
) -> None:
    rule = {"id": "broad", "match": match, "quantize": {**INT8, "output": "int8"}}
    everything = {**EVERYTHING, "match": {"op": "linear"}}
    compilation = marked(seeded(TinyViT), images(2), everything, rule)
    (remark,) = [
        found
        for found in remarks_of(compilation, "mark")
        if found.code == "no-weight" and "layer_norm" in found.reason
    ]
    assert remark.kind is kind
    count = 5 if match == {"op": "layer_norm"} else 4
    assert remark.reason == (
        f"rule 'broad' asks for quantize on {count} layer_norm operators, which have no weight: "
        "nothing is done there"
    )


def test_marking_changes_no_operator() -> None:
    before = run_until(begin(seeded(TinyViT), images(2), make_rules()), "canonicalize")
    code = before.ir.code
    after = run_until(before, "mark")
    assert after.ir.code == code
    assert after.records[-1].change == 0.0


def test_a_rule_that_matches_nothing_is_an_error_that_names_the_nearest_layer() -> None:
    rule = {**EVERYTHING, "match": {"name": "frist"}}
    with pytest.raises(InputError) as caught:
        marked(seeded(Perceptron), noise(2, 32), rule)
    assert caught.value.code == "rule-unmatched"
    assert "first" in str(caught.value.hint)


def test_a_rule_that_expects_another_count_fails_the_compile() -> None:
    with pytest.raises(CheckFailed) as caught:
        marked(seeded(Perceptron), noise(2, 32), {**EVERYTHING, "expect": 3})
    assert caught.value.code == "expect-mismatch"


def test_a_rule_that_decides_nothing_is_noted() -> None:
    compilation = marked(seeded(Perceptron), noise(2, 32), {**EVERYTHING, "id": "lost"}, EVERYTHING)
    [remark] = [r for r in remarks_of(compilation, "mark") if r.code == "rule-shadowed"]
    assert "'lost' decides nothing" in remark.reason
