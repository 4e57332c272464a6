"""Seconds of a plan: by hand, in their order, and against a simulation of ranks."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace

import pytest

from knnext.planning import make_plan
from knnext.planning.placement import CHUNK_BYTES, place
from knnext.planning.search_time import BatchTime, LocalSearch, batch_time, local_search
from knnext.planning.simulation import Simulation, Wires
from knnext.planning.traffic import Traffic
from tests.planning.jobs import PAPER, job, machine, rates

WIRES = Wires(network=4e10, link=3.6e11, latency=2e-5)
#: Formula over simulation, or less than one from it.
TOLERANCE = 0.05


def stage(plan, name: str):
    return next(one for one in plan.stages if one.name.startswith(name))


def test_by_hand():
    """Round rates: each stage is its size over its rate."""
    found = rates(
        forward=1e14,
        disk_write=1e9,
        checksum=1e10,
        **{"search_flops.float16": 1e14, "search_bytes.float16": 1e12},
    )
    plan = make_plan(job(gpus=2, stride=1024, queries=1000), found)
    shape = PAPER.shape
    flops = 2 * shape.active + 2 * 16 * 1024 * 1024
    assert stage(plan, "forward").seconds == pytest.approx(PAPER.tokens * flops / 2e14)
    assert stage(plan, "write").seconds == pytest.approx(PAPER.tokens * 2052 * (1 / 1e9 + 1 / 2e10))
    arithmetic = 2 * 1000 * (PAPER.tokens / 2) * 1024 / 1e14
    assert plan.batch.search.compute == pytest.approx(arithmetic)
    assert plan.batch.search.read == pytest.approx(PAPER.tokens / 2 * 2052 / 1e12)
    assert plan.batch.search.bound == "arithmetic"


def test_windows_that_overlap_read_the_text_again():
    once = stage(make_plan(job(stride=1024), rates()), "forward").seconds
    twice = stage(make_plan(job(stride=512), rates()), "forward").seconds
    assert twice == pytest.approx(2 * once)


def test_who_reads_from_where():
    found = rates()
    few, many = (local_search(one, place(one, found.machine), found) for one in (
        job(queries=16), job(queries=65_536)
    ))  # fmt: skip
    assert few.bound == "reading" and many.bound == "arithmetic"  # keys stream over PCIe
    assert few.seconds == pytest.approx(PAPER.tokens * 2052 / found["host_to_device"], rel=0.02)
    assert few.chunks == -(-PAPER.tokens * 2052 // CHUNK_BYTES)
    slow = machine(found, memory=100 << 30)
    disk = local_search(PAPER, place(PAPER, slow.machine), slow)
    assert disk.read == pytest.approx(PAPER.tokens * 2052 / found["disk_read"])


def test_a_cpu_reads_and_then_searches_what_lies_on_disk():
    found = machine(rates("cpu"), memory=64 << 30)
    one = job(gpus=0)
    search = local_search(one, place(one, found.machine), found)
    assert not search.overlap and search.seconds == search.compute + search.read


def test_stages_come_in_the_order_of_the_work():
    names = [s.name for s in make_plan(job(codes=True, index="IVF4096,PQ64"), rates()).stages]
    assert names == [
        *("forward", "write", "encode", "index training", "index adding"),
        *("exact search of 1,000 queries", "FAISS search of 1,000 queries"),
    ]


def test_what_has_no_formula_says_so():
    plan = make_plan(job(index="HNSW32"), rates())
    assert stage(plan, "index adding").seconds is None
    assert "HNSW" in stage(plan, "index adding").note
    assert json.loads(json.dumps(plan.to_json()))["fits"]


def test_a_learned_rotation_has_no_formula_and_its_product_is_counted():
    plain, turned = (
        make_plan(job(index=index), rates()) for index in ("IVF4096,PQ64", "OPQ64,IVF4096,PQ64")
    )
    training = stage(turned, "index training")
    assert training.seconds is None and "OPQ" in training.note
    more = stage(turned, "index adding").seconds - stage(plain, "index adding").seconds
    product = 2 * PAPER.tokens * 1024 * 1024 / rates()["faiss_add"]
    assert more == pytest.approx(product, rel=0.01)
    by_pca = make_plan(job(index="PCA256,IVF4096,PQ64"), rates())
    assert stage(by_pca, "index training").seconds is not None


KINDS = [
    *("Flat", "SQ8", "PQ64", "IVF4096,Flat", "IVF4096,SQ8", "IVF4096,PQ64", "IVF65536_HNSW32,PQ64"),
    *("HNSW32", "HNSW32,SQ8", "OPQ64,PQ64", "OPQ64_256,IVF4096,PQ64", "PCA256,IVF4096,PQ64"),
    "IVF4096,PQ64x4fs,RFlat",
]


@pytest.mark.parametrize("index", KINDS)
def test_every_kind_of_index_has_each_line_or_the_reason_why_not(index):
    plan = make_plan(job(index=index), rates())
    for name in ("index training", "index adding", "FAISS search"):
        found = stage(plan, name)
        assert found.seconds is not None or "no formula" in found.note


def test_every_rate_that_is_used_says_where_it_is_from():
    plan = make_plan(
        job(codes=True, index="default", gpus=8, nodes=2, tokens=1_500_000_000), rates()
    )
    used = plan.used_rates()
    assert {"forward", "network", "host_to_device", "faiss_train"} <= set(used)
    assert all(rate["source"].startswith("stated, not measured: ") for rate in used.values())


# Over ranks


def test_traffic_is_q_x_k_x_12_a_rank_a_shard():
    traffic = Traffic(ranks=16, ranks_a_node=8, queries=1600, k=1024, query_bytes=2048)
    assert traffic.from_one == 100 * 1024 * 12
    assert traffic.to_one == 100 * 2048
    simulation = Simulation(traffic, WIRES, batch(traffic, LocalSearch(1.0, 0.5)), 3)
    simulation.run()
    assert simulation.sent == pytest.approx(3 * 16 * traffic.a_rank)


def batch(traffic: Traffic, search: LocalSearch) -> BatchTime:
    def seconds(size: float) -> float:
        return traffic.seconds(size, WIRES.network, WIRES.link, WIRES.latency)

    to_one, from_one = seconds(traffic.to_one), seconds(traffic.from_one)
    return BatchTime(to_one, search, from_one, traffic.merge_bytes / 4e12, WIRES.latency)


SLOW = pytest.param(24, 8, marks=pytest.mark.slow)
SHAPES = [(1, 8), (2, 8), (4, 1), (6, 2), (12, 4), SLOW]
SEARCHES = [
    LocalSearch(1e-2, 2e-2),  # resident: rows go by while they are searched
    LocalSearch(1e-3, 1e-4),  # about as long as the exchange
    LocalSearch(1e-4, 1e-5),  # less than the exchange
    LocalSearch(1.0, 1.5, chunks=20),  # streamed, bound by the link
    LocalSearch(2.0, 1.5, chunks=20),  # streamed, bound by arithmetic
    LocalSearch(1.0, 1.5, chunks=5, overlap=False),
]


@pytest.mark.parametrize(("ranks", "node"), SHAPES)
def test_formula_and_simulation_agree(ranks, node):
    traffic = Traffic(ranks, node, queries=4096, k=1024, query_bytes=2048)
    for search, count in itertools.product(SEARCHES, (1, 5)):
        time = batch(traffic, search)
        both = Simulation(traffic, WIRES, time, count).run()
        assert time.batches(count) == pytest.approx(both, rel=TOLERANCE), (search, count)
        apart = Simulation(traffic, WIRES, time, count, overlap=False).run()
        assert count * time.alone() == pytest.approx(apart, rel=0.01), (search, count)
        assert both <= apart * 1.0001


@pytest.mark.parametrize("name", ["h200", "a100", "cpu"])
@pytest.mark.parametrize("nodes", [1, 2])
@pytest.mark.parametrize("tokens", [10**8, 10**9])
def test_plans_and_simulations_agree(name, nodes, tokens):
    """The per-step times are those of a machine's rates."""
    found = rates(name)
    one = job(gpus=found.machine.gpus, nodes=nodes, tokens=tokens)
    time = batch_time(one, place(one, found.machine), found)
    time = replace(time, search=replace(time.search, chunks=min(time.search.chunks, 32)))
    wires = Wires(found["network"], found["link"], found["latency"])
    seen = Simulation(one.traffic, wires, time, 2).run()
    assert time.batches(2) == pytest.approx(seen, rel=TOLERANCE)


def test_the_slowest_of_many_ranks_decides():
    traffic = Traffic(16, 8, 4096, 1024, 2048)
    time = batch(traffic, LocalSearch(1.0, 0.5))
    even = Simulation(traffic, WIRES, time, 5).run()
    uneven = Simulation(traffic, WIRES, time, 5, spread=0.2, seed=1).run()
    assert even * 1.1 < uneven < even * 1.25
    assert uneven == Simulation(traffic, WIRES, time, 5, spread=0.2, seed=1).run()


def test_batches_are_as_large_as_the_exchange_buffer_lets_them():
    one = job(gpus=8, nodes=2, queries=10**6)
    each = 2 * (2048 + 12 * 1024) + 3 * 12 * 1024  # bytes a rank holds of a query, twice or thrice
    assert one.batch_queries == (512 << 20) // (each * 16) * 16
    assert job(queries=10**6).batch_queries == 10**6  # alone there is no exchange
