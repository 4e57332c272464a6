"""Hopper's scan for few queries, its real source run on the host (tests/emulator/hopper.h): copies
land late and in any order, products read what they are given at the last moment, and a parity that
is wrong leaves threads waiting for ever, which the emulator reports.

Keys and queries are small integers: every result must equal the reference's to the bit.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.emulator.build import compiler_found
from tests.emulator.search import ORDERS, expect, integers, keys_in_order, sampled, search

pytestmark = pytest.mark.skipif(not compiler_found(), reason="no C++ compiler to build it with")

HALVES = [torch.float16, torch.bfloat16]


def check(queries: Tensor, keys: Tensor, k: int, metric: str = "l2", **how: int) -> int:
    """Searches with the owner scan; returns how many queries took the path that cannot fail."""
    failures: list[int] = []
    how = sampled(rank=k + k // 2 + 8) | how
    result = search(queries, keys, k, metric, shape="owner", failures=failures, **how)
    expect(result, queries, keys, k, metric)
    return failures[0]


# Tiles and tails


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("q", [1, 8, 9, 16, 17, 32, 33, 64])
def test_every_number_of_queries(q: int, dtype: torch.dtype):
    queries, keys = integers(q, 72, dtype=dtype), integers(500, 72, dtype=dtype)
    for metric in ("l2", "ip"):
        assert check(queries, keys, 40, metric) == 0


@pytest.mark.parametrize("n", [257, 383, 384, 385, 511, 513, 640])
def test_sizes_around_a_tile(n: int):
    for metric in ("l2", "ip"):
        assert check(integers(9, 24), integers(n, 24), 20, metric, num_units=2) == 0


@pytest.mark.parametrize("dim", [8, 16, 56, 64, 72, 120, 128, 136, 320])
@pytest.mark.parametrize("q", [3, 40])
def test_every_tail_of_the_rows(dim: int, q: int):
    for metric in ("l2", "ip"):
        assert check(integers(q, dim), integers(400, dim), 20, metric) == 0


@pytest.mark.slow
@pytest.mark.parametrize(("q", "dim"), [(64, 1024), (64, 1280), (8, 10240)])
def test_the_widest_queries_that_stay_fill_shared_memory(q: int, dim: int):
    # The emulator knows the limit of 227 KB, and poisons what lies in it.
    assert check(integers(q, dim, high=2), integers(200, dim, high=2), 20, num_units=2) == 0


@pytest.mark.slow
def test_each_key_is_scored_once_by_each_query():
    # Key i is one-hot at i % D, times a number of its own; so is the query's. The threshold lets
    # about a third of the keys pass.
    dim, n, q = 72, 900, 64
    keys, queries = torch.zeros(n, dim), torch.zeros(q, dim)
    keys[torch.arange(n), torch.arange(n) % dim] = 1.0 + torch.arange(n) // dim
    queries[torch.arange(q), torch.arange(q) % dim] = 1.0 + torch.arange(q) // dim
    assert check(queries.half(), keys.half(), 100, num_units=2) == 0


def test_rows_apart_and_beyond():
    wide = integers(600, 96)
    assert check(wide[:7, 8:72], wide[:, 8:72], 30) == 0
    assert check(wide[40:41, 16:48], wide[:, 24:56], 30) == 0


# The ring


@pytest.mark.parametrize("stages", [1, 2, 3, 5])
@pytest.mark.parametrize("seed", [0, 1, 2, 3])
def test_the_ring_goes_round_in_any_order(stages: int, seed: int):
    # Three blocks of the rows and stages that share no factor with them: every pair of place and
    # parity comes by.
    queries, keys = integers(12, 136), integers(1100, 136)
    assert check(queries, keys, 30, stages=stages, seed=seed, num_units=2) == 0


@pytest.mark.parametrize("units", [1, 2, 5, 100])
def test_any_number_of_multiprocessors(units: int):
    assert check(integers(5, 40), integers(900, 40), 30, num_units=units) == 0


# Thresholds and lists


@pytest.mark.parametrize(
    "forced",
    [
        {"rank": 1},  # too tight: too few candidates
        {"rank": 60, "capacity": 8},  # no room
        {"rank": 60, "fail_all": 1},
    ],
)
@pytest.mark.parametrize("metric", ["l2", "ip"])
def test_what_goes_wrong_is_seen_and_made_good(metric: str, forced: dict[str, int]):
    queries, keys = integers(37, 16), integers(900, 16)
    assert check(queries, keys, 32, metric, owners=2, owner_words=512, **forced) == 37


@pytest.mark.slow
@pytest.mark.parametrize("n", [900, 1533, 1540])
@pytest.mark.parametrize("stages", [2, 5])
def test_its_sample_is_its_own(n: int, stages: int):
    # Of the sample's 300 to 513 rows half are listed; under the threshold found there this kernel
    # scans the sample, and under the sample's the keys.
    queries, keys = integers(20, 72), integers(n, 72)
    for metric in ("l2", "ip"):
        assert check(queries, keys, 32, metric, stride=3, second=2, rank=40, stages=stages) == 0
        assert check(queries, keys, 32, metric, stride=3, second=2, rank=1) > 0


def test_what_finds_no_room_goes_nowhere():
    # The plan's own list holds half of the keys, and nearly all of them pass: beyond the last list
    # lie the counters and norms.
    queries, keys = integers(3, 8), integers(9000, 8)
    assert check(queries, keys, 20, stride=2, rank=4400) == 3


def test_only_the_failed_queries_take_the_other_path():
    queries, keys = integers(12, 8), integers(900, 8)
    assert 0 < check(queries, keys, 20, rank=30, capacity=120) < 12


@pytest.mark.slow
def test_lists_are_those_of_the_portable_scan():
    # Lists with just enough room for every candidate: one word more or fewer and a query fails,
    # so both scans meet the same queries' ends at every capacity.
    queries, keys = integers(24, 16), integers(900, 16)
    for capacity in (110, 130, 150, 170):
        how = sampled(rank=34, capacity=capacity)
        failures: list[int] = []
        for shape in ("small", "owner"):
            search(queries, keys, 20, shape=shape, failures=failures, **how)
        assert failures[0] == failures[1]


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("fail_all", [0, 1])
def test_orders_that_fill_lists(order: str, fail_all: int):
    queries, keys = torch.zeros(6, 8).half(), keys_in_order(order, 1000, 8)
    how = {"rank": 60, "fail_all": fail_all, "owner_words": 256, "owners": 3}
    assert check(queries, keys, 100, **how) == 6 * fail_all


def test_duplicates_across_the_last_place_come_by_index():
    queries, keys = integers(20, 32), integers(50, 32).repeat(18, 1)
    for metric in ("l2", "ip"):
        check(queries, keys, 45, metric)


def test_a_candidate_of_every_lane_and_element():
    # Nothing is beyond the threshold: 32 candidates of each thread pass through the staging.
    queries, keys = integers(64, 8), integers(520, 8)
    assert check(queries, keys, 120, rank=130, num_units=1) == 0


def test_nan_and_infinity():
    queries, keys = integers(20, 16), integers(700, 16)
    keys[::3, 4] = float("nan")
    keys[1, 0], keys[4, 1], keys[500, 2] = float("inf"), -float("inf"), float("inf")
    queries[2, 3] = float("nan")
    for metric in ("l2", "ip"):
        check(queries, keys, 40, metric)


def test_distances_of_identical_rows_end_at_zero():
    # By expansion they come out a little above, since products are cut, and with norms a little too
    # small below: at zero, then.
    keys = torch.randn(600, 72).half()
    queries = keys[100:140].contiguous()
    norms = keys.float().square().sum(1)
    for key_sqnorms, zero in ((None, False), (norms * (1 - 1e-5), True)):
        distances, indices = search(
            queries, keys, 40, shape="owner", key_sqnorms=key_sqnorms, **sampled(rank=60)
        )
        assert torch.equal(indices[:, 0], torch.arange(100, 140))
        assert (distances[:, 0] < 1e-4).all() and (distances >= 0).all()
        assert (distances[:, 0] == 0).all() == zero


@pytest.mark.slow
def test_chunks_and_passes_and_what_went_before():
    queries, keys = integers(50, 24), integers(1500, 24)
    assert check(queries, keys, 40, chunk_keys=700, queries_per_pass=20, rank=90) == 0
    earlier = search(queries, keys[:500], 40, shape="few")
    result = search(
        queries, keys[500:], 40, shape="owner", init=earlier, index_offset=500, **sampled(rank=90)
    )
    expect(result, queries, keys, 40)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(1, 4))
def test_the_order_of_threads_and_blocks_changes_nothing(seed: int):
    queries, keys = torch.randn(18, 136).half(), torch.randn(700, 136).half()
    keys[300:400] = keys[200:300]
    plain = search(queries, keys, 65, seed=0, shape="owner", **sampled(rank=60))
    for how in (sampled(rank=60), sampled(rank=1, owners=3)):
        again = search(queries, keys, 65, seed=seed, shape="owner", stages=2, **how)
        assert torch.equal(plain[1], again[1])
        torch.testing.assert_close(plain[0], again[0], rtol=0, atol=1e-4)
