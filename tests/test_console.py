"""Progress: bars with rate and time left on a terminal, plain lines elsewhere, nothing with -q."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from io import StringIO

import pytest
import rich.console

from gpusq_compile.console import Console, rate

Clock = Callable[[float], None]


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """A clock that stands still until it is moved on."""
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])

    def forward(seconds: float) -> None:
        now[0] += seconds

    return forward


def plain(verbosity: int = 0) -> tuple[Console, StringIO]:
    return on(verbosity, terminal=False)


def on(verbosity: int, *, terminal: bool) -> tuple[Console, StringIO]:
    stream = StringIO()
    console = Console(verbosity)
    console.rich = rich.console.Console(
        file=stream, quiet=verbosity < 0, highlight=False, width=80, force_terminal=terminal
    )
    return console, stream


def test_a_line_every_ten_seconds_says_how_far_how_fast_and_how_long_yet(clock: Clock) -> None:
    console, stream = plain()
    with console.progress("fine-tune sparse", 100) as advance:
        for _ in range(50):
            clock(1.0)
            advance("loss 0.5")
    lines = stream.getvalue().splitlines()
    assert len(lines) == 5
    assert lines[0] == "fine-tune sparse: 10/100, 1.0/s, 90 s left loss 0.5"
    assert lines[-1] == "fine-tune sparse: 50/100, 1.0/s, 50 s left loss 0.5"


def test_what_a_resumed_run_did_before_does_not_count_for_its_rate(clock: Clock) -> None:
    console, stream = plain()
    with console.progress("fine-tune sparse", 100) as advance:
        advance("resumed at step 80", to=80)
        for _ in range(2):
            clock(5.0)
            advance()
    assert stream.getvalue() == "fine-tune sparse: 82/100, 5.0 s each, 90 s left\n"


def test_what_nobody_knows_the_end_of_has_no_time_left(clock: Clock) -> None:
    console, stream = plain()
    with console.progress("evaluate dense", None) as advance:
        clock(20.0)
        advance()
    assert stream.getvalue() == "evaluate dense: 1/?, 20.0 s each\n"


def test_what_was_measured_on_the_way_stands_beside_the_steps(clock: Clock) -> None:
    console, stream = plain()
    with console.progress("fine-tune sparse", 4) as advance:
        console.note("top1 0.95")
        clock(11.0)
        advance("loss 0.5")
    with console.progress("fine-tune quantize", 4) as advance:
        clock(11.0)
        advance("loss 0.4")
    first, second = stream.getvalue().splitlines()
    assert first.endswith("loss 0.5; top1 0.95")
    assert second.endswith("loss 0.4"), "it was of the phase before"


def test_what_takes_long_without_steps_is_named_when_it_is_done(clock: Clock) -> None:
    console, stream = plain()
    with console.busy("importing torch"):
        clock(25.0)
    with console.busy("trace", said=True):
        clock(25.0)
    with console.busy("mark", said=True):
        clock(1.0)
    assert stream.getvalue() == "trace: 25 s\n"


def test_quiet_shows_no_progress(clock: Clock) -> None:
    console, stream = plain(-1)
    with console.busy("trace"), console.progress("calibrate", 8) as advance:
        clock(100.0)
        advance()
    assert stream.getvalue() == ""


def test_a_terminal_gets_a_bar_with_its_text_and_note() -> None:
    console, stream = on(0, terminal=True)
    with console.busy("finetune_sparse"), console.progress("fine-tune sparse", 2) as advance:
        console.note("top1 0.95")
        advance("loss 0.5")
        advance("loss 0.4")
    shown = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", stream.getvalue())
    assert "fine-tune sparse" in shown
    assert "2/2" in shown
    assert "loss 0.4; top1 0.95" in shown


def test_a_progress_within_another_has_a_bar_of_its_own() -> None:
    """As an evaluation within a phase of the fine-tune has."""
    console, stream = on(0, terminal=True)
    with console.progress("fine-tune sparse", 2) as outer:
        outer("first")
        with console.progress("evaluate", 3) as inner:
            inner("second")
        outer("third")
    shown = stream.getvalue()
    assert "evaluate" in shown
    assert "third" in shown


def test_bars_fit_80_columns() -> None:
    console, stream = on(0, terminal=True)
    with console.progress("fine-tune quantize", 12345) as advance:
        advance("x" * 200, to=12340)
        advance("x" * 200)
    lines = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "\n", stream.getvalue()).splitlines()
    assert max(len(line) for line in lines) <= 80
    assert any("12341/12345" in line for line in lines)


@pytest.mark.parametrize(
    ("speed", "text"),
    [(12.34, "12.3/s"), (1.0, "1.0/s"), (0.5, "2.0 s each"), (0.01, "100.0 s each")],
)
def test_a_rate_is_said_in_the_larger_number(speed: float, text: str) -> None:
    assert rate(speed) == text


def test_no_color_and_no_terminal_are_plain(monkeypatch: pytest.MonkeyPatch) -> None:
    console, stream = plain()
    console.warn("[b]odd[/b] name")
    assert stream.getvalue() == "warning: [b]odd[/b] name\n"
    monkeypatch.setenv("NO_COLOR", "1")
    console, stream = on(0, terminal=True)
    console.warn("text")
    assert "\x1b[33m" not in stream.getvalue()
