"""What a builder's library says of itself, in a process of its own: `python probe.py MODULE`.

The answer on standard output is JSON: `version` and `capabilities` (names such as "sm89"), or
`missing` (whether it is not installed at all) and `error`. Loading the library takes 0.1 GB that
a compilation would hold to its end, and a broken one may end its process. This file imports nothing
of the package, so that the child starts without it.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
from typing import Any


def main() -> None:
    # What the library prints must not mix with the answer.
    with os.fdopen(os.dup(1), "w", encoding="utf-8") as answer:
        os.dup2(2, 1)
        json.dump(facts(sys.argv[1]), answer)


def facts(module: str) -> dict[str, Any]:
    try:
        # One API for two libraries without a common typed interface: hence Any.
        trt: Any = importlib.import_module(module)
    # A package without its libraries or driver raises whatever its loader met: OSError,
    # RuntimeError, AttributeError.
    except Exception as error:
        missing = isinstance(error, ModuleNotFoundError) and error.name == module
        said = str(error).split("\n")[0] or type(error).__name__
        return {"missing": missing, "error": said}
    members = getattr(getattr(trt, "ComputeCapability", None), "__members__", ())
    names = sorted((name for name in members if name.startswith("SM")), key=lambda n: int(n[2:]))
    return {"version": trt.__version__, "capabilities": [name.lower() for name in names]}


if __name__ == "__main__":
    main()
