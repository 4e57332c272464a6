"""Ranks that search together, simulated event by event: does the formula of a batch hold?

The formula (knnext/planning/search_time.py) adds seconds and takes the larger of two. Here nothing
is added up: every message takes its turn at the port that sends it and at the port that gets it,
every chunk of rows its turn at the link and at the processor, and a batch goes on when all that it
waits for is there. What comes out is when the last answer was merged.
"""

from __future__ import annotations

import heapq
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import count

from knnext.planning.search_time import BatchTime
from knnext.planning.traffic import Traffic

Action = Callable[[], None]
#: Queries or answers, of which batch, for which rank.
Place = tuple[str, int, int]


@dataclass
class Clock:
    """Events in order of time; of equal times, in the order in which they were told."""

    now: float = 0.0
    _events: list[tuple[float, int, Action]] = field(default_factory=list)
    _numbers: count[int] = field(default_factory=count)

    def at(self, time: float, action: Action) -> None:
        heapq.heappush(self._events, (time, next(self._numbers), action))

    def run(self) -> float:
        while self._events:
            self.now, _, action = heapq.heappop(self._events)
            action()
        return self.now


class Engine:
    """Does one thing after another: a port, or the link that brings rows."""

    def __init__(self, clock: Clock) -> None:
        self.clock, self.free = clock, 0.0

    def do(self, seconds: float, then: Action) -> float:
        """From when it is free on; returns when it begins."""
        start = max(self.clock.now, self.free)
        self.free = start + seconds
        self.clock.at(self.free, then)
        return start


@dataclass(frozen=True)
class Wires:
    """Bytes a second between nodes and within one, seconds until a message is there."""

    network: float
    link: float
    latency: float


class Simulation:
    """Batches of queries through `traffic.ranks` ranks, each of which does as `ShardedIndex` does.

    It waits for the queries of all ranks to a batch, sends its own of the next batch, searches,
    sends the answers, waits for those to the batch before, merges them, and goes on.

    Args:
        time: seconds of a batch's parts on one rank; of its exchange only `merge` is read, the
            rest follows from `traffic` and `wires`.
        overlap: False: a batch is merged before the next one is asked.
        spread: each search takes up to so much longer, drawn for each rank and batch.
    """

    def __init__(
        self,
        traffic: Traffic,
        wires: Wires,
        time: BatchTime,
        batches: int,
        *,
        overlap: bool = True,
        spread: float = 0.0,
        seed: int = 0,
    ) -> None:
        self.traffic, self.wires, self.time = traffic, wires, time
        self.batches, self.overlap, self.spread = batches, overlap, spread
        self.clock, self.random = Clock(), random.Random(seed)
        ranks = range(traffic.ranks)
        self.processors = [Engine(self.clock) for _ in ranks]
        self.rows = [Engine(self.clock) for _ in ranks]
        self.orders = [self._order(rank) for rank in ranks]
        #: By rank, wire and direction.
        self.ports: dict[tuple[int, bool, str], Engine] = {}
        #: Messages that are not there yet, and what waits for them.
        self.missing: dict[Place, int] = {}
        self.waiting: dict[Place, Action] = {}
        self.sent = 0.0

    def run(self) -> float:
        """Seconds until every rank has its answers to every batch."""
        for rank in range(self.traffic.ranks):
            self._to_all(rank, self.traffic.to_one, "queries", 0)
            self._begin(rank, 0)
        return self.clock.run()

    # A batch's way

    def _begin(self, rank: int, batch: int) -> None:
        if batch == self.batches:
            if self.overlap:
                self._merge(rank, batch - 1, lambda: None)
            return

        def asked() -> None:
            if self.overlap and batch + 1 < self.batches:
                self._to_all(rank, self.traffic.to_one, "queries", batch + 1)
            self._search(rank, batch)

        self._when_there(("queries", batch, rank), asked)

    def _answer(self, rank: int, batch: int) -> None:
        self._to_all(rank, self.traffic.from_one, "answers", batch)

        def go_on() -> None:
            if not self.overlap and batch + 1 < self.batches:
                self._to_all(rank, self.traffic.to_one, "queries", batch + 1)
            self._begin(rank, batch + 1)

        if self.overlap and batch == 0:
            go_on()
        else:
            self._merge(rank, batch - self.overlap, go_on)

    def _merge(self, rank: int, batch: int, then: Action) -> None:
        def there() -> None:
            self.clock.at(self.clock.now + self.time.merge, then)

        self._when_there(("answers", batch, rank), there)

    # Messages

    def _when_there(self, place: Place, then: Action) -> None:
        """When all other ranks' messages have come."""
        if self.missing.get(place, self.traffic.ranks - 1):
            self.waiting[place] = then
        else:
            then()

    def _arrived(self, place: Place) -> None:
        self.missing[place] = self.missing.get(place, self.traffic.ranks - 1) - 1
        if not self.missing[place] and place in self.waiting:
            self.waiting.pop(place)()

    def _to_all(self, rank: int, num_bytes: float, what: str, batch: int) -> None:
        for other in self.orders[rank]:
            self._send(rank, other, num_bytes, (what, batch, other))

    def _order(self, rank: int) -> list[int]:
        """The others, so that no two ranks send to one at a time: by distance, in both numbers."""
        node_ranks, ranks = self.traffic.ranks_a_node, self.traffic.ranks
        nodes = -(-ranks // node_ranks)

        def distance(other: int) -> tuple[int, int]:
            nodes_on = (other // node_ranks - rank // node_ranks) % nodes
            return nodes_on, (other - rank) % node_ranks

        return sorted((other for other in range(ranks) if other != rank), key=distance)

    def _send(self, rank: int, other: int, num_bytes: float, place: Place) -> None:
        near = rank // self.traffic.ranks_a_node == other // self.traffic.ranks_a_node
        seconds = num_bytes / (self.wires.link if near else self.wires.network)
        out, into = self._port(rank, near, "out"), self._port(other, near, "in")
        self.sent += num_bytes

        def there() -> None:
            self.clock.at(self.clock.now + self.wires.latency, lambda: self._arrived(place))

        def received() -> None:
            into.do(seconds, there)

        # What is sent is received in the same time, if nobody else is sending there.
        start = max(self.clock.now, out.free)
        out.free = start + seconds
        self.clock.at(start, received)

    def _port(self, rank: int, near: bool, way: str) -> Engine:
        return self.ports.setdefault((rank, near, way), Engine(self.clock))

    # Rows

    def _search(self, rank: int, batch: int) -> None:
        search = self.time.search
        slower = 1.0 + self.spread * self.random.random()
        compute, read = slower * search.compute / search.chunks, search.read / search.chunks
        if search.chunks == 1 and search.overlap:  # rows go by while they are searched
            seconds = max(slower * search.compute, search.read)
            self.processors[rank].do(seconds, lambda: self._answer(rank, batch))
            return
        self._chunk(rank, batch, 0, compute, read)

    def _chunk(self, rank: int, batch: int, number: int, compute: float, read: float) -> None:
        """Read a chunk and search it; with overlap the next one is read meanwhile, into a second
        buffer."""
        search, processor = self.time.search, self.processors[rank]
        last = number == search.chunks - 1

        def go_on() -> None:
            if last:
                self._answer(rank, batch)
            elif not search.overlap:
                self._chunk(rank, batch, number + 1, compute, read)

        def there() -> None:
            started = processor.do(compute, go_on)
            if search.overlap and not last:  # one buffer is searched, the other one is free now
                self.clock.at(started, lambda: self._chunk(rank, batch, number + 1, compute, read))

        self.rows[rank].do(read, there)
