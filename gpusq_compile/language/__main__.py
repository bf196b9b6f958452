"""What is generated from the rules language's models.

python -m gpusq_compile.language           writes rules.schema.json and docs/rules.md
python -m gpusq_compile.language --print   prints the schema
"""

from __future__ import annotations

import sys

from gpusq_compile.language.json_schema import SCHEMA_PATH, schema_text
from gpusq_compile.language.reference import REFERENCE_PATH, reference_text


def main(arguments: list[str]) -> int:
    if arguments == ["--print"]:
        sys.stdout.write(schema_text())
        return 0
    if arguments:
        sys.stderr.write(__doc__ or "")
        return 2
    texts = {SCHEMA_PATH: schema_text()}
    if REFERENCE_PATH.parent.is_dir():
        texts[REFERENCE_PATH] = reference_text()
    for path, text in texts.items():
        path.write_text(text, encoding="utf-8")
        sys.stderr.write(f"wrote {path}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
