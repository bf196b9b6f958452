"""Bad rules files, and what each must end with."""

from __future__ import annotations

import textwrap
from pathlib import Path
from typing import Any

import pytest

from gpusq_compile.errors import EXIT_BAD_INPUT, InputError
from gpusq_compile.language.loader import load_rules
from gpusq_compile.language.problems import CODES, InputErrors

LINEAR = "id: a\nmatch: {op: linear}\n"

Case = tuple[str, str, int | None, int | None, str, str]
"""The file's text, code, line, column, part of the message, part of the hint."""


def failure(spec: Any) -> InputError:
    with pytest.raises(InputError) as caught:
        load_rules(spec)
    error = caught.value
    assert error.exit_code == EXIT_BAD_INPUT
    assert error.code in CODES
    return error


def rule(text: str, **rest: str) -> str:
    """A file with one rule, whose lines start in line 3 column 5."""
    return "version: 1\nrules:\n  - " + textwrap.indent(textwrap.dedent(text), " " * 4).lstrip()


def phase(text: str, name: str = "sparse") -> str:
    """A file without rules, with one block of the fine-tune in line 4."""
    return f"version: 1\nrules: []\nfinetune:\n  {name}: {text}\n"


def check_case(case: Case, folder: Path) -> None:
    """A file of that text in `folder` ends with that error and no other."""
    text, code, line, column, message, hint = case
    path = folder / "rules.yaml"
    path.write_text(text, encoding="utf-8")
    error = failure(path)
    assert not isinstance(error, InputErrors), str(error)
    assert error.location is not None
    place = (error.location.line, error.location.column)
    assert (error.code, *place) == (code, line, column), str(error)
    assert error.location.file.endswith("rules.yaml")
    assert message in error.message, str(error)
    assert hint in (error.hint or ""), str(error)
    assert f"error[{code}]" in str(error)
    for jargon in ("<block>", "union", "pydantic", "Input should", "tag:yaml", "NoneType"):
        assert jargon not in str(error)
