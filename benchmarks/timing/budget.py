"""What still runs when time gets short."""

from __future__ import annotations

import time
from collections.abc import Callable

from benchmarks.data.cases import ESSENTIAL


class Budget:
    """Counts from when it is made; once `seconds` are spent, rivals are left out. None: never."""

    def __init__(self, seconds: float | None, clock: Callable[[], float] = time.monotonic) -> None:
        self.seconds, self._clock, self._start = seconds, clock, clock()

    def leaves_out(self, implementation: str) -> bool:
        """knnext and what bounds it run to the end: without them the rest says nothing."""
        if self.seconds is None or implementation.startswith(ESSENTIAL):
            return False
        return self._clock() - self._start > self.seconds
