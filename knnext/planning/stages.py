"""How long each stage takes, from sizes and rates."""

from __future__ import annotations

from dataclasses import dataclass

from knnext.index.faiss_size import FaissSize
from knnext.planning.job import Job
from knnext.planning.placement import USABLE, Placement
from knnext.planning.rates import Machine, Rates
from knnext.planning.search_time import batch_time

# As FAISS does it, and asks for no more rows than these.
_LIST_ITERATIONS, _CODE_ITERATIONS = 10, 25
_ROWS_A_CENTROID, _CENTROIDS = 256, 256


@dataclass(frozen=True)
class Stage:
    """``seconds`` None: there is no formula for it. ``rates``: those that it was computed from."""

    name: str
    seconds: float | None
    rates: tuple[str, ...]
    note: str = ""


def stages(job: Job, place: Placement, machine: Machine, rates: Rates) -> list[Stage]:
    """In the order in which they are run."""
    found = [_forward(job, rates), _write(job, rates)]
    if job.codes:
        found.append(_encode(job, machine, rates))
    if job.faiss is not None:
        found += [_train(job, job.faiss, rates), _add(job, job.faiss, machine, rates)]
    found.append(_search(job, place, rates))
    if job.faiss is not None:
        found.append(_faiss_search(job, job.faiss, rates))
    return found


def _forward(job: Job, rates: Rates) -> Stage:
    again = job.block / job.stride
    passes = job.tokens * again
    seconds = passes * job.shape.flops(job.block) / (job.ranks * rates["forward"])
    note = f"each token is read {again:.3g} times (windows of {job.block:,}, stride {job.stride:,})"
    return Stage("forward", seconds, ("forward",), note)


def _write(job: Job, rates: Rates) -> Stage:
    seconds = _written(job.disk()["datastore"], job, job.ranks, rates)
    return Stage("write", seconds, ("disk_write", "checksum"))


def _written(num_bytes: int, job: Job, processes: int, rates: Rates) -> float:
    """Seconds to write what each process sums up before it goes to the disks."""
    return num_bytes / (rates["disk_write"] * job.disks) + num_bytes / (
        rates["checksum"] * processes
    )


def _encode(job: Job, machine: Machine, rates: Rates) -> Stage:
    numbers = job.tokens * job.shape.dim / (rates["encode"] * job.nodes)
    written = _written(job.disk()["codes"], job, job.nodes, rates)
    read, names = _read_again(job, machine, rates)
    return Stage("encode", numbers + read + written, ("encode", "disk_write", "checksum", *names))


def _read_again(job: Job, machine: Machine, rates: Rates) -> tuple[float, tuple[str, ...]]:
    """Seconds to read the keys, which are still in memory where they are few."""
    keys = job.tokens * job.key_bytes
    if keys <= USABLE / 2 * machine.memory:
        return keys / rates["memory_read"], ("memory_read",)
    return keys / (rates["disk_read"] * job.disks), ("disk_read",)


def _train(job: Job, size: FaissSize, rates: Rates) -> Stage:
    if size.rotation:
        # Fifty rounds of codes, products and a singular value decomposition: how much of a
        # product's rate they reach depends on the width of a code more than on their sizes.
        note = (
            "no formula tells how long a rotation is learned (OPQ); it is from 65,536 rows at "
            "most, so its time does not grow with the datastore: try a part of it"
        )
        return Stage("index training", None, (), note)
    rows = job.training_rows
    lists = 2.0 * min(rows, _ROWS_A_CENTROID * size.lists) * size.lists * size.dim
    coded = size.code_bytes < size.dim  # by codebooks; scalar codes learn only ranges
    codes = 2.0 * min(rows, _ROWS_A_CENTROID * _CENTROIDS) * _CENTROIDS * size.dim * coded
    flops = _LIST_ITERATIONS * lists + _CODE_ITERATIONS * codes
    return Stage("index training", flops / rates["faiss_train"], ("faiss_train",), "by one process")


def _add(job: Job, size: FaissSize, machine: Machine, rates: Rates) -> Stage:
    if size.graph:
        note = "no formula tells how long rows take to be linked (HNSW); try a part of them"
        return Stage("index adding", None, (), note)
    coded = size.code_bytes < size.dim
    flops = 2.0 * job.tokens * size.dim * (size.lists + _CENTROIDS * coded)
    flops += 2.0 * job.tokens * job.shape.dim * size.dim * size.product
    read, names = _read_again(job, machine, rates)
    seconds = flops / (rates["faiss_add"] * job.nodes) + read
    written = job.disk()["index"] + job.disk()["index building"]
    seconds += written / (rates["disk_write"] * job.disks)
    return Stage("index adding", seconds, ("faiss_add", *names, "disk_write"))


def _search(job: Job, place: Placement, rates: Rates) -> Stage:
    time = batch_time(job, place, rates)
    each = time.alone() if job.queries == job.batch_queries else time.each()
    if job.codes and not job.gpus:
        names = ["codes_flops", "codes_bytes"]
    else:
        names = [f"search_flops.{job.dtype}", f"search_bytes.{job.dtype}"]
    if "memory" in place.tier:
        names += ["host_to_device", "memory_read"]
    if "disk" in place.tier:
        names.append("disk_read")
    if job.ranks > 1:
        names += ["network", "link", "latency"]
    bound = "the exchange" if time.exchange > time.search.seconds else time.search.bound
    note = f"{job.batch_queries:,} queries at once; bound by {bound}; {place.tier}"
    return Stage(
        "exact search of 1,000 queries", each * 1000 / job.batch_queries, tuple(names), note
    )


def _faiss_search(job: Job, size: FaissSize, rates: Rates) -> Stage:
    name = "FAISS search of 1,000 queries"
    if size.graph:
        return Stage(name, None, (), "no formula for a graph (HNSW); it is the quickest of all")
    share = min(1.0, job.nprobe / size.lists) if size.lists else 1.0
    scanned = 1000.0 * job.tokens * share * size.code_bytes / rates["faiss_scan"]
    lists = 2000.0 * size.lists * size.dim / rates["faiss_add"]
    note = f"approximate, on one node's CPU; nprobe {job.nprobe}" if size.lists else "approximate"
    return Stage(name, scanned + lists, ("faiss_scan", "faiss_add"), note)
