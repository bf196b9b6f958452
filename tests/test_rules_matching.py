"""Rules decide by their order, say by which rules, and refuse to do nothing in silence."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpusq_compile.errors import CheckFailed, InputError
from gpusq_compile.language.loader import Rules, load_rules
from gpusq_compile.language.matching import (
    ACTIONS,
    Candidate,
    Decision,
    Decisions,
    decide,
    file_line,
    matches,
)
from gpusq_compile.language.problems import InputErrors
from gpusq_compile.language.schema import Distill, Quantize, Sparsity


def linear(name: str, *roles: str, size: tuple[int, int] = (64, 64)) -> Candidate:
    return Candidate(
        name, "linear", frozenset(roles), "torch.nn.modules.linear.Linear", size[0], size[1], 1
    )


def block(index: int) -> list[Candidate]:
    prefix = f"blocks.{index}"
    return [
        linear(f"{prefix}.attn.qkv", "attention_qkv", size=(64, 192)),
        linear(f"{prefix}.attn.proj", "attention_proj"),
        linear(f"{prefix}.mlp.fc1", "mlp", size=(64, 256)),
        linear(f"{prefix}.mlp.fc2", "mlp", size=(256, 64)),
    ]


MODEL = [
    linear("patch_embed.proj", "patch_embed", size=(48, 64)),
    *block(0),
    *block(1),
    Candidate("blocks.1.add_1", "add", frozenset({"stage_end"}), "timm.Block", None, None),
    Candidate(
        "norm",
        "layer_norm",
        frozenset({"final_projection"}),
        "torch.nn.modules.normalization.LayerNorm",
        None,
        64,
    ),
    linear("head", "classifier", size=(64, 10)),
]
CONVOLUTIONS = [
    Candidate("wide", "conv2d", frozenset(), "torch.nn.modules.conv.Conv2d", 64, 64, 3),
    Candidate("point", "conv2d", frozenset(), "torch.nn.modules.conv.Conv2d", 64, 64, 1),
]


def rules_of(*rules: dict[str, Any]) -> Rules:
    numbered = [{"id": f"r{index}", **rule} for index, rule in enumerate(rules)]
    return load_rules({"version": 1, "rules": numbered})


def names_matched(match: dict[str, Any]) -> list[str]:
    rules = rules_of({"match": match, "sparsity": "none"})
    return [c.name for c in MODEL if matches(rules.rules[0].rule.match, c)]


def test_a_kernel_of_one_pixel_tells_the_gemms_from_other_convolutions() -> None:
    rules = rules_of({"match": {"op": ["linear", "conv2d"], "kernel_size": 1}, "sparsity": "none"})
    taken = [c.name for c in [MODEL[0], *CONVOLUTIONS] if matches(rules.rules[0].rule.match, c)]
    assert taken == ["patch_embed.proj", "point"]


def by_name(decisions: Decisions, name: str) -> Decision:
    return decisions.decisions[[c.name for c in MODEL].index(name)]


PRUNE: dict[str, Any] = {"match": {"op": "linear"}, "sparsity": {"pattern": "2:4"}}


@pytest.mark.parametrize(
    ("match", "expected"),
    [
        ({"op": "layer_norm"}, ["norm"]),
        ({"op": ["layer_norm", "add"]}, ["blocks.1.add_1", "norm"]),
        ({"role": "classifier"}, ["head"]),
        ({"role": ["patch_embed", "stage_end"]}, ["patch_embed.proj", "blocks.1.add_1"]),
        ({"name": "**.qkv"}, ["blocks.0.attn.qkv", "blocks.1.attn.qkv"]),
        ({"name": ["head", "blocks.0.mlp.*"]}, ["blocks.0.mlp.fc1", "blocks.0.mlp.fc2", "head"]),
        ({"name": "re:blocks\\.\\d\\.attn\\.proj"}, ["blocks.0.attn.proj", "blocks.1.attn.proj"]),
        ({"module": "LayerNorm"}, ["norm"]),
        ({"module": "torch.nn.modules.normalization.*"}, ["norm"]),
        ({"module": "*Norm"}, ["norm"]),
        ({"module": "re:timm\\..*"}, ["blocks.1.add_1"]),
        ({"in_features": 48}, ["patch_embed.proj"]),
        ({"in_features": {"min": 65}}, ["blocks.0.mlp.fc2", "blocks.1.mlp.fc2"]),
        ({"out_features": {"max": 10}}, ["head"]),
        ({"op": "linear", "out_features": {"multiple_of": 4, "max": 63}}, []),
        ({"role": "mlp", "name": "blocks.1.**", "in_features": 64}, ["blocks.1.mlp.fc1"]),
    ],
)
def test_keys_all_hold_and_lists_hold_in_any_entry(
    match: dict[str, Any], expected: list[str]
) -> None:
    assert names_matched(match) == expected


def test_a_layer_without_a_size_meets_no_predicate_on_it() -> None:
    assert "blocks.1.add_1" not in names_matched({"in_features": {"min": 1}})


def test_the_last_rule_wins_per_action_with_its_whole_block() -> None:
    decisions = decide(
        rules_of(
            {**PRUNE, "quantize": {"weight": "int8", "output": "int8"}},
            {"match": {"role": "mlp"}, "quantize": {"weight": "int8"}},
            {"match": {"role": "classifier"}, "sparsity": "none"},
        ),
        MODEL,
    )
    mlp = by_name(decisions, "blocks.0.mlp.fc1")
    assert mlp.sparsity == Sparsity(pattern="2:4")
    assert mlp.quantize == Quantize(weight="int8", activation="int8", output="none")
    head = by_name(decisions, "head")
    assert head.sparsity is None
    assert head.quantize == Quantize(weight="int8", output="int8")
    assert by_name(decisions, "norm") == Decision()


def test_the_chain_names_every_rule_with_its_line_and_what_became_of_it() -> None:
    rules = rules_of(
        {**PRUNE, "quantize": {"weight": "int8"}},
        {"match": {"role": "classifier"}, "sparsity": "none"},
    )
    chain = by_name(decide(rules, MODEL), "head").chain
    assert [(hit.rule, hit.actions, hit.overridden) for hit in chain] == [
        ("r0", ("sparsity", "quantize"), ("sparsity",)),
        ("r1", ("sparsity",), ()),
    ]
    assert [hit.location for hit in chain] == [located.location for located in rules.rules]
    assert str(chain[0]) == "<rules>.rules[0] r0: sparsity (overridden), quantize"


def test_the_chain_of_a_shipped_rule_begins_with_its_file_and_line() -> None:
    rules = load_rules("int8")
    decisions = decide(rules, MODEL)
    chain = by_name(decisions, "blocks.0.attn.qkv").chain
    assert [hit.rule for hit in chain] == ["gemms", "int8-qkv-output"]
    assert chain[0].location.line is not None
    assert file_line(chain[0].location).endswith(f"int8.yaml:{chain[0].location.line}")
    assert str(chain[0]).startswith(file_line(chain[0].location))
    assert decisions.warnings == ()


def test_shipped_int8_compresses_fitting_linears_and_leaves_the_rest() -> None:
    decisions = decide(load_rules("int8"), MODEL)
    compressed = {
        candidate.name
        for candidate, decision in zip(MODEL, decisions.decisions, strict=True)
        if decision.sparsity and decision.quantize
    }
    assert compressed == {candidate.name for candidate in [*block(0), *block(1)]}
    outputs = {
        candidate.name
        for candidate, decision in zip(MODEL, decisions.decisions, strict=True)
        if decision.quantize and decision.quantize.output == "int8"
    }
    assert outputs == {"blocks.0.attn.qkv", "blocks.1.attn.qkv"}
    taps = {
        candidate.name
        for candidate, decision in zip(MODEL, decisions.decisions, strict=True)
        if decision.distill == Distill()
    }
    assert taps == {"patch_embed.proj", "blocks.1.add_1", "norm"}


def unmatched(match: dict[str, Any], candidates: list[Candidate] = MODEL) -> InputError:
    with pytest.raises(InputError) as caught:
        decide(rules_of({"match": match, "sparsity": "none"}), candidates)
    assert caught.value.code == "rule-unmatched"
    assert "'r0'" in caught.value.message
    assert "optional: true" in (caught.value.hint or "")
    assert str(caught.value.location) == "<rules>.rules[0]"
    return caught.value


def test_a_rule_that_matches_nothing_says_which_condition_left_none() -> None:
    error = unmatched({"role": "classifier", "out_features": {"multiple_of": 32}})
    assert "role: classifier leaves 1 of 12" in error.message
    assert "out_features: {multiple_of: 32} leaves 0 of 1" in error.message
    assert "out_features found: 10" in (error.hint or "")


def test_a_glob_that_stays_too_short_is_told_about_two_stars() -> None:
    error = unmatched({"name": "*.qkv"})
    assert '"**.qkv" would match 2' in (error.hint or "")


def test_a_misspelt_name_gets_the_nearest_one() -> None:
    error = unmatched({"name": "blocks.0.attn.qvk"})
    assert "'blocks.0.attn.qkv'" in (error.hint or "")


def test_a_name_that_other_layers_have_is_said() -> None:
    error = unmatched({"op": "linear", "name": "norm"})
    assert "1 other layer has such a name, 'norm'" in (error.hint or "")


def test_an_absent_op_or_role_lists_those_found() -> None:
    assert "ops found: add, layer_norm, linear" in (unmatched({"op": "conv2d"}).hint or "")
    error = unmatched({"op": "add", "role": "mlp"})
    assert "roles found: stage_end" in (error.hint or "")


def test_a_size_that_no_layer_of_that_op_has_is_said() -> None:
    assert "none of them has in_features" in (unmatched({"op": "add", "in_features": 8}).hint or "")


def test_a_model_without_layers_is_said() -> None:
    assert "no layer" in unmatched({"op": "linear"}, []).message


def test_all_unmatched_rules_are_named_at_once() -> None:
    rule = {"match": {"op": "conv2d"}, "sparsity": "none"}
    with pytest.raises(InputErrors) as caught:
        decide(rules_of(rule, PRUNE, rule), MODEL)
    assert [str(error.location)[-3:] for error in caught.value.errors] == ["[0]", "[2]"]


def test_an_optional_rule_may_match_nothing() -> None:
    rule = {"match": {"op": "conv2d"}, "sparsity": "none", "optional": True}
    decisions = decide(rules_of(rule), MODEL)
    assert set(decisions.decisions) == {Decision()}
    assert decisions.warnings == ()
    assert decide(rules_of({**rule, "expect": 3}), MODEL) == decisions


def test_expect_pins_the_count() -> None:
    decide(rules_of({**PRUNE, "expect": 10}), MODEL)
    with pytest.raises(CheckFailed) as caught:
        decide(rules_of({**PRUNE, "expect": 9}, {**PRUNE, "expect": 11}), MODEL)
    assert caught.value.code == "expect-mismatch"
    assert caught.value.exit_code == 1
    assert "'r0' expects 9 layers and matches 10" in caught.value.message
    assert "'r1' expects 11" in caught.value.message


def test_expect_0_asks_for_no_match() -> None:
    rule = {"match": {"op": "conv2d"}, "sparsity": "none", "expect": 0}
    assert set(decide(rules_of(rule), MODEL).decisions) == {Decision()}
    with pytest.raises(CheckFailed):
        decide(rules_of({**PRUNE, "expect": 0}), MODEL)


def test_a_fully_shadowed_rule_is_a_warning_with_its_place() -> None:
    rules = rules_of(
        {"match": {"role": "mlp"}, "sparsity": "none"},
        PRUNE,
        {"match": {"role": "classifier"}, "sparsity": "none"},
    )
    (warning,) = decide(rules, MODEL).warnings
    assert warning.code == "rule-shadowed"
    assert warning.location == rules.rules[0].location
    assert "'r0' decides nothing: 'r1' overrides it on all 4 layers" in warning.message
    assert str(warning).startswith("<rules>.rules[0]: warning[rule-shadowed]")


def test_a_rule_with_one_decision_left_is_no_warning() -> None:
    rules = rules_of(
        {"match": {"role": "mlp"}, "sparsity": "none", "quantize": "none"},
        PRUNE,
    )
    assert decide(rules, MODEL).warnings == ()


def test_an_idle_pattern_of_a_list_is_a_warning() -> None:
    rules = rules_of({"match": {"name": ["head", "heads"]}, "sparsity": "none"})
    (warning,) = decide(rules, MODEL).warnings
    assert warning.code == "pattern-unmatched"
    assert '"heads"' in warning.message


action_values = st.fixed_dictionaries(
    {},
    optional={
        "sparsity": st.sampled_from(["none", {"pattern": "2:4"}]),
        "quantize": st.sampled_from(["none", {"weight": "int8"}, {"weight": "none"}]),
        "distill": st.sampled_from(["none", {"theta": 0.5}, {"theta": 2.0}]),
    },
).filter(bool)
match_values = st.fixed_dictionaries(
    {},
    optional={
        "op": st.sampled_from(["linear", "layer_norm", "add"]),
        "role": st.sampled_from(["mlp", "classifier", "stage_end"]),
        "name": st.sampled_from(["**", "blocks.**", "*", "**.fc?"]),
        "in_features": st.sampled_from([64, {"min": 65}, {"multiple_of": 32}]),
    },
).filter(bool)


@given(rule_list=st.lists(st.tuples(match_values, action_values), max_size=6))
def test_decisions_agree_with_brute_force(
    rule_list: list[tuple[dict[str, Any], dict[str, Any]]],
) -> None:
    rules = rules_of(*({"match": m, **does, "optional": True} for m, does in rule_list))
    decisions = decide(rules, MODEL)
    winners: set[str] = set()
    hit_rules: set[str] = set()
    for candidate, decision in zip(MODEL, decisions.decisions, strict=True):
        hits = [r.rule for r in rules.rules if matches(r.rule.match, candidate)]
        hit_rules.update(rule.id for rule in hits)
        assert [hit.rule for hit in decision.chain] == [rule.id for rule in hits]
        for action in ACTIONS:
            last = next((r for r in reversed(hits) if getattr(r, action) is not None), None)
            block = getattr(last, action) if last else None
            assert getattr(decision, action) == (None if block == "none" else block)
            for hit in decision.chain:
                if action in hit.actions:
                    assert (action in hit.overridden) is (last is None or hit.rule != last.id)
            winners.update({last.id} if last else ())
    warned = {w.message.split("'")[1] for w in decisions.warnings if w.code == "rule-shadowed"}
    assert warned == hit_rules - winners
