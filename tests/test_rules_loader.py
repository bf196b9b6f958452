"""Rules are read from names, files and mappings, and resolved with all they extend."""

from __future__ import annotations

import io
import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import BaseModel, ValidationError
from ruamel.yaml import YAML

from gpusq_compile.errors import InputError
from gpusq_compile.language.document import dump_yaml, parse_yaml
from gpusq_compile.language.loader import Rules, load_rules
from gpusq_compile.language.schema import Distill, Quantize, RulesFile, Sparsity
from gpusq_compile.language.training import Finetune, Phase, QuantizePhase
from gpusq_compile.rules import shipped_rules

DATA = Path(__file__).parent / "data" / "rules"
RULE: dict[str, Any] = {"id": "a", "match": {"op": "linear"}, "sparsity": {"pattern": "2:4"}}


def load_text(text: str, folder: Path) -> Rules:
    path = folder / "rules.yaml"
    path.write_text(text, encoding="utf-8")
    return load_rules(path)


def test_shipped_name_path_and_mapping_give_the_same_rules() -> None:
    path = shipped_rules()["int8"]
    mapping = YAML(typ="safe").load(path.read_text(encoding="utf-8"))
    by_name, by_path, by_mapping = load_rules("int8"), load_rules(path), load_rules(mapping)
    assert by_name == by_path
    assert by_name.file == by_mapping.file
    assert by_mapping.sources == ("<rules>",)


def test_a_shipped_name_wins_over_a_file_of_that_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "int8").write_text("version: 1\nrules: []\n")
    monkeypatch.chdir(tmp_path)
    assert load_rules("int8").rules
    assert not load_rules("./int8").rules


@pytest.mark.parametrize("spelling", ["1e-4", "1.0e-4", "0.0001", "1E-4", "+1e-4"])
def test_numbers_are_read_as_yaml_1_2_says(spelling: str, tmp_path: Path) -> None:
    rules = load_text(
        f"version: 1\nrules: []\nfinetune: {{sparse: {{lr: {spelling}}}}}\n", tmp_path
    )
    assert isinstance(rules.finetune.sparse, Phase)
    assert rules.finetune.sparse.lr == 1e-4


def test_words_of_yaml_1_1_stay_words(tmp_path: Path) -> None:
    for head in ("", "%YAML 1.1\n---\n"):
        rules = load_text(f"{head}version: 1\nscope: on\nrules: []\n", tmp_path)
        assert rules.scope == "on"


def test_byte_order_mark_and_windows_line_ends_change_nothing(tmp_path: Path) -> None:
    path = tmp_path / "rules.yaml"
    path.write_bytes(b"\xef\xbb\xbfversion: 1\r\nscope: encoder\r\nrules: []\r\n")
    assert load_rules(path).scope == "encoder"


def test_action_absent_off_and_block_differ() -> None:
    (located,) = load_rules(
        {
            "version": 1,
            "rules": [
                {
                    "id": "a",
                    "match": {"op": "linear"},
                    "quantize": "none",
                    "distill": {"every": 3},
                }
            ],
        }
    ).rules
    assert located.rule.sparsity is None
    assert located.rule.quantize == "none"
    assert located.rule.distill == Distill(every=3)


def test_shipped_int8_asks_for_sparse_int8_and_an_int8_output_of_qkv() -> None:
    by_id = {located.rule.id: located.rule for located in load_rules("int8").rules}
    gemms, qkv, head = by_id["gemms"], by_id["int8-qkv-output"], by_id["dense-classifier"]
    assert gemms.sparsity == Sparsity(pattern="2:4", method="obs", permute=True)
    assert gemms.quantize == Quantize(weight="int8", activation="int8", output="auto")
    assert isinstance(qkv.quantize, Quantize)
    assert qkv.quantize.output == "int8"
    assert (head.sparsity, head.quantize) == ("none", "none")
    for located in (gemms, qkv):
        for size in (located.match.in_features, located.match.out_features):
            assert size is not None
            assert size.multiple_of == 32
    assert by_id["taps"].match.role == ("patch_embed", "stage_end", "final_projection")


def test_shipped_int4_is_int8_with_four_bits_but_for_the_ends_and_the_qkv_output() -> None:
    int4, int8 = load_rules("int4"), load_rules("int8")
    by_id = {located.rule.id: located.rule for located in int4.rules}
    assert list(by_id) == [
        *(located.rule.id for located in int8.rules),
        "int8-patch-embedding",
    ]
    for located in int8.rules:
        assert by_id[located.rule.id].match == located.rule.match
        if located.rule.id != "gemms":
            assert by_id[located.rule.id].sparsity == located.rule.sparsity
    assert by_id["gemms"].sparsity == Sparsity(pattern="portable", method="obs", permute=True)
    assert by_id["int8-patch-embedding"].sparsity == Sparsity(pattern="2:4", method="obs")
    gemms, qkv, patch = (
        by_id[rule_id].quantize for rule_id in ("gemms", "int8-qkv-output", "int8-patch-embedding")
    )
    assert gemms == Quantize(weight="int4", activation="int4", output="auto", smooth=0.5)
    assert qkv == Quantize(weight="int4", activation="int4", output="int8", smooth=0.5)
    assert patch == Quantize(weight="int8", activation="int8", output="auto")
    for found, known in (
        (int4.finetune.sparse, int8.finetune.sparse),
        (int4.finetune.quantize, int8.finetune.quantize),
    ):
        assert isinstance(found, Phase)
        assert isinstance(known, Phase)
        assert found.epochs > known.epochs


def test_shipped_int4_pairwise_is_int4_in_the_pattern_of_int4_hardware() -> None:
    pairwise, int4 = (
        {located.rule.id: located.rule for located in load_rules(name).rules}
        for name in ("int4-pairwise", "int4")
    )
    expected = Sparsity(pattern="pair4:8", method="obs", permute=True)
    assert pairwise.pop("gemms") == int4.pop("gemms").model_copy(update={"sparsity": expected})
    assert pairwise == int4


def test_shipped_int4_a8_has_weights_of_int4_and_activations_and_limits_of_int8() -> None:
    rules, int8 = load_rules("int4-a8"), load_rules("int8")
    by_id = {located.rule.id: located.rule for located in rules.rules}
    gemms, qkv = by_id["gemms"].quantize, by_id["int8-qkv-output"].quantize
    assert gemms == Quantize(weight="int4", activation="int8", output="auto")
    assert qkv == Quantize(weight="int4", activation="int8", output="int8")
    assert by_id["gemms"].sparsity == Sparsity(pattern="portable", method="obs", permute=True)
    assert rules.calibration.weight == "mse"
    assert rules.calibration.activation == int8.calibration.activation
    assert rules.file.verify == int8.file.verify


def test_shipped_sparse_fp16_never_quantizes() -> None:
    rules = load_rules("sparse-fp16")
    assert all(located.rule.quantize is None for located in rules.rules)
    assert rules.finetune.quantize == "none"
    assert rules.target.precision == "fp16"


@pytest.mark.parametrize("name", shipped_rules())
def test_locations_are_the_lines_of_the_rules(name: str) -> None:
    for located in load_rules(name).rules:
        assert located.location.line is not None
        lines = Path(located.location.file).read_text(encoding="utf-8").splitlines()
        line = lines[located.location.line - 1]
        assert line.strip() == f"- id: {located.rule.id}"
        assert located.location.column == line.index("id:") + 1


def test_child_replaces_rules_in_place_adds_new_ones_and_merges_blocks() -> None:
    rules = load_rules(DATA / "child.yaml")
    assert [located.rule.id for located in rules.rules] == ["all", "head", "taps"]
    files = [Path(located.location.file).name for located in rules.rules]
    assert files == ["child.yaml", "base.yaml", "child.yaml"]
    size = rules.rules[0].rule.match.in_features
    assert size is not None
    assert size.equals == 64
    assert rules.scope == "backbone"
    assert rules.target.compute == ("sm80", "sm89")
    assert rules.target.precision == "fp16"
    assert isinstance(rules.finetune.sparse, Phase)
    assert rules.finetune.sparse.epochs == 7
    assert rules.finetune.sparse.lr == 1e-3
    assert rules.finetune.quantize == "none"
    assert [Path(source).name for source in rules.sources] == ["base.yaml", "child.yaml"]
    assert rules.file.extends is None


def test_extends_takes_a_shipped_name_a_path_and_serves_mappings(tmp_path: Path) -> None:
    nested = tmp_path / "nested"
    nested.mkdir()
    (nested / "mine.yaml").write_text("version: 1\nextends: ../own.yaml\n")
    (tmp_path / "own.yaml").write_text("version: 1\nextends: int8\nscope: encoder\n")
    rules = load_rules({"version": 1, "extends": str(nested / "mine.yaml"), "scope": "none"})
    assert rules.scope is None
    assert len(rules.sources) == 4
    assert rules.rules == load_rules("int8").rules


@pytest.mark.parametrize(
    ("inherited", "chosen"),
    [
        ("finetune: {sparse: {schedule: multistep, milestones: [3, 5]}}", "schedule: cosine"),
        ("finetune: {sparse: {schedule: step, step_size: 2, decay: 0.5}}", "schedule: polynomial"),
        ("finetune: {sparse: {schedule: polynomial, power: 2}}", "schedule: constant"),
    ],
)
def test_child_may_choose_another_schedule_than_inherited_keys_are_for(
    inherited: str, chosen: str, tmp_path: Path
) -> None:
    (tmp_path / "base.yaml").write_text(f"version: 1\nrules: []\n{inherited}\n")
    rules = load_text(
        f"version: 1\nextends: base.yaml\nfinetune: {{sparse: {{{chosen}}}}}\n", tmp_path
    )
    assert isinstance(rules.finetune.sparse, Phase)
    assert f"schedule: {rules.finetune.sparse.schedule}" == chosen
    said = rules.as_dict()["finetune"]["sparse"]
    keys = ("milestones", "step_size", "decay", "power")
    assert not [key for key in keys if f"{key}:" in inherited and key in said]
    assert load_rules(rules.as_dict()).as_dict() == rules.as_dict()


def test_a_key_without_effect_that_the_child_itself_writes_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "base.yaml").write_text(
        "version: 1\nrules: []\nfinetune: {sparse: {schedule: constant}}\n"
    )
    with pytest.raises(InputError) as caught:
        load_text(
            "version: 1\nextends: base.yaml\nfinetune: {sparse: {milestones: [3]}}\n", tmp_path
        )
    assert caught.value.code == "unused-key"


def test_a_key_without_effect_may_be_switched_off(tmp_path: Path) -> None:
    load_text("version: 1\nrules: []\nfinetune: {sparse: {milestones: none}}\n", tmp_path)


def test_of_several_extended_files_the_later_one_wins_and_a_common_parent_comes_first(
    tmp_path: Path,
) -> None:
    (tmp_path / "left.yaml").write_text(
        "version: 1\nextends: int8\nscope: left\ncalibration: {weight: mse}\n"
    )
    (tmp_path / "right.yaml").write_text("version: 1\nextends: int8\nscope: right\n")
    rules = load_text("version: 1\nextends: [left.yaml, right.yaml]\n", tmp_path)
    assert [Path(source).name for source in rules.sources] == [
        "int8.yaml",
        "left.yaml",
        "right.yaml",
        "rules.yaml",
    ]
    assert rules.scope == "right"
    assert rules.calibration.weight == "mse"
    assert rules.rules == load_rules("int8").rules


def test_anchors_and_merge_keys_work(tmp_path: Path) -> None:
    rules = load_text(
        "version: 1\n"
        "rules:\n"
        "  - id: a\n"
        "    match: {op: linear}\n"
        "    quantize: &int8 {weight: int8, activation: int8}\n"
        "  - id: b\n"
        "    match: {role: attention_qkv}\n"
        "    quantize: {<<: *int8, output: int8}\n"
        "  - id: c\n"
        "    match: {role: mlp}\n"
        "    quantize: *int8\n"
        "  - id: d\n"
        "    match: {role: classifier}\n"
        "    quantize: {activation: none, <<: [*int8, {output: int8}]}\n",
        tmp_path,
    )
    assert [located.rule.quantize for located in rules.rules] == [
        Quantize(weight="int8"),
        Quantize(weight="int8", output="int8"),
        Quantize(weight="int8"),
        Quantize(weight="int8", activation="none", output="int8"),
    ]


def test_none_and_an_empty_value_switch_a_limit_off(tmp_path: Path) -> None:
    rules = load_text(
        "version: 1\nrules: []\nfinetune: {sparse: {clip_norm: none, patience: null}}\n", tmp_path
    )
    assert isinstance(rules.finetune.sparse, Phase)
    assert rules.finetune.sparse.clip_norm is None
    assert rules.finetune.sparse.patience is None


def test_one_value_stands_for_a_list_of_one() -> None:
    one = load_rules({"version": 1, "rules": [RULE]})
    match = {"op": ["linear"]}
    many = load_rules({"version": 1, "rules": [{**RULE, "match": match}]})
    assert one.file == many.file


def test_models_are_frozen() -> None:
    rules = load_rules("int8")
    with pytest.raises(ValidationError):
        rules.rules[0].rule.optional = True


def test_every_key_has_a_description() -> None:
    def visit(model: type[BaseModel], seen: set[type[BaseModel]]) -> None:
        seen.add(model)
        assert model.__doc__
        for name, field in model.model_fields.items():
            assert field.description, f"{model.__name__}.{name}"
        for subclass in BaseModel.__subclasses__():
            for known in subclass.__subclasses__():
                if known not in seen and known.__module__ == RulesFile.__module__:
                    visit(known, seen)

    visit(RulesFile, set())


@pytest.mark.parametrize("name", shipped_rules())
def test_resolved_shipped_rules_read_back_the_same(name: str, tmp_path: Path) -> None:
    rules = load_rules(name)
    assert load_rules(rules.as_dict()).file == rules.file
    assert load_text(rules.to_yaml(), tmp_path).file == rules.file
    assert YAML(typ="safe").load(io.StringIO(rules.to_yaml())) == rules.as_dict()


sizes = st.one_of(
    st.integers(1, 4096),
    st.fixed_dictionaries({"multiple_of": st.integers(1, 64)}, optional={"min": st.just(2)}),
)
words = st.text(st.characters(exclude_categories=["Cs", "Cc"], exclude_characters="["), min_size=1)
matches = st.fixed_dictionaries(
    {"op": st.sampled_from(["linear", "conv2d", "layer_norm", "add"])},
    optional={
        "role": st.lists(st.sampled_from(["mlp", "classifier"]), min_size=1, unique=True),
        "name": words.filter(lambda text: not text.startswith("re:")),
        "in_features": sizes,
        "out_features": sizes,
    },
)
pruned = st.fixed_dictionaries(
    {"pattern": st.just("2:4")},
    optional={
        "method": st.sampled_from(["magnitude", "wanda", "obs"]),
        "permute": st.booleans(),
    },
)
quantized = st.fixed_dictionaries(
    {"weight": st.sampled_from(["int8", "int4"])},
    optional={
        "activation": st.sampled_from(["int8", "int4"]),
        "output": st.sampled_from(["int8", "int4", "none"]),
        "rounding": st.sampled_from(["nearest", "gptq"]),
        "smooth": st.one_of(st.just("none"), st.floats(0, 1)),
    },
)
actions = st.fixed_dictionaries(
    {"sparsity": st.one_of(st.just("none"), pruned)},
    optional={
        "quantize": st.one_of(st.just("none"), quantized),
        "distill": st.fixed_dictionaries({"theta": st.floats(1e-9, 1e9)}),
        "optional": st.booleans(),
        "expect": st.integers(0, 9),
    },
)
limits = st.fixed_dictionaries(
    {},
    optional={
        "epochs": st.floats(0.01, 100),
        "lr": st.floats(1e-12, 1),
        "max_steps": st.integers(1, 10**6),
        "clip_norm": st.sampled_from(["none", 1.0, None]),
        "momentum": st.floats(0, 0.99),
        "batch_size": st.integers(1, 4096),
        "autocast": st.sampled_from(["none", "bfloat16", "float16"]),
        "eval_every": st.integers(1, 99),
        "keep": st.sampled_from(["last", "best"]),
    },
)
rising = st.lists(st.floats(0.01, 1000), min_size=1, unique=True).map(sorted)
schedules = st.one_of(
    st.fixed_dictionaries({}, optional={"schedule": st.sampled_from(["cosine", "constant"])}),
    st.fixed_dictionaries({"schedule": st.just("multistep"), "milestones": rising}),
    st.fixed_dictionaries(
        {"schedule": st.just("step"), "step_size": st.floats(0.1, 100)},
        optional={"decay": st.floats(0.01, 0.99)},
    ),
    st.fixed_dictionaries(
        {"schedule": st.just("polynomial")}, optional={"power": st.floats(0.1, 9)}
    ),
)
phases = st.builds(lambda limits, schedule: {**limits, **schedule}, limits, schedules)
documents = st.builds(
    lambda rules, sparse, quantize, scope: {
        "version": 1,
        "rules": [
            {"id": f"r{index}", "match": match, **does} for index, (match, does) in enumerate(rules)
        ],
        "finetune": {"sparse": sparse, "quantize": quantize},
        **({"scope": scope} if scope else {}),
    },
    st.lists(st.tuples(matches, actions), max_size=4),
    st.one_of(st.just("none"), phases),
    st.one_of(st.just("none"), phases),
    st.one_of(st.none(), words.filter(lambda text: text != "none")),
)


@settings(deadline=None)
@given(document=documents)
def test_any_valid_document_survives_the_way_through_the_resolved_one(
    document: dict[str, Any],
) -> None:
    rules = load_rules(document)
    resolved = rules.as_dict()
    assert load_rules(resolved).file == rules.file
    assert parse_yaml(rules.to_yaml(), "resolved").root.plain() == resolved


scalars = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(10**20), 10**20),
    st.floats(allow_nan=False),
    st.text(st.characters(exclude_categories=["Cs", "Cc"], exclude_characters="\ufeff")),
    st.sampled_from(["2:4", "*.qkv", "null", "true", "1e-4", "0o7", "on", "", " x ", "a: b", "<<"]),
)


@settings(deadline=None)
@given(value=scalars)
def test_written_scalars_are_read_back_as_they_were(value: object) -> None:
    read = parse_yaml(dump_yaml({"key": value}), "text")
    assert read.problems == ()
    node = read.root.get("key")
    assert node is not None
    if isinstance(value, float) and math.isinf(value):
        assert node.value == value
    else:
        assert (type(node.value), node.value) == (type(value), value)


def test_defaults_are_those_of_the_paper_where_it_gives_them() -> None:
    loss = Finetune().loss
    assert (loss.alpha, loss.beta, loss.gamma, loss.temperature) == (1, 10, 5, 1)
    assert Finetune().labels == "hard"
    assert Finetune().tap_weights == "prune_loss"
    assert Finetune().normalize == "none"
    assert isinstance(Finetune().quantize, QuantizePhase)
