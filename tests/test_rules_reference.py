"""The published schema and reference are current, and every shipped rules file is documented."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from gpusq_compile.language import reference
from gpusq_compile.language.json_schema import SCHEMA_PATH, build_schema, schema_text
from gpusq_compile.language.problems import CODES
from gpusq_compile.language.reference import REFERENCE_PATH, reference_text
from gpusq_compile.rules import shipped_rules

HOW = "run `python -m gpusq_compile.language`"


def test_shipped_json_schema_is_current() -> None:
    assert SCHEMA_PATH.read_text(encoding="utf-8") == schema_text(), HOW


def test_reference_is_current() -> None:
    assert REFERENCE_PATH.read_text(encoding="utf-8") == reference_text(), HOW


@pytest.mark.parametrize("name", shipped_rules())
def test_shipped_rules_are_documented(name: str) -> None:
    text = REFERENCE_PATH.read_text(encoding="utf-8")
    shipped = text.split("## Shipped rule files")[1].split("## Error codes")[0]
    assert (f"### `{name}`\n" if "/" not in name else f"| `{name}` |") in shipped


def test_reference_names_every_code() -> None:
    text = REFERENCE_PATH.read_text(encoding="utf-8")
    assert all(f"- `{code}`: " in text for code in CODES)


def test_links_of_the_reference_lead_to_its_headings() -> None:
    text = REFERENCE_PATH.read_text(encoding="utf-8")
    headings = {
        re.sub(r"[^a-z0-9 -]", "", heading.lower()).replace(" ", "-")
        for heading in re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    }
    assert set(re.findall(r"\]\(#([^)]*)\)", text)) <= headings


@pytest.mark.parametrize(("missing", "name"), [("top", "bare"), ("rule", "bare"), ("top", "a/b")])
def test_shipped_rules_without_their_comments_cannot_be_published(
    missing: str, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "bare.yaml"
    top = "" if missing == "top" else "# What it is for.\n"
    above = "" if missing == "rule" else "  # Why.\n"
    path.write_text(
        f"{top}version: 1\nrules:\n{above}  - id: a\n    match: {{op: add}}\n    distill: none\n"
    )
    monkeypatch.setattr(reference, "shipped_rules", lambda: {name: path})
    with pytest.raises(ValueError, match=r"bare\.yaml"):
        reference_text()


def test_schema_forbids_unknown_keys_everywhere_and_describes_each_key() -> None:
    schema = build_schema()
    blocks = [schema, *schema["$defs"].values()]
    for block in blocks:
        assert block["additionalProperties"] is False
        for key, value in block["properties"].items():
            referred = schema["$defs"].get(value.get("$ref", "").rpartition("/")[2], {})
            assert "description" in {**referred, **value}, key


def test_schema_accepts_the_short_forms() -> None:
    definitions = build_schema()["$defs"]
    match: dict[str, Any] = definitions["Match"]["properties"]
    assert match["op"]["anyOf"][0] == match["op"]["anyOf"][1]["items"]
    assert {"type": "integer", "minimum": 1} in match["in_features"]["anyOf"]
    assert {"const": "none"} in definitions["Phase"]["properties"]["clip_norm"]["anyOf"]
    actions = definitions["Rule"]["properties"]
    assert {"const": "none", "type": "string"} in actions["sparsity"]["oneOf"]
    assert all({"type": "null"} not in actions[key].get("oneOf", []) for key in actions)


def test_module_prints_the_schema_for_editors() -> None:
    command = [sys.executable, "-m", "gpusq_compile.language", "--print"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == build_schema()
