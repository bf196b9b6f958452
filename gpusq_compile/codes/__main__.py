"""Write docs/codes.md: `python -m gpusq_compile.codes`."""

from __future__ import annotations

import sys
from pathlib import Path

from gpusq_compile.codes import reference_text

REFERENCE_PATH = Path(__file__).resolve().parents[2] / "docs" / "codes.md"


def main() -> int:
    if not REFERENCE_PATH.parent.is_dir():
        sys.stderr.write("docs/codes.md is written in a checkout alone\n")
        return 2
    REFERENCE_PATH.write_text(reference_text(), encoding="utf-8")
    sys.stderr.write(f"wrote {REFERENCE_PATH}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
