"""How long a batch of queries takes: on one rank, and over all of them."""

from __future__ import annotations

from dataclasses import dataclass

from knnext.planning.job import Job
from knnext.planning.placement import (
    CHUNK_BYTES,
    CODES_RESIDENT,
    CODES_STREAMED,
    FROM_MEMORY,
    RESIDENT,
    Placement,
)
from knnext.planning.rates import Rates

#: Rows that codes leave open, in multiples of k (measured: 1.5 to 3).
OPEN_ROWS = 2.5
_PAGE = 4096


@dataclass(frozen=True)
class LocalSearch:
    """A batch in one shard.

    Attributes:
        compute: seconds of arithmetic.
        read: seconds in which the rows go by.
        chunks: in which rows come; 1: nothing is copied before it is searched.
        overlap: whether a chunk comes while the one before is searched.
    """

    compute: float
    read: float
    chunks: int = 1
    overlap: bool = True

    @property
    def seconds(self) -> float:
        if not self.overlap:
            return self.compute + self.read
        # Nothing is searched before the first chunk is there, and nothing read behind the last.
        ends = min(self.compute, self.read) / self.chunks if self.chunks > 1 else 0.0
        return max(self.compute, self.read) + ends

    @property
    def bound(self) -> str:
        """What it waits for: "arithmetic" or "reading"."""
        return "arithmetic" if self.compute >= self.read else "reading"


@dataclass(frozen=True)
class BatchTime:
    """Seconds of each part of a batch over all ranks; ``latency`` is part of both journeys."""

    queries_out: float
    search: LocalSearch
    answers_back: float
    merge: float
    latency: float = 0.0

    @property
    def exchange(self) -> float:
        return self.queries_out + self.answers_back

    def alone(self) -> float:
        """One batch, with nothing to overlap."""
        return self.queries_out + self.search.seconds + self.answers_back + self.merge

    def each(self) -> float:
        """One of many: exchange of the next and the last goes on while one is searched."""
        wires = self.exchange - 2 * self.latency
        return max(self.search.seconds + self.merge, wires, self.queries_out, self.answers_back)

    def batches(self, count: int) -> float:
        """``count`` of them: the first and the last stand alone at their ends."""
        return self.alone() + max(0, count - 1) * self.each()


def local_search(job: Job, place: Placement, rates: Rates) -> LocalSearch:
    """The search of `job.batch_queries` in the largest shard."""
    queries, rows, dim = job.batch_queries, job.shard_rows, job.shape.dim
    by_codes = job.codes and not job.gpus
    product = rates["codes_flops"] if by_codes else rates[f"search_flops.{job.dtype}"]
    memory = rates["codes_bytes"] if by_codes else rates[f"search_bytes.{job.dtype}"]
    compute = 2.0 * queries * rows * dim / product
    disk = rates["disk_read"] * job.disks / job.ranks
    if place.tier in (RESIDENT, CODES_RESIDENT):
        read = place.read / memory
        again = _open_rows(job) / disk if place.tier == CODES_RESIDENT else 0.0
        return LocalSearch(compute + again, read)
    if place.tier == FROM_MEMORY:
        source = min(rates["host_to_device"], rates["memory_read"] / job.ranks_a_node)
    else:
        source = disk
    read = place.read / source
    if place.tier == CODES_STREAMED:
        return LocalSearch(compute, read + _open_rows(job) / disk, _chunks(place), overlap=False)
    # Copies to a GPU go on while it searches; mapped files are read when they are looked at.
    return LocalSearch(compute, read, _chunks(place), overlap=bool(job.gpus))


def _open_rows(job: Job) -> float:
    """Bytes of keys that a search by codes reads: of each batch a row once, and whole pages."""
    rows = min(job.shard_rows, OPEN_ROWS * job.k * job.batch_queries / job.ranks)
    return rows * max(_PAGE, job.key_bytes)


def _chunks(place: Placement) -> int:
    return max(1, -(-place.read // CHUNK_BYTES))


def batch_time(job: Job, place: Placement, rates: Rates) -> BatchTime:
    """Of `job.batch_queries` queries over all ranks."""
    search = local_search(job, place, rates)
    if job.ranks == 1:
        return BatchTime(0.0, search, 0.0, 0.0)
    traffic = job.traffic
    network, link, latency = rates["network"], rates["link"], rates["latency"]
    memory = rates[f"search_bytes.{job.dtype}"]
    return BatchTime(
        traffic.seconds(traffic.to_one, network, link, latency),
        search,
        traffic.seconds(traffic.from_one, network, link, latency),
        traffic.merge_bytes / memory,
        latency,
    )
