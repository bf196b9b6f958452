"""What each code means: one page for every error and remark that a person can meet.

The pages are the Markdown files beside this one, a section a code:

    ## the-code

    *input error*

    What it means, in a sentence or two.

        the message as it is shown

    What to do: the way out.

The line in italics says what the code can be, of `KINDS`, separated by commas and in alphabetical
order. Which file a page stands in is for the reader alone. `python -m gpusq_compile.codes` writes
docs/codes.md from them.
"""

from __future__ import annotations

import functools
import re
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

from gpusq_compile.errors import InputError, nearest

FOLDER = Path(__file__).parent
ADVICE = "What to do: "

KINDS = MappingProxyType(
    {
        "analysis": "a remark of a pass, or a warning: something that is good to know",
        "check failed": "an error, exit code 1: the model compiled, and a check or gate failed",
        "input error": "an error, exit code 2: the model, the rules, the data or an option",
        "internal error": "an error, exit code 3: a fault of the compiler",
        "missed": "a remark of a pass: something that was asked for and not done",
        "passed": "a remark of a pass: something that was done",
        "sparse kernel": "why a pruned layer has no sparse kernel in the engine",
    }
)


@dataclass(frozen=True)
class Page:
    """The page of the code `name`. `text` is its Markdown without heading; `file` holds it."""

    name: str
    kinds: tuple[str, ...]
    text: str
    file: str


@functools.cache
def pages() -> MappingProxyType[str, Page]:
    """Every page by its code, file by file in the order in which they are written."""
    found = {}
    for path in sorted(FOLDER.glob("*.md")):
        _, *sections = re.split(r"^## ", path.read_text(encoding="utf-8"), flags=re.MULTILINE)
        for section in sections:
            code, _, body = section.partition("\n")
            kinds, _, text = body.strip().partition("\n")
            names = tuple(kind.strip() for kind in kinds.strip("*").split(","))
            found[code] = Page(code, names, text.strip(), path.name)
    return MappingProxyType(found)


def page(code: str) -> Page:
    """The page of a code, as in `error[CODE]` or in a remark.

    Raises:
        InputError: there is no such code; the hint has the nearest.
    """
    found = pages()
    # What is copied from a terminal has the brackets.
    wanted = code.strip().removeprefix("error").removeprefix("warning").strip("[]:")
    if wanted not in found:
        close = nearest(wanted, found)
        hint = f"did you mean '{close}'? " if close else ""
        raise InputError(
            "unknown-code",
            f"no error or remark has the code '{wanted}'",
            hint=f"{hint}docs/codes.md has all {len(found)}",
        )
    return found[wanted]


def shown(page: Page) -> str:
    """The page as it is read on a terminal."""
    kinds = "\n".join(f"  {kind}: {KINDS[kind]}" for kind in page.kinds)
    return f"{page.name}\n{kinds}\n\n{page.text}\n"


def reference_text() -> str:
    """The text of docs/codes.md."""
    parts = [
        "<!-- Written by `python -m gpusq_compile.codes` from gpusq_compile/codes/*.md. -->",
        "# Codes\n",
        "Every error and every remark has a code that does not change: `error[CODE]` on the\n"
        "terminal, `code` in `report.json`. `gpusq-compile --explain CODE` prints its page.\n",
        *(f"- *{kind}*: {meaning}" for kind, meaning in KINDS.items()),
    ]
    for path in sorted(FOLDER.glob("*.md")):
        text = path.read_text(encoding="utf-8").strip()
        parts.append("\n" + re.sub(r"^#", "##", text, flags=re.MULTILINE))
    return "\n".join(parts) + "\n"
