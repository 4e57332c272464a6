"""Hopper's scan for many queries, its real source run on the host (tests/emulator/hopper.h): two
warpgroups that multiply, warps that copy, clusters of two blocks that share key tiles.

Keys and queries are mostly small integers: results must equal the reference's to the bit. A
pipeline that takes a wrong turn waits for ever, which the emulator reports, or multiplies poison.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.emulator.build import call, compiler_found, load
from tests.emulator.search import ORDERS, expect, integers, keys_in_order, sampled, search

pytestmark = pytest.mark.skipif(not compiler_found(), reason="no C++ compiler to build it with")

INF = float("inf")


def check(queries: Tensor, keys: Tensor, k: int, metric: str = "l2", **how: int) -> int:
    """Searches with the filter scan; returns how many queries took the path that cannot fail."""
    failures: list[int] = []
    how = sampled(rank=k + k // 2 + 8) | how
    result = search(queries, keys, k, metric, shape="filter", failures=failures, **how)
    expect(result, queries, keys, k, metric)
    return failures[0]


# Tiles and tails


@pytest.mark.slow
@pytest.mark.parametrize(("n", "cluster"), [(200, 1), (255, 2), (257, 1), (512, 2), (513, 2)])
def test_sizes_around_a_tile_of_keys(n: int, cluster: int):
    for metric in ("l2", "ip"):
        assert check(integers(70, 24), integers(n, 24), 12, metric, cluster=cluster) == 0


@pytest.mark.parametrize(("q", "cluster"), [(1, 2), (127, 1), (128, 2), (129, 0), (257, 2)])
def test_sizes_around_a_tile_of_queries(q: int, cluster: int):
    # Three tiles in clusters of two: the fourth is all padding.
    assert check(integers(q, 16), integers(300, 16), 9, cluster=cluster) == 0


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("dim", [8, 56, 72, 200, 328])
def test_every_tail_of_the_rows(dim: int, dtype: torch.dtype):
    # Up to more steps than stages, and with one step a tile less than the stagger.
    queries, keys = integers(67, dim, dtype=dtype), integers(600, dim, dtype=dtype)
    assert check(queries, keys, 12, "l2" if dim % 16 else "ip", cluster=1 + dim // 8 % 2) == 0


@pytest.mark.slow
@pytest.mark.parametrize("cluster", [1, 2])
def test_every_ring_goes_round(cluster: int):
    # One block (or two) for ten tiles of keys: three times as many as there are stages.
    queries, keys = integers(66 * cluster, 8, high=9), integers(2560, 8, high=9)
    assert check(queries, keys, 30, cluster=cluster, num_units=cluster) == 0


@pytest.mark.slow
def test_each_key_is_scored_once_by_each_query():
    # Key i is one-hot at i % D, times a number of its own; so is the query's. Lists hold them all.
    dim, n, q = 72, 520, 129
    keys, queries = torch.zeros(n, dim), torch.zeros(q, dim)
    keys[torch.arange(n), torch.arange(n) % dim] = 1.0 + torch.arange(n) // dim
    queries[torch.arange(q), torch.arange(q) % dim] = 1.0 + torch.arange(q) // dim
    queries, keys = queries.half(), keys.half()
    for cluster in (1, 2):
        how = sampled(rank=129) | {"cluster": cluster}
        result = search(queries, keys, n, "ip", shape="filter", **how)
        expect(result, queries, keys, n, "ip")
        assert all(sorted(row) == list(range(n)) for row in result[1].tolist())


@pytest.mark.slow
def test_rows_that_the_copy_engine_cannot_read_go_the_portable_way():
    wide = integers(400, 50)
    queries, keys = wide[:70, 3:23], wide[:, 3:23]
    assert check(queries, keys, 6) == 0


@pytest.mark.slow
def test_rows_with_space_between_them():
    # 22 of 48 elements: a tail in the row that must not read what follows it.
    wide = integers(400, 48)
    wide[:, 30:] = float("nan")
    assert check(wide[:70, 8:30], wide[:, 8:30], 6, cluster=2) == 0


# Thresholds and lists


@pytest.mark.slow
@pytest.mark.parametrize("cluster", [1, 2])
def test_a_sample_by_the_copy_engine(cluster: int):
    # Half of the sample's 300 rows settle a threshold; the sample's own scan takes one row of each
    # run of three, the same in eight adjacent runs.
    for metric in ("l2", "ip"):
        how = sampled(stride=3, second=2, rank=40)
        assert check(integers(70, 72), integers(902, 72), 32, metric, cluster=cluster, **how) == 0


@pytest.mark.slow
@pytest.mark.parametrize(
    "forced",
    [
        {"rank": 1},  # too tight: too few candidates
        {"rank": 40, "capacity": 8},  # no room
        {"rank": 40, "fail_all": 1},
    ],
)
def test_what_goes_wrong_is_seen_and_made_good(forced: dict[str, int]):
    queries, keys = integers(67, 16), integers(600, 16)
    assert check(queries, keys, 32, "l2", cluster=2, owners=2, owner_words=512, **forced) == 67


@pytest.mark.slow
@pytest.mark.parametrize("order", ORDERS)
def test_orders_that_fill_lists(order: str):
    queries, keys = torch.zeros(66, 8).half(), keys_in_order(order, 800, 8)
    # Ties are settled by row in the threshold too: about 200 enter even where all are equal.
    assert check(queries, keys, 80, rank=50, capacity=400, cluster=2) == 0


@pytest.mark.slow
def test_what_is_not_a_number():
    queries, keys = integers(70, 16), integers(600, 16)
    keys[::3, 4] = float("nan")
    keys[1, 0], keys[4, 1], keys[301, 2] = INF, -INF, INF
    queries[2, 3], queries[3, 0] = float("nan"), INF
    for metric in ("l2", "ip"):
        how = sampled(rank=60) | {"cluster": 2}
        result = search(queries, keys, 40, metric, shape="filter", **how)
        expect(result, queries, keys, 40, metric)


# Rounding


def portable_twin(queries: Tensor, keys: Tensor, k: int, metric: str, **how: int) -> None:
    """The emulated units sum in one order, so that both kernels must agree to the bit."""
    failures: list[int] = []
    found = search(queries, keys, k, metric, shape="filter", failures=failures, **how)
    twin = search(queries, keys, k, metric, shape="large", failures=failures, **how)
    assert torch.equal(found[0], twin[0]) and torch.equal(found[1], twin[1])
    assert failures[0] == failures[1]


@pytest.mark.slow
@pytest.mark.parametrize("scale", [1e-3, 1.0, 60.0])
def test_the_quick_test_loses_no_one_to_rounding(scale: float):
    # Far from the origin and close to each other: distances are all rounding error, and many lie
    # right at the bound, on either side of it.
    keys = ((torch.randn(600, 40) * 0.02 + 20) * scale).half()
    keys[300:500] = keys[100:300]
    portable_twin(keys[:66] * 1.001, keys, 40, "l2", **sampled(rank=12))
    portable_twin(keys[:66] - 20 * scale, keys, 40, "ip", **sampled(rank=12))


def test_distances_that_round_to_the_bound_pass():
    # |q|^2 = 2^20, and 2 <q, x> is 3/4 of its last bit for the near keys: their distance rounds to
    # one bit less, though it lies exactly beyond that. Nobody near them draws attention to them.
    queries, keys = torch.full((66, 16), float("nan")), torch.zeros(600, 16)
    queries[0] = 0.0
    queries[0, 0], keys[:, 0], keys[::15, 0] = 1024.0, -16 * 2.0**-18, 6 * 2.0**-18
    portable_twin(queries.half(), keys.half(), 5, "l2", **sampled(rank=3))


@pytest.mark.slow
@pytest.mark.parametrize("seed", [2, 3])
def test_the_order_of_threads_and_copies_changes_nothing(seed: int):
    queries, keys = torch.randn(130, 72).half(), torch.randn(600, 72).half()
    keys[300:400] = keys[200:300]
    how = sampled(rank=60) | {"cluster": seed - 1}
    found = search(queries, keys, 65, shape="filter", seed=0, **how)
    again = search(queries, keys, 65, shape="filter", seed=seed, **how)
    assert torch.equal(found[0], again[0]) and torch.equal(found[1], again[1])


# The walk


@pytest.mark.parametrize("tile_bytes", [32 << 10, 512 << 10, 2 << 20])
@pytest.mark.parametrize(("groups", "key_tiles"), [(1, 1000), (3, 7), (8, 24), (9, 25), (64, 613)])
def test_the_walk_meets_every_pair_of_tiles_once(groups: int, key_tiles: int, tile_bytes: int):
    walk = torch.full((groups * key_tiles, 2), -1)
    call(load().emulate_filter_raster, groups, key_tiles, tile_bytes, walk)
    assert walk.min() >= 0 and (walk < torch.tensor([groups, key_tiles])).all()
    assert len(walk.unique(dim=0)) == groups * key_tiles
    # What 64 clusters work on at one time is little: it is read from memory once.
    for first in range(0, len(walk) - 64, 64):
        now = walk[first : first + 64]
        if groups >= 16:
            assert len(now[:, 0].unique()) + len(now[:, 1].unique()) <= 33
