"""The JSON schema of the rules language, for completion and checks in an editor."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Final

from gpusq_compile.language.schema import RulesFile

SCHEMA_PATH: Final = Path(__file__).resolve().with_name("rules.schema.json")


def build_schema() -> dict[str, Any]:
    """The JSON schema (draft 2020-12) of a rules file."""
    schema = RulesFile.model_json_schema()
    _tidy(schema)
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "gpusq-compile rules, version 1",
        **{key: value for key, value in schema.items() if key != "title"},
    }


def schema_text() -> str:
    """The text of the shipped schema file."""
    return json.dumps(build_schema(), indent=2, ensure_ascii=False) + "\n"


def _tidy(value: Any) -> None:
    """Drop what helps no editor: titles made from key names, and null as a default."""
    if isinstance(value, dict):
        if isinstance(value.get("title"), str):
            del value["title"]
        if "default" in value and value["default"] is None:
            del value["default"]
        if isinstance(value.get("description"), str):
            value["description"] = " ".join(value["description"].split())
    children = value.values() if isinstance(value, dict) else value
    for child in children:
        if isinstance(child, dict | list):
            _tidy(child)
