"""A plan: sizes, places, times, and what does not fit with the nearest size that would."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any

from knnext.planning.job import Job
from knnext.planning.placement import USABLE, Placement, build_memory, place, rank_memory
from knnext.planning.rates import Rates
from knnext.planning.search_time import BatchTime, batch_time
from knnext.planning.stages import Stage, stages
from knnext.say import binary_size

_MOST_RANKS = 1 << 24


@dataclass(frozen=True)
class Plan:
    """What was asked, and what comes of it.

    Attributes:
        disk: bytes of each part; ``free`` of the disk, or None where nobody said.
        build_memory: bytes of a rank's memory while it builds.
        resident_ranks: ranks with which all keys would stay resident.
        refusals: what does not fit, one sentence each; none where all fits.
    """

    job: Job
    rates: Rates
    disk: dict[str, int]
    free: int | None
    build_memory: int
    placement: Placement
    resident_ranks: int | None
    batch: BatchTime
    stages: list[Stage]
    refusals: list[str]
    notes: list[str]

    @property
    def fits(self) -> bool:
        return not self.refusals

    def used_rates(self) -> dict[str, dict[str, Any]]:
        """By name, those that some stage was computed from."""
        names = dict.fromkeys(name for stage in self.stages for name in stage.rates)
        return {name: asdict(self.rates.rates[name]) for name in names}

    def to_json(self) -> dict[str, Any]:
        job, place = self.job, self.placement
        return {
            "fits": self.fits,
            "refusals": self.refusals,
            "notes": self.notes,
            "job": asdict(job) | {"ranks": job.ranks, "factory": job.factory},
            "machine": asdict(self.rates.machine),
            "disk": self.disk | {"total": sum(self.disk.values()), "free": self.free},
            "memory_per_rank": {
                "total": rank_memory(job, self.rates.machine),
                "building": self.build_memory,
                "searching": place.working + place.held,
            },
            "placement": asdict(place) | {"resident_ranks": self.resident_ranks},
            "traffic_per_rank": job.traffic.a_rank,
            "stages": [asdict(stage) for stage in self.stages],
            "rates": self.used_rates(),
        }


def make_plan(job: Job, rates: Rates, *, free: int | None = None, must_stay: bool = False) -> Plan:
    """``free``: bytes of the disk. ``must_stay``: refuse where rows would have to stream."""
    where = place(job, rates.machine)
    ranks = _resident_ranks(job, rates)
    return Plan(
        job,
        rates,
        job.disk(),
        free,
        build_memory(job),
        where,
        ranks,
        batch_time(job, where, rates),
        stages(job, where, rates.machine, rates),
        _refusals(job, rates, free, where, ranks, must_stay),
        _notes(job, where, rates),
    )


def most_tokens(job: Job, fits: Callable[[Job], bool]) -> int:
    """The most rows with which the job fits, fewer than it has; 0 where none do."""
    low, high = 0, job.tokens
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(replace(job, tokens=middle)) else (low, middle)
    return low


def _resident_ranks(job: Job, rates: Rates) -> int | None:
    """The fewest ranks whose memories hold all rows, by whole nodes; None: no number does."""
    nodes = 1
    while nodes * job.ranks_a_node <= _MOST_RANKS:
        if place(replace(job, nodes=nodes), rates.machine).resident:
            break
        nodes *= 2
    else:
        return None
    low = nodes // 2
    while nodes - low > 1:
        middle = (low + nodes) // 2
        fits = place(replace(job, nodes=middle), rates.machine).resident
        low, nodes = (low, middle) if fits else (middle, nodes)
    return nodes * job.ranks_a_node


def _refusals(
    job: Job, rates: Rates, free: int | None, where: Placement, ranks: int | None, must_stay: bool
) -> list[str]:
    found = []
    if free is not None and (needed := sum(job.disk().values())) > free:
        most = most_tokens(job, lambda smaller: sum(smaller.disk().values()) <= free)
        found.append(
            f"the disk has {binary_size(free)} free and this takes {binary_size(needed)}; "
            f"{_rows(most)} would fit{_lighter(job, free)}"
        )
    memory = int(USABLE * rank_memory(job, rates.machine))
    whose = "a GPU" if job.gpus else "a node"
    if (needed := build_memory(job)) > memory:
        smallest = build_memory(replace(job, batch=1))
        instead = (
            "--batch-size 1 would fit"
            if smallest <= memory
            else f"a model of {memory / (needed / job.shape.params):.2g} parameters would fit"
        )
        found.append(
            f"the model takes {binary_size(needed)} of {whose}'s {binary_size(memory)} that can be "
            f"planned with; {instead}"
        )
    if job.faiss is not None:
        found += _index_refusal(job, int(USABLE * rates.machine.memory))
    if must_stay and not where.resident:
        most = most_tokens(job, lambda smaller: place(smaller, rates.machine).resident)
        more = "" if ranks is None else f"; {ranks:,} ranks would hold all"
        found.append(
            f"a rank's shard of {binary_size(where.wanted)} does not stay in the "
            f"{binary_size(where.budget)} that are left for it; {_rows(most)} would{more}"
        )
    return found


def _index_refusal(job: Job, memory: int) -> list[str]:
    def needed(one: Job) -> int:
        assert one.faiss is not None
        sample = one.training_rows * one.shape.dim * 4
        whole = one.faiss.index_bytes(one.tokens)
        return max(sample, whole + whole // one.segments)  # at its end it joins the last segment

    if needed(job) <= memory:
        return []
    most = most_tokens(job, lambda smaller: needed(smaller) <= memory)
    return [
        f"the FAISS index {job.factory} takes {binary_size(needed(job))} of a node's "
        f"{binary_size(memory)} of memory while it is built; {_rows(most)} would fit"
    ]


def _rows(count: int) -> str:
    return f"{count:,} tokens" if count else "not even one token"


def _lighter(job: Job, free: int) -> str:
    """The same rows in fewer bytes, where those would fit."""
    options = []
    if job.faiss is not None:
        options.append(("without the index", replace(job, index=None)))
    if job.codes:
        options.append(("without codes", replace(job, codes=False)))
    if job.dtype == "float32":
        options.append(("with --key-dtype float16", replace(job, dtype="float16")))
    for name, lighter in options:
        if sum(lighter.disk().values()) <= free:
            return f", or all of it {name}"
    return ""


def _notes(job: Job, where: Placement, rates: Rates) -> list[str]:
    found = []
    if job.gpus and job.codes:
        found.append("a search on a GPU reads the keys and leaves codes aside")
    if job.gpus and where.held > rank_memory(job, rates.machine) / 2:
        found.append(
            "ExactIndex keeps by default what fits half of a GPU's free memory: give it "
            f"resident_bytes={where.budget:,}"
        )
    if job.k > job.tokens:
        found.append(f"k is {job.k:,} of {job.tokens:,} rows: the rest of each answer is padding")
    if job.faiss is not None and job.faiss.lists and job.training_rows < 39 * job.faiss.lists:
        found.append(
            f"{job.training_rows:,} rows train {job.faiss.lists:,} lists: FAISS wants 39 a list"
        )
    return found
