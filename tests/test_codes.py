"""Every code has a page that says what it means and the way out, and no page is of a code that is
gone."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from gpusq_compile.codes import ADVICE, FOLDER, KINDS, Page, page, pages, reference_text, shown
from gpusq_compile.codes.__main__ import REFERENCE_PATH
from gpusq_compile.errors import InputError
from gpusq_compile.language.problems import CODES
from tests.code_scan import kinds_of, scan

USES, UNKNOWN = scan()
TEMPLATE = """\
## {code}

*{kinds}*

What it means.

    {code}: the message as it is shown

What to do: the way out.
"""


def test_the_scan_understands_every_place_where_a_code_is_given() -> None:
    assert UNKNOWN == [], "give the code as a text, a constant, or a parameter called `code`"


def test_every_code_of_the_source_has_a_page() -> None:
    kinds = kinds_of(USES)
    lacking = sorted(set(kinds) - set(pages()))
    example = (
        TEMPLATE.format(code=lacking[0], kinds=", ".join(sorted(kinds[lacking[0]])))
        if lacking
        else ""
    )
    assert lacking == [], f"add a section to a file in {FOLDER}:\n\n{example}"


def test_no_page_is_of_a_code_that_is_gone() -> None:
    gone = sorted(set(pages()) - set(kinds_of(USES)))
    assert gone == [], "remove these pages, or correct their headings"


def test_no_code_has_two_pages() -> None:
    headings = [
        line
        for path in FOLDER.glob("*.md")
        for line in path.read_text().splitlines()
        if line.startswith("## ")
    ]
    assert len(headings) == len(set(headings))


def test_the_codes_of_the_language_are_among_them() -> None:
    assert set(CODES) <= set(pages())


@pytest.mark.parametrize("code", sorted(pages()))
def test_a_page_says_what_the_code_is_with_an_example_and_the_way_out(code: str) -> None:
    found: Page = pages()[code]
    assert found.kinds == tuple(sorted(kinds_of(USES)[code]))
    meaning, *_, way_out = found.text.split("\n\n")
    assert re.match(r"[A-Z`]", meaning)
    assert way_out.startswith(ADVICE)
    assert len(way_out) > len(ADVICE) + 6
    examples = re.findall(r"^    \S.*$", found.text, flags=re.MULTILINE)
    assert examples, "no line is indented by four spaces"
    errors = {"input error", "check failed", "internal error"}
    if set(found.kinds) <= errors:
        assert f"error[{code}]: " in "".join(examples)
    for line in found.text.splitlines():
        assert len(line) <= 110


@pytest.mark.parametrize("text", ["max-drop", "error[max-drop]", "[max-drop]:", " max-drop "])
def test_a_code_is_found_as_it_is_copied_from_a_terminal(text: str) -> None:
    assert page(text).name == "max-drop"
    assert shown(page(text)).startswith("max-drop\n")


def test_an_unknown_code_names_the_nearest() -> None:
    with pytest.raises(InputError, match="max-drp") as caught:
        page("max-drp")
    assert caught.value.code == "unknown-code"
    assert "did you mean 'max-drop'?" in str(caught.value.hint)


def test_a_page_says_what_its_kinds_mean() -> None:
    text = shown(page("max-drop"))
    for kind in ("check failed", "input error"):
        assert f"  {kind}: {KINDS[kind]}" in text


def test_the_document_of_all_codes_is_current() -> None:
    assert REFERENCE_PATH.read_text() == reference_text(), "python -m gpusq_compile.codes"


@pytest.mark.parametrize(
    ("source", "codes"),
    [
        ("raise InputError('one', 'text')", ["one"]),
        ("X = 'one'\nraise InputError(X, 'text')", ["one"]),
        ("missed('one' if a else 'two', 'text')", ["one", "two"]),
        ("def f(code, text): raise InputError(code, text)\nf('one', '')", ["one"]),
        (
            "def f():\n    code = {'a': 'one', 'b': 'two'}[key]\n    missed(code, '')",
            ["one", "two"],
        ),
        ("class E(GpusqError): pass\nE('one', '')", ["one"]),
        ("notes.append(('one', 'text'))", ["one"]),
        ("def f():\n    note = missed if a else missed\n    note('one', '')", ["one"]),
        ("print('no-code')", []),
    ],
)
def test_the_scan_finds_codes_however_they_are_given(
    source: str, codes: list[str], tmp_path: Path
) -> None:
    head = (
        "class GpusqError(Exception):\n    def __init__(self, code, message): ...\n"
        "class InputError(GpusqError): pass\n"
        "def missed(code, reason): ...\n"
    )
    (tmp_path / "module.py").write_text(head + source)
    uses, unknown = scan([tmp_path / "module.py"])
    assert sorted(use.code for use in uses) == codes
    assert unknown == []


def test_the_scan_says_where_it_cannot_tell(tmp_path: Path) -> None:
    (tmp_path / "module.py").write_text(
        "def missed(code, reason): ...\nmissed(names[0] + 'x', 'text')"
    )
    uses, unknown = scan([tmp_path / "module.py"])
    assert uses == []
    assert unknown == ["module.py:2: missed(names[0] + 'x', 'text')"]
