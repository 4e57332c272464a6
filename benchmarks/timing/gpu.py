"""GPU time by events and graph replays, and how pytest-benchmark comes to hold it.

The device is timed, never the host: a round records an event, issues its calls, records another,
waits, and moves a clock forward by what the device says passed, divided by the calls. That clock is
pytest-benchmark's timer, so its statistics are of GPU time. Three habits keep the figures honest:

- inputs and outputs rotate over buffers that together exceed twice the L2 cache;
- calls shorter than a millisecond are replayed from a CUDA graph where the implementation can be
  captured, since the host issues such calls slower than the device runs them;
- warm-up is by time and not by count, because clocks and power take seconds to settle.
"""

from __future__ import annotations

import math
import statistics
import warnings
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import cycle, islice
from typing import Any

import torch

Run = Callable[[], Any]

SPIN_UP_SECONDS = 2.0  # once a session: an idle GPU runs at a fraction of its clock
WARM_UP_SECONDS = 0.1
ROUND_SECONDS = 2e-3  # events resolve half a microsecond: a round of this is good to 0.1 %
GRAPH_BELOW = 1e-3
MEASURED_SECONDS = 0.25
MAX_CALLS = 4096
LONG_SECONDS = 0.5


class _Clock:
    seconds = 0.0
    spun_up = False


def gpu_clock() -> float:
    """Device seconds so far. Only finished rounds move it."""
    return _Clock.seconds


def calls_per_round(seconds: float, sets: int) -> int:
    """Whole turns of the buffers that fill a round, bounded by what a graph holds with ease."""
    turns = math.ceil(ROUND_SECONDS / max(seconds, 1e-7) / sets)
    return sets * max(1, min(turns, MAX_CALLS // sets))


def rounds_for(round_seconds: float) -> int:
    """A quarter of a second's worth, from 5 to 50; two where one round takes a second or more."""
    if round_seconds >= 2 * LONG_SECONDS:
        return 2
    return min(50, max(5, round(MEASURED_SECONDS / max(round_seconds, 1e-6))))


def device_seconds(issue: Run) -> float:
    """Seconds the device takes from before to after what `issue` puts on the current stream."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    issue()
    end.record()
    end.synchronize()
    return 1e-3 * start.elapsed_time(end)


def spin_up(seconds: float = SPIN_UP_SECONDS) -> None:
    """Brings clock and power up with matrix products on random data; once a process."""
    if _Clock.spun_up:
        return
    a = torch.randn(4096, 4096, device="cuda").half()
    keep_busy(lambda: a @ a, seconds)
    _Clock.spun_up = True


def keep_busy(run: Run, seconds: float) -> None:
    spent = 0.0
    while spent < seconds:
        spent += device_seconds(run)


@dataclass
class GpuSampler:
    """Times a call that has one closure for each set of buffers.

    After `prepare`, `round` runs one round and moves the clock by the seconds of one call.
    """

    runs: Sequence[Run]
    capturable: bool = False
    calls: int = 0
    rounds: int = 0
    graph: torch.cuda.CUDAGraph | None = None
    _next: Any = field(default=None, repr=False)
    _results: deque[Any] = field(default_factory=deque, repr=False)

    def prepare(self) -> GpuSampler:
        spin_up()
        # Results live for a turn, so that outputs rotate like inputs.
        self._results = deque(maxlen=len(self.runs))
        self._next = cycle(self.runs)
        self.calls = len(self.runs)
        seconds = device_seconds(self._issue) / self.calls
        if seconds < LONG_SECONDS:  # the first turn may have set things up
            seconds = device_seconds(self._issue) / self.calls
        self.calls = calls_per_round(seconds, len(self.runs))
        if self.capturable and seconds < GRAPH_BELOW:
            self._capture()
        round_seconds = seconds * self.calls
        if round_seconds < LONG_SECONDS:  # a longer round has warmed up by its first call
            keep_busy(self._issue_round, WARM_UP_SECONDS)
            round_seconds = device_seconds(self._issue_round)
        self.rounds = rounds_for(round_seconds)
        return self

    @property
    def timing(self) -> str:
        return "graph" if self.graph is not None else "events"

    def round(self) -> None:
        _Clock.seconds += device_seconds(self._issue_round) / self.calls

    def seconds(self, rounds: int | None = None) -> float:
        """The median of a few rounds, apart from pytest-benchmark."""
        count = min(self.rounds, rounds or self.rounds)
        return statistics.median(
            device_seconds(self._issue_round) / self.calls for _ in range(count)
        )

    def _issue(self) -> None:
        for run in islice(self._next, self.calls):
            self._results.append(run())

    def _issue_round(self) -> None:
        self._issue() if self.graph is None else self.graph.replay()

    def _capture(self) -> None:
        graph, stream = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
        torch.cuda.synchronize()
        try:
            with torch.cuda.graph(graph):
                self._issue()
        except RuntimeError as error:  # it waits for the device after all: events time it then
            torch.cuda.set_stream(stream)  # torch 2.11 leaves the capture's own one current
            warnings.warn(f"no graph: {str(error).splitlines()[0]}", stacklevel=2)
        else:
            self.graph = graph
        self._results.clear()
