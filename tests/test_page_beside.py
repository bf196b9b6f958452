"""The page of two runs: dense, INT8 and INT4 side by side, and what cannot stand side by side."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from gpusq_compile import compile_model
from tests.browser import Page, chromium, find_chromium
from tests.command_line import report_here
from tests.models import TinyPyramid, images, seeded
from tests.test_page import Elements
from tests.test_report_cli import opened

PROGRAM = find_chromium()
PICTURES = images(3, size=(2, 32, 32))
LABELS = torch.tensor([3, 1, 2])
PLACES = 4
"""Patch embedding, two stage ends and the final norm."""


def compiled(output: Path, rules: str, pictures: Tensor, seed: int = 0) -> None:
    compile_model(
        seeded(TinyPyramid, stages=2, seed=seed),
        (PICTURES,),
        rules=rules,
        calibration_data=[PICTURES],
        eval_data=[(pictures, LABELS)],
        output=output,
        finetune=False,
        engine="none",
    )


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Finished runs: INT8 and INT4 of one model, INT8 of another on other images but for one."""
    folder = tmp_path_factory.mktemp("runs")
    others = torch.cat([PICTURES[:1], images(2, seed=7, size=(2, 32, 32))])
    compiled(folder / "eight", "int8", PICTURES)
    compiled(folder / "four", "int4", PICTURES)
    compiled(folder / "others", "int8", others, seed=5)
    return folder


@pytest.fixture
def report(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    """`gpusq-report ARGS` in this process."""
    return partial(report_here, monkeypatch, capsys)


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    if PROGRAM is None:
        pytest.skip("there is no Chromium (apt: chromium)")
    with chromium(PROGRAM, tmp_path_factory.mktemp("profile")) as found:
        yield found


def test_three_maps_of_each_place_stand_side_by_side(
    runs: Path, tmp_path: Path, report: Any, browser: Page
) -> None:
    file = tmp_path / "both.html"
    done = report(runs / "eight", "--diff", runs / "four", "--page", file)
    assert (done.code, done.out, done.err) == (0, f"{file}\n", "")
    browser.show_as(width=1200)
    browser.open(file)
    assert browser.value("document.title") == "eight beside four · gpusq-compile"
    figures = (
        "[...document.querySelectorAll('.maps figure')].map(f => "
        "[...f.querySelectorAll('.cell')].map(c => [c.textContent, c.firstChild.naturalWidth]))"
    )
    found = browser.value(figures)
    assert len(found) == 3 * PLACES
    assert all([label for label, _ in cells] == ["dense", "INT8", "INT4"] for cells in found)
    assert all(width > 0 for cells in found for _, width in cells)
    said = browser.value("document.querySelector('.maps figure p').textContent")
    assert said.startswith("Grad-CAM, r INT8\u00a00.")
    assert ", INT4\u00a0" in said
    assert browser.value("document.querySelectorAll('#strip svg').length") == 1
    browser.value("document.querySelector('#strip').focus()")
    browser.press("ArrowRight")
    assert "output, INT4" in browser.value("document.querySelector('#strip-said').textContent")
    for width in (390, 1200):
        browser.show_as(width=width, dark=True)
        assert browser.value("document.documentElement.scrollWidth") == width
    assert browser.errors == []
    assert [url for url in browser.requests if not url.startswith(("file:", "data:"))] == []


def test_what_changed_stands_in_tables(runs: Path, tmp_path: Path, report: Any) -> None:
    report(runs / "eight", "--diff", runs / "four", "--page", tmp_path / "both.html")
    html = (tmp_path / "both.html").read_text()
    assert '<th scope="row">applied weight</th><td>int8</td><td>int4</td>' in html
    assert '<th scope="row">packed gemm ratio</th><td>6.4</td><td>12.8</td>' in html


def test_images_that_one_run_alone_looked_at_are_shown_and_said(
    runs: Path, tmp_path: Path, report: Any
) -> None:
    report(runs / "eight", "--diff", runs / "others", "--page", tmp_path / "both.html")
    page = Elements((tmp_path / "both.html").read_text())
    assert (
        "1 image is the same in both runs, by the pixels: eight looked at 3 evaluation images, "
        "others at 3 evaluation images. Runs that are given the same eval_data" in page.text
    )
    # Both are INT8, so the folders' names tell them apart.
    assert "Images that eight alone looked at" in page.text
    assert "Images that others alone looked at" in page.text
    galleries = [a["style"] or "" for _, a in page.tags if a.get("class") == "maps"]
    assert len(galleries) == 5


def test_a_run_without_maps_is_said_with_its_reason(
    runs: Path, tmp_path: Path, report: Any
) -> None:
    shutil.copy(runs / "four" / "report.json", tmp_path)
    file = tmp_path / "both.html"
    done = report(runs / "eight", "--diff", tmp_path, "--page", file)
    assert done.code == 0
    assert done.err.startswith("warning[no-evidence]: ")
    text = Elements(file.read_text()).text
    assert f"INT4 has no maps: evidence.json of {tmp_path.name} is missing or damaged." in text
    assert "Images that INT8 alone looked at" in text


def test_models_that_differ_stand_beside_their_own_dense_maps(
    runs: Path, tmp_path: Path, report: Any
) -> None:
    report(runs / "four", "--diff", runs / "others", "--page", tmp_path / "both.html")
    page = Elements((tmp_path / "both.html").read_text())
    assert "The dense models of four and others have different maps" in page.text
    first = page.text[page.text.index("patch embedding") :]
    assert first.startswith(
        "patch embedding dense of INT4 INT4 dense of INT8 INT8 Grad-CAM, r INT4"
    )


def test_one_runs_page_can_be_written_elsewhere(runs: Path, tmp_path: Path, report: Any) -> None:
    done = report(runs / "eight", "--page", tmp_path / "one.html")
    assert (done.code, done.err) == (0, "")
    assert (tmp_path / "one.html").read_bytes() == (runs / "eight" / "report.html").read_bytes()


def test_a_page_that_cannot_be_written_says_why_and_leaves_nothing(
    runs: Path, tmp_path: Path, report: Any
) -> None:
    (tmp_path / "folder").mkdir()
    for file, reason in (("none/both.html", "No such file"), ("folder", "Is a directory")):
        done = report(runs / "eight", "--diff", runs / "four", "--page", tmp_path / file)
        assert done.code == 2
        assert done.err.startswith("error[page-not-writable]: cannot write ")
        assert reason in done.err
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]


def test_a_page_answers_no_question(runs: Path, tmp_path: Path, report: Any) -> None:
    done = report(runs / "eight", "--page", tmp_path / "one.html", "--timing")
    assert done.code == 2
    assert "error[usage]: --open and --page are of the whole run" in done.err
    assert not (tmp_path / "one.html").exists()


def test_two_things_of_which_one_would_be_left_undone_are_refused(runs: Path, report: Any) -> None:
    eight, four = runs / "eight", runs / "four"
    for extra in (("--why", "head"), ("--remarks", "missed"), ("--timing",)):
        done = report(eight, "--diff", four, *extra)
        assert (done.code, done.out) == (2, "")
        assert "error[usage]: --diff compares whole runs" in done.err
        done = report(eight, "--format", "github", *extra)
        assert (done.code, done.out) == (2, "")
        assert "error[usage]: --format github is of one whole run" in done.err
    assert report(eight, "--diff", four, "--format", "github").code == 2


def test_of_two_runs_the_damaged_one_is_named(runs: Path, tmp_path: Path, report: Any) -> None:
    content = json.loads((runs / "four/report.json").read_text())
    for number, layer in enumerate(content["layers"]):
        layer["name"] = number
    (tmp_path / "report.json").write_text(json.dumps(content))
    done = report(runs / "eight", "--diff", tmp_path)
    assert done.code == 2
    assert f"error[report-damaged]: {tmp_path / 'report.json'}" in done.err


def test_a_damaged_run_is_named(runs: Path, tmp_path: Path, report: Any) -> None:
    (tmp_path / "report.json").write_text('{"schema_version": 1}')
    done = report(runs / "eight", "--diff", tmp_path, "--page", tmp_path / "both.html")
    assert done.code == 2
    assert f"error[report-damaged]: {tmp_path / 'report.json'}" in done.err


def test_open_shows_both_runs(runs: Path, tmp_path: Path) -> None:
    shutil.copytree(runs / "eight", tmp_path / "eight")
    run, address = opened(tmp_path / "eight", tmp_path, "--diff", str(runs / "four"))
    page = tmp_path / "eight" / "report-beside-four.html"
    assert (run.code, run.out, run.err) == (0, f"{page}\n", "")
    assert address == page.as_uri()
    assert "eight beside four" in page.read_text()
