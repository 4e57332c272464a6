"""Two calls in turns, on a CPU: what else the machine does meanwhile slows both."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

#: Threads of one library spin for some milliseconds after their work, on the cores that the next
#: one's want; this outlasts it.
PAUSE = 0.02
MOST_ROUNDS, SECONDS = 11, 1.0


class Turns:
    """Given as the set-up of another call's rounds, it runs `run` before each of them."""

    def __init__(self, run: Callable[[], Any]) -> None:
        self.run = run
        self.seconds: list[float] = []
        self()

    def __call__(self) -> None:
        time.sleep(PAUSE)
        start = time.perf_counter()
        self.run()
        self.seconds.append(time.perf_counter() - start)
        time.sleep(PAUSE)

    def rounds(self, least: int) -> int:
        """More of a call that is short, since its time varies more."""
        return max(least, min(MOST_ROUNDS, round(SECONDS / self.seconds[0])))

    def ratio(self, times: Sequence[float]) -> float:
        """The median, over the rounds, of the other call's seconds over those just before."""
        ours = self.seconds[-len(times) :]
        return statistics.median(b / a for a, b in zip(ours, times, strict=True))
