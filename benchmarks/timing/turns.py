"""Two calls in turns, on a CPU: what else the machine does meanwhile slows both."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

#: Seconds between looks at whether threads still spin, how much of them counts as none, and looks.
STEP, QUIET, LOOKS = 0.01, 5e-4, 20
MOST_ROUNDS, SECONDS = 11, 1.5


class Turns:
    """Given as the set-up of another call's rounds, it runs `run` before each of them."""

    def __init__(self, run: Callable[[], Any]) -> None:
        self.run = run
        self.seconds: list[float] = []

    def __call__(self) -> None:
        self.seconds.append(timed(self.run))

    def rounds(self, other: Callable[[], Any], least: int) -> int:
        """More where both are short, whose time varies more. Each is called once, to warm up."""
        once = timed(self.run) + timed(other)
        return max(least, min(MOST_ROUNDS, round(SECONDS / once)))

    def ratio(self, times: Sequence[float]) -> float:
        """The median, over the rounds, of the other call's seconds over those just before."""
        ours = self.seconds[-len(times) :]
        return statistics.median(b / a for a, b in zip(ours, times, strict=True))


def settle() -> None:
    """Waits until no thread of this process works.

    Threads of one library spin after its call, on the cores that the next one's want: GCC's OpenMP
    for some milliseconds, SVS's pool for tens of them.
    """
    for _ in range(LOOKS):
        before = time.process_time()
        time.sleep(STEP)
        if time.process_time() - before < QUIET:
            return


def timed(run: Callable[[], Any]) -> float:
    """Seconds, with quiet before and after them."""
    settle()
    start = time.perf_counter()
    run()
    seconds = time.perf_counter() - start
    settle()
    return seconds
