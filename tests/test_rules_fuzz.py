"""Whatever a rules file holds, reading it ends in rules or in an InputError with a known code."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gpusq_compile.errors import InputError
from gpusq_compile.language.loader import Rules, load_rules
from gpusq_compile.language.problems import CODES, InputErrors
from gpusq_compile.rules import shipped_rules

NAMES = [
    "int8",
    "int4",
    "int4-weight-only",
    "int8-attention",
    "sparse-fp16",
    "paper/mask_rcnn_swin_tiny",
    "paper/detr_r50",
]
SHIPPED = [shipped_rules()[name].read_text(encoding="utf-8") for name in NAMES]
TOKENS = [
    *"{}[],:&*#?|-<>=!%@`'\"\\\n\t ~",
    "\n  - ",
    "- ",
    ": ",
    "{}",
    "[]",
    "<<: *a",
    "&a ",
    "*a",
    "!!python/name:os.system ",
    "!!int ",
    "!!set ",
    "!!omap ",
    "none",
    "null",
    "2:4",
    '"3:4"',
    "1e999",
    ".nan",
    "-1",
    "9" * 5000,
    "0x_",
    "08",
    "0b2",
    "1_",
    "2024-01-01",
    "---\n",
    "...\n",
    "%YAML 1.1\n---\n",
    "%YAML 1.9\n---\n",
    "%TAG ! x\n---\n",
    '"\\Uffffffff"',
    '"\\x0"',
    "!<",
    "|9\n",
    "\x00",
    "\x85",
    "\u2028",
    "\ufeff",
    "\U0001f600",
    "re:(",
    "extends: int8\n",
    "extends: .\n",
    "extends: [int4, paper/deit_tiny]\n",
]


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("fuzz") / "rules.yaml"


def check(spec: Any) -> None:
    try:
        rules = load_rules(spec)
    except InputError as error:
        for single in error.errors if isinstance(error, InputErrors) else (error,):
            assert single.code in CODES
            assert "<block>" not in str(single)
            assert "Input should" not in str(single)
    else:
        assert isinstance(rules, Rules)
        assert load_rules(rules.as_dict()).as_dict() == rules.as_dict()


QUIET = settings(
    max_examples=150,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


@QUIET
@given(data=st.data())
def test_mutated_shipped_rules(data: st.DataObject, file: Path) -> None:
    text = data.draw(st.sampled_from(SHIPPED))
    for _ in range(data.draw(st.integers(1, 3))):
        start = data.draw(st.integers(0, len(text)))
        length = data.draw(st.sampled_from([0, 0, 1, 5, 30]))
        insert = data.draw(st.one_of(st.sampled_from(TOKENS), st.just("")))
        text = text[:start] + insert + text[start + length :]
    file.write_text(text, encoding="utf-8")
    check(file)


@QUIET
@given(tokens=st.lists(st.sampled_from(TOKENS), max_size=12))
def test_soups_of_yaml_tokens(tokens: list[str], file: Path) -> None:
    file.write_text("version: 1\nrules:" + "".join(tokens), encoding="utf-8")
    check(file)


@QUIET
@given(content=st.binary(max_size=200))
def test_any_bytes(content: bytes, file: Path) -> None:
    file.write_bytes(content)
    check(file)


KEYS = ["pattern", "weight", "op", "min", "lr", "schedule", "milestones", "smooth", "x"]
values = st.recursive(
    st.one_of(
        st.none(),
        st.booleans(),
        st.integers(),
        st.just(10**400),
        st.floats(),
        st.sampled_from(["none", "int8", "2:4", "linear", "step", "gptq", "re:(", "", "mlp"]),
    ),
    lambda children: st.one_of(
        st.lists(children, max_size=3),
        st.dictionaries(st.sampled_from(KEYS), children),
    ),
    max_leaves=6,
)


@QUIET
@given(data=st.data())
def test_any_value_at_any_key(data: st.DataObject) -> None:
    document: Any = load_rules(data.draw(st.sampled_from(NAMES))).as_dict()
    place = document
    while True:
        keys = list(place) if isinstance(place, dict) else list(range(len(place)))
        key = data.draw(st.sampled_from(keys))
        deeper = isinstance(place[key], dict | list) and len(place[key]) > 0
        if not deeper or data.draw(st.booleans()):
            break
        place = place[key]
    place[key] = data.draw(values)
    check(document)
