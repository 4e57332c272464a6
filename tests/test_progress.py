"""Progress: silent for files and short work, a line with rate and time left on a terminal."""

from __future__ import annotations

import io
import itertools

import pytest

import knnext.progress as module
from knnext.progress import Progress, format_duration, progress


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """A clock that tests set by hand."""
    now = [100.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    return now


def test_silent_when_not_a_terminal(clock: list[float]) -> None:
    out = io.StringIO()
    for _ in progress(range(5), "reading", file=out):
        clock[0] += 10
    assert out.getvalue() == ""


def test_a_closed_stream_is_no_terminal() -> None:
    out = io.StringIO()
    out.close()
    with progress(3, file=out) as bar:
        bar.update()


def test_silent_for_the_first_two_seconds(clock: list[float]) -> None:
    out = Terminal()
    with progress(10, "reading", file=out) as bar:
        for _ in range(10):
            clock[0] += 0.19
            bar.update()
    assert out.getvalue() == ""


def test_line_after_two_seconds_and_erased_at_the_end(clock: list[float]) -> None:
    out = Terminal()
    with progress(200, "reading", unit="rows", file=out) as bar:
        clock[0] += 2.0
        bar.update(50)
        line = out.getvalue()
        assert line == "\r\x1b[Kreading:   25%  50/200 rows  25 rows/s  6 s left"
        clock[0] += 0.05
        bar.update(1)
        assert out.getvalue() == line  # not more often than ten times a second
        clock[0] += 0.06
        bar.update(1)
        assert "52/200" in out.getvalue()
    assert out.getvalue().endswith("\r\x1b[K")


def test_without_a_total_there_is_no_estimate() -> None:
    bar = Progress(None, "scanning", "files", file=Terminal())
    bar.done = 1234
    assert bar.line(100.0) == "scanning:  1,234 files  12 files/s  1:40"
    bar.done = 0
    assert bar.line(0.0).endswith("0 s")


def test_what_was_done_before_says_nothing_of_the_rate(clock: list[float]) -> None:
    """A build that goes on after its first nine tenths is not ten times as fast."""
    bar = Progress(1000, "build", "tokens", done=900, file=Terminal())
    bar.update(50)
    assert bar.line(10.0) == "build:   95%  950/1,000 tokens  5.00 tokens/s  10 s left"


def test_more_than_expected_stays_at_the_end() -> None:
    bar = Progress(10, file=Terminal())
    bar.done = 15
    assert "100%" in bar.line(5.0) and "0 s left" in bar.line(5.0)


def test_lines_fit_the_terminal(clock: list[float], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "20")
    out = Terminal()
    with progress(10, "a long description of the work", file=out) as bar:
        clock[0] += 3
        bar.update()
        assert len(out.getvalue()) == len("\r\x1b[K") + 19


def test_items_pass_through_and_sizes_are_taken(clock: list[float]) -> None:
    out = Terminal()
    items = []
    for item in progress([1, 2, 3, 4], "x", file=out):
        clock[0] += 2
        items.append(item)
    assert items == [1, 2, 3, 4] and "2/4" in out.getvalue()
    out = Terminal()
    for _ in progress(itertools.repeat(0, 3), total=3, file=out):
        clock[0] += 2
    assert "2/3" in out.getvalue()


def test_erased_when_the_work_fails(clock: list[float]) -> None:
    out = Terminal()
    with pytest.raises(RuntimeError), progress(5, file=out) as bar:
        clock[0] += 3
        bar.update()
        raise RuntimeError
    assert out.getvalue().endswith("\r\x1b[K")


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.2, "0 s"), (59.4, "59 s"), (59.6, "1:00"), (185, "3:05"), (7209, "2:00:09")],
)
def test_durations(seconds: float, text: str) -> None:
    assert format_duration(seconds) == text
