"""report.html in headless Chromium: it sorts, searches, unfolds, and fits a phone, by mouse and by
keyboard, without a word on the console."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from gpusq_compile.report.html import write_page
from tests.browser import Page, chromium, find_chromium
from tests.pages import many

PROGRAM = find_chromium()
pytestmark = pytest.mark.skipif(PROGRAM is None, reason="there is no Chromium (apt: chromium)")

NAMES = (
    "[...document.querySelectorAll('tr[data-index]:not([hidden]) .name')].map(b => b.textContent)"
)
SORTED = "[...document.querySelectorAll('th[aria-sort]')].map(h => h.ariaSort)"
FOCUSED = "document.activeElement.textContent.trim() || document.activeElement.id"


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    assert PROGRAM is not None
    with chromium(PROGRAM, tmp_path_factory.mktemp("profile")) as found:
        yield found


@pytest.fixture
def tab(browser: Page, tmp_path: Path) -> Iterator[Page]:
    """A page of 120 layers, each tenth of them refused."""
    write_page(tmp_path / "report.html", *many(120))
    browser.show_as(width=1200)
    browser.open(tmp_path / "report.html")
    yield browser
    assert browser.errors == []


def test_it_opens_without_a_request_or_a_word_on_the_console(tab: Page) -> None:
    assert [url for url in tab.requests if not url.startswith(("file:", "data:"))] == []
    assert tab.value("document.querySelector('#layer-count').textContent") == "120 layers"


def test_a_click_on_a_head_sorts_and_another_one_turns_it(tab: Page) -> None:
    tab.click("th:nth-child(8) button")
    sizes = "[...document.querySelectorAll('.c-size')].map(c => Number(c.dataset.value))"
    known = [size for size in tab.value(sizes) if size]
    assert known == sorted(known)
    assert tab.value(SORTED)[7] == "ascending"
    tab.click("th:nth-child(8) button")
    found = tab.value(sizes)
    assert [size for size in found if size] == sorted(known, reverse=True)
    assert tab.value(SORTED) == ["none"] * 7 + ["descending", "none"]
    # What is not known is last, whichever way.
    assert found[-12:] == [0] * 12


def test_names_sort_by_their_numbers(tab: Page) -> None:
    tab.click("th:nth-child(2) button")
    assert tab.value(NAMES) == [f"blocks.{index}.mlp.fc1" for index in range(120)]


def test_the_search_finds_words_in_any_column(tab: Page) -> None:
    tab.click("#layer-search")
    tab.write("columns blocks.1")
    assert tab.value(NAMES) == ["blocks.10.mlp.fc1", "blocks.100.mlp.fc1", "blocks.110.mlp.fc1"]
    assert tab.value("document.querySelector('#layer-count').textContent") == "3 of 120 layers"
    tab.write(" nowhere")
    assert tab.value(NAMES) == []
    assert tab.value("document.querySelector('#layer-none').hidden") is False


def test_the_state_filters(tab: Page) -> None:
    tab.value(
        "(() => { const s = document.querySelector('#layer-state'); s.value = 'refused';"
        "s.dispatchEvent(new Event('change')); })()"
    )
    assert len(tab.value(NAMES)) == 12


def test_a_name_unfolds_by_keyboard_alone(tab: Page) -> None:
    for _ in range(60):
        tab.press("Tab")
        if tab.value(FOCUSED) == "blocks.1.mlp.fc1":
            break
    assert tab.value(FOCUSED) == "blocks.1.mlp.fc1"
    assert tab.value("getComputedStyle(document.activeElement).outlineStyle") == "solid"
    tab.press("Enter")
    details = "document.querySelector('tr.details')?.textContent"
    assert "2:4 keeps 93.5% of the energy" in tab.value(details)
    assert "output against the dense layer's 19.9 dB" in tab.value(details)
    assert tab.value("document.querySelectorAll('tr.details .hist path').length") == 2
    tab.press("Enter")
    assert tab.value(details) is None


def test_a_head_sorts_by_keyboard(tab: Page) -> None:
    tab.value("document.querySelector('th:nth-child(7) button').focus()")
    tab.press("Space")
    assert tab.value(SORTED)[6] == "ascending"
    assert tab.value(NAMES)[0] == "blocks.119.mlp.fc1"


def test_the_strip_reads_out_a_layer_by_arrow_keys(tab: Page) -> None:
    tab.value("document.querySelector('#strip').focus()")
    tab.press("ArrowRight")
    tab.press("ArrowRight")
    said = tab.value("document.querySelector('#strip-said').textContent")
    assert said.startswith("blocks.2.mlp.fc1: pruning 10.0 dB, weight rounding 42.0 dB")


@pytest.mark.parametrize("width", [360, 390, 820, 1200])
def test_nothing_is_wider_than_the_window(tab: Page, width: int) -> None:
    tab.show_as(width=width)
    assert tab.value("document.documentElement.scrollWidth") == width


def test_dark_mode_changes_the_ground_and_keeps_the_contrast(tab: Page) -> None:
    ground = "getComputedStyle(document.body).backgroundColor"
    light = tab.value(ground)
    tab.show_as(width=1200, dark=True)
    assert tab.value(ground) != light
    ink = tab.value("getComputedStyle(document.body).color")
    assert contrast(tab.value(ground), ink) > 7
    muted = tab.value("getComputedStyle(document.querySelector('.note')).color")
    assert contrast(tab.value(ground), muted) > 4.5


def contrast(one: str, other: str) -> float:
    """The contrast ratio of two colours `rgb(r, g, b)` by WCAG 2.2, "contrast ratio"."""
    bright, dark = sorted((luminance(one), luminance(other)), reverse=True)
    return (bright + 0.05) / (dark + 0.05)


def luminance(color: str) -> float:
    parts = [int(part) / 255 for part in color.removeprefix("rgb(").removesuffix(")").split(",")]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
