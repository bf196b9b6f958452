"""Write report.schema.json: `python -m gpusq_compile.report`."""

from __future__ import annotations

import sys

from gpusq_compile.report.schema import SCHEMA_PATH, schema_text

if __name__ == "__main__":
    SCHEMA_PATH.write_text(schema_text(), encoding="utf-8")
    sys.stderr.write(f"wrote {SCHEMA_PATH}\n")
