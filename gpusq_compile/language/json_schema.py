"""The JSON schema of the rules language, for completion and checks in an editor.

python -m gpusq_compile.language.json_schema           writes rules.schema.json and docs/rules.md
python -m gpusq_compile.language.json_schema --print   prints the schema
"""

from __future__ import annotations

import json
import sys
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


def main(arguments: list[str]) -> int:
    if arguments == ["--print"]:
        sys.stdout.write(schema_text())
        return 0
    if arguments:
        sys.stderr.write(__doc__ or "")
        return 2
    from gpusq_compile.language.reference import REFERENCE_PATH, reference_text

    texts = {SCHEMA_PATH: schema_text()}
    if REFERENCE_PATH.parent.is_dir():
        texts[REFERENCE_PATH] = reference_text()
    for path, text in texts.items():
        path.write_text(text, encoding="utf-8")
        sys.stderr.write(f"wrote {path}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
