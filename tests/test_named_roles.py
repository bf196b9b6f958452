"""Rules name the layers of a role in place of the search for them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from gpusq_compile.errors import InputError
from gpusq_compile.graph.roles import ROLES
from gpusq_compile.plan import TAP_PLAN
from tests.compilations import TAPS, begin, make_rules, plans_of, run_until
from tests.models import Shape, TinyViT, images, seeded

NAMED = [
    ("stage_end", ["layers.0", "layers.2"], ["layers.0", "layers.2"]),
    ("stage_end", "layers.*", ["layers.0", "layers.1", "layers.2"]),
    ("stage_end", "layers.1.feed", ["layers.1.feed.down"]),
    ("stage_end", [], []),
    ("final_projection", "layers.2.between", ["layers.2.between"]),
    ("patch_embed", "layers.0.mix.wide", ["layers.0.mix.wide"]),
]


@pytest.mark.parametrize(("role", "names", "expected"), NAMED)
def test_rules_name_the_layers_of_a_role(role: str, names: Any, expected: list[str]) -> None:
    rules = make_rules(TAPS, roles={role: names})
    marked = run_until(begin(seeded(TinyViT, Shape(depth=3)), images(2), rules), "mark")
    plans = [node.meta[TAP_PLAN] for node in marked.ir.graph.nodes if TAP_PLAN in node.meta]
    found = [plan.name.rpartition(".add")[0] or plan.name for plan in plans if plan.role == role]
    assert found == expected
    others = {"patch_embed", "stage_end", "final_projection"} - {role}
    assert others <= {plan.role for plan in plans}


def test_a_module_stands_for_its_layers_where_a_role_is_one_of_layers() -> None:
    rules = make_rules(TAPS, roles={"mlp": ["layers.0.mix", "layers.1.feed.up"]})
    marked = run_until(begin(seeded(TinyViT), images(2), rules), "mark")
    named = [name for name, plan in plans_of(marked).items() if "mlp" in plan.roles]
    assert named == ["layers.0.mix.wide", "layers.0.mix.back", "layers.1.feed.up"]


def test_a_role_of_layers_for_a_norm_is_an_error_that_says_so(tmp_path: Path) -> None:
    file = tmp_path / "rules.yaml"
    file.write_text(
        "version: 1\nroles: {mlp: last_norm}\n"
        "rules: [{id: a, match: {op: linear}, quantize: none}]\n"
    )
    with pytest.raises(InputError, match="'last_norm' names a layer_norm, and this role"):
        run_until(begin(seeded(TinyViT), images(2), str(file)), "mark")


def test_a_role_for_a_name_that_is_not_there_is_an_error(tmp_path: Path) -> None:
    file = tmp_path / "rules.yaml"
    file.write_text(
        "version: 1\nroles:\n  stage_end: [layers.0, layer.1]\n"
        "rules: [{id: a, match: {op: linear}, quantize: none}]\n"
    )
    with pytest.raises(InputError) as caught:
        run_until(begin(seeded(TinyViT), images(2), str(file)), "mark")
    assert caught.value.code == "role-unmatched"
    assert str(caught.value.location).endswith("rules.yaml:3:14")
    assert "'layer.1'" in caught.value.message
    assert "'layers.1'" in (caught.value.hint or "")


def test_the_table_of_roles_is_the_rules_languages() -> None:
    from typing import get_args

    from gpusq_compile.language.schema import Role

    assert get_args(Role) == ROLES
