"""A progress line on stderr for work that takes more than a couple of seconds.

Nothing is printed when stderr is not a terminal, so logs and pipes stay clean, nor where the logger
"knnext" is set to WARNING or above, nor in the first `DELAY` seconds, so short work stays silent.
The line is rewritten in place at most ten times a second and erased at the end.
"""

from __future__ import annotations

import logging
import os
import shutil
import sys
import time
from collections.abc import Iterable, Iterator, Sized
from typing import TextIO, TypeVar, overload

Item = TypeVar("Item")

DELAY = 2.0  # seconds before the first line
INTERVAL = 0.1  # seconds between two lines


class Progress:
    """Counts finished units and shows their rate and the time left.

    Use it as a context manager and call `update` with the units done since the last call.

    Args:
        total: units expected, or None where nobody knows; without it no end is estimated.
        done: units that were finished before, which say nothing of the rate.
        desc: what is being done, shown first in the line.
        unit: what is counted, for instance `"tokens"`.
        file: a text stream, stderr by default. One that is not a terminal gets nothing.
    """

    def __init__(
        self,
        total: int | None = None,
        desc: str = "",
        unit: str = "it",
        *,
        done: int = 0,
        file: TextIO | None = None,
    ) -> None:
        self.total, self.desc, self.unit = total, desc, unit
        self.done = self._before = done
        self._file = sys.stderr if file is None else file
        hushed = logging.getLogger("knnext").level > logging.INFO
        self._enabled = _is_terminal(self._file) and not hushed
        self._start = time.monotonic()
        self._last_line = self._start
        self._shown = False

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def update(self, count: int = 1) -> None:
        """Add `count` finished units and redraw the line if it is due."""
        self.done += count
        if not self._enabled:
            return
        now = time.monotonic()
        if now - self._start >= DELAY and now - self._last_line >= INTERVAL:
            self._last_line = now
            self._write(self.line(now - self._start))

    def line(self, elapsed: float) -> str:
        """The text shown after `elapsed` seconds."""
        rate = (self.done - self._before) / elapsed if elapsed > 0 else 0.0
        parts = [f"{self.desc}:"] if self.desc else []
        if self.total:
            parts.append(f"{min(100, 100 * self.done // self.total):3d}%")
            parts.append(f"{self.done:,}/{self.total:,} {self.unit}")
        else:
            parts.append(f"{self.done:,} {self.unit}")
        parts.append(f"{_format_rate(rate)} {self.unit}/s")
        if self.total and rate > 0:
            left = max(self.total - self.done, 0) / rate
            parts.append(f"{format_duration(left)} left")
        else:
            parts.append(format_duration(elapsed))
        return "  ".join(parts)

    def close(self) -> None:
        """Erase the line. The counter may still be read."""
        if self._shown:
            self._put("\r\x1b[K")
        self._shown = self._enabled = False

    def _write(self, text: str) -> None:
        width = shutil.get_terminal_size().columns - 1  # a full row would wrap and not erase
        self._shown = self._put(f"\r\x1b[K{text[:width]}")

    def _put(self, text: str) -> bool:
        """Whether it could be written: a terminal that has gone must not end the work."""
        try:
            self._file.write(text)
            self._file.flush()
        except (OSError, ValueError):  # ValueError: closed, or no sign for a character
            self._enabled = False
        return self._enabled


@overload
def progress(
    items: Iterable[Item],
    desc: str = "",
    *,
    total: int | None = None,
    unit: str = "it",
    file: TextIO | None = None,
) -> Iterator[Item]: ...
@overload
def progress(
    items: int | None = None,
    desc: str = "",
    *,
    total: int | None = None,
    unit: str = "it",
    file: TextIO | None = None,
) -> Progress: ...
def progress(
    items: Iterable[Item] | int | None = None,
    desc: str = "",
    *,
    total: int | None = None,
    unit: str = "it",
    file: TextIO | None = None,
) -> Iterator[Item] | Progress:
    """Show the progress of a loop, or of work counted by hand.

    `for x in progress(items, "reading"):` counts the items passed through. With a number (or
    None, where the total is unknown) it returns a `Progress` to `update` by hand.
    """
    if items is None or isinstance(items, int):
        return Progress(items if total is None else total, desc, unit, file=file)
    if total is None and isinstance(items, Sized):
        total = len(items)
    return _count(items, Progress(total, desc, unit, file=file))


def format_duration(seconds: float) -> str:
    """`7 s`, `3:05` or `2:00:09`."""
    whole = round(seconds)
    minutes, secs = divmod(whole, 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours}:{minutes:02d}:{secs:02d}"
    return f"{minutes}:{secs:02d}" if minutes else f"{secs} s"


def _count(items: Iterable[Item], bar: Progress) -> Iterator[Item]:
    with bar:
        for item in items:
            yield item
            bar.update()


def _format_rate(rate: float) -> str:
    return f"{rate:,.0f}" if rate >= 10 else f"{rate:.2f}"


def _is_terminal(file: TextIO) -> bool:
    if os.environ.get("RANK", "0") != "0":
        return False  # of ranks that share a terminal, the first draws
    try:
        return file.isatty()
    except (AttributeError, ValueError):  # closed, or a minimal stand-in for a stream
        return False
