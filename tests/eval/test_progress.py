"""Progress of a run, with a clock that the test moves."""

import io
import sys

import pytest

from vtc.eval import progress as module
from vtc.eval.progress import Progress


class Clock:
    now = 1000.0

    def monotonic(self):
        return self.now


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(module, "time", clock)
    return clock


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_elsewhere_than_on_a_terminal_it_writes_a_line_each_half_minute_to_stderr(clock, capsys):
    with Progress("GQA none", total=100, done=40) as progress:
        for _ in range(8):
            clock.now += 10
            progress.advance(2)
    out, err = capsys.readouterr()
    assert out == ""
    assert err.splitlines() == [
        "GQA none: 60 of 100 questions to go",
        "GQA none: 46 of 100, 0.20 questions/s, 0:04:30 left",
        "GQA none: 52 of 100, 0.20 questions/s, 0:04:00 left",
    ]


def test_the_rate_counts_this_run_only(clock):
    progress = Progress("t", total=100, done=90)
    assert progress.line() == "t: 90 of 100, 0.00 questions/s"
    clock.now += 4
    progress.advance(1)
    assert progress.line() == "t: 91 of 100, 0.25 questions/s, 0:00:36 left"


def test_time_left_has_hours(clock):
    progress = Progress("t", total=10_000)
    clock.now += 1
    progress.advance(1)
    assert progress.line() == "t: 1 of 10000, 1.00 questions/s, 2:46:39 left"


def test_a_complete_run_and_a_quiet_one_write_nothing(clock, capsys):
    with Progress("t", total=5, done=5):
        clock.now += 120
    with Progress("t", total=5, quiet=True) as progress:
        clock.now += 120
        progress.advance(5)
    assert capsys.readouterr() == ("", "")


def test_on_a_terminal_it_is_a_bar_with_count_rate_and_time_left(monkeypatch):
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "100")
    with Progress("GQA none", total=8, done=2) as progress:
        progress.advance(3)
        progress.advance(1)
    text = terminal.getvalue()
    assert "GQA none" in text
    assert "6/8" in text
    assert "/s" in text
    assert "questions to go" not in text


def test_a_quiet_run_has_no_bar_on_a_terminal(monkeypatch):
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    with Progress("t", total=8, quiet=True) as progress:
        progress.advance(8)
    assert terminal.getvalue() == ""
