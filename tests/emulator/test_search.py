"""The CUDA search, its real kernel source run on the host: tiles, lists, thresholds, what happens
when they fail, order and ties. Shapes are small; the plan's choices are forced to meet what only
large shapes would (see tests/emulator/api_search.cpp).

Keys and queries are mostly small integers: every distance is then exact in float32, and results
must equal the reference's to the bit, ties included.
"""

from __future__ import annotations

import pytest
import torch

from knnext import reference
from knnext.testing import assert_close, true_distances
from tests.emulator.build import compiler_found
from tests.emulator.search import (
    DTYPES,
    ORDERS,
    expect,
    integers,
    keys_in_order,
    sampled,
    search,
)

pytestmark = pytest.mark.skipif(not compiler_found(), reason="no C++ compiler to build it with")


# Tiles


@pytest.mark.slow
@pytest.mark.parametrize("shape", ["few", "small", "large"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_each_key_is_scored_once_by_each_query(shape: str, dtype: torch.dtype):
    if shape == "large" and dtype == torch.float32:
        pytest.skip("float32 has no such shape")
    # Key i is one-hot at i % D, times a number of its own; so is the query's.
    dim, n, q = 72, 300, 67 if shape != "large" else 131
    keys, queries = torch.zeros(n, dim), torch.zeros(q, dim)
    keys[torch.arange(n), torch.arange(n) % dim] = 1.0 + torch.arange(n) // dim
    queries[torch.arange(q), torch.arange(q) % dim] = 1.0 + torch.arange(q) // dim
    keys, queries = keys.to(dtype), queries.to(dtype)
    result = search(queries, keys, n, "ip", shape=shape)
    expect(result, queries, keys, n, "ip")
    assert all(sorted(row) == list(range(n)) for row in result[1].tolist())


@pytest.mark.parametrize("n", [1, 127, 128, 129, 255, 256, 257])
def test_sizes_around_a_tile(n: int):
    for shape, q in (("few", 15), ("few", 17), ("small", 63), ("large", 127)):
        queries, keys = integers(q, 24), integers(n, 24)
        expect(search(queries, keys, 5, shape=shape), queries, keys, 5)


@pytest.mark.parametrize("dim", [1, 7, 8, 32, 33, 64, 65, 128, 200])
@pytest.mark.parametrize("dtype", DTYPES)
def test_any_dimension(dim: int, dtype: torch.dtype):
    queries, keys = integers(5, dim, dtype=dtype), integers(150, dim, dtype=dtype)
    for metric in ("l2", "ip"):
        expect(search(queries, keys, 9, metric), queries, keys, 9, metric)
    if dtype != torch.float32:
        expect(search(queries, keys, 9, shape="large"), queries, keys, 9)


@pytest.mark.parametrize("resident", [0, 1])
def test_resident_queries_change_nothing(resident: int):
    queries, keys = integers(16, 200), integers(700, 200)
    expect(search(queries, keys, 20, resident=resident, num_units=2), queries, keys, 20)


def test_strided_and_unaligned_rows():
    wide = integers(300, 50)
    queries, keys = wide[:7, 3:23], wide[:, 3:23]
    expect(search(queries, keys, 6), queries, keys, 6)
    wide = integers(300, 48)
    queries, keys = wide[:7, 8:30], wide[:, 8:30]  # 16-byte starts, a tail of 12 bytes
    expect(search(queries, keys, 6, shape="small"), queries, keys, 6)


@pytest.mark.parametrize("shape", ["few", "small", "large"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", [97, 98, 100, 104])
def test_rows_at_any_alignment(dim: int, dtype: torch.dtype, shape: str):
    """Rows begin at multiples of 2, 4, 8 or 16 bytes, and are copied so many at a time."""
    if shape == "large" and dtype == torch.float32:
        pytest.skip("float32 has no such shape")
    queries, keys = integers(21, dim, dtype=dtype), integers(300, dim, dtype=dtype)
    expect(search(queries, keys, 6, shape=shape), queries, keys, 6)


@pytest.mark.parametrize("refine", [0, 1])
@pytest.mark.parametrize(
    ("dim", "dtype"), [(65, torch.float16), (100, torch.float16), (65, torch.float32)]
)
def test_identical_keys_tie_at_any_alignment(dim: int, dtype: torch.dtype, refine: int):
    """Norms and real scores are summed in one order, however a row can be loaded."""
    for seed in range(6):
        torch.manual_seed(seed)
        queries, key = torch.randn(2, dim).to(dtype), torch.randn(1, dim).to(dtype)
        distances, indices = search(queries, key.repeat(40, 1), 12, refine=refine)
        assert torch.equal(indices, torch.arange(12).expand(2, 12))
        assert (distances == distances[:, :1]).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_real_numbers_come_close(dtype: torch.dtype):
    queries, keys = torch.randn(20, 96).to(dtype), torch.randn(400, 96).to(dtype)
    for metric in ("l2", "ip"):
        distances, indices = search(queries, keys, 400, metric)
        wanted = reference.rescore(queries, keys, indices, metric, torch.float64)
        scale = true_distances(queries, keys, metric)[1].gather(1, indices)
        assert_close(distances.double(), wanted, "tensor_core", scale)
        assert (distances.diff(dim=1) >= 0).all()


@pytest.mark.slow
def test_identical_keys_get_identical_scores_in_every_tile_and_shape():
    queries, key = torch.randn(70, 90).half(), torch.randn(1, 90).half()
    keys = torch.randn(600, 90).half()
    places = torch.tensor([0, 9, 127, 128, 300, 599])
    keys[places] = key
    seen = []
    for shape in ("few", "small", "large"):
        distances, indices = search(queries, keys, 600, shape=shape)
        row = torch.empty_like(distances).scatter_(1, indices, distances)
        assert (row[:, places] == row[:, :1]).all()
        seen.append(row)
    assert torch.equal(seen[0], seen[1]) and torch.equal(seen[0], seen[2])


# Thresholds and lists


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_keys_whose_squares_have_few_bits(dtype: torch.dtype):
    """Squares of about 2^-146, below all normal numbers; their sums are still exact."""
    queries, keys = integers(20, 3, dtype=dtype), integers(900, 3, dtype=dtype)
    queries, keys = queries * 2.0**-73, keys * 2.0**-73
    for shape in ("few", "small") if dtype == torch.float32 else ("few", "small", "large"):
        result = search(queries, keys, 32, shape=shape, **sampled(rank=40))
        expect(result, queries, keys, 32)


@pytest.mark.parametrize("shape", ["few", "small", "large"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_sampled_threshold_keeps_the_best(shape: str, dtype: torch.dtype):
    if shape == "large" and dtype == torch.float32:
        pytest.skip("float32 has no such shape")
    queries, keys = integers(20, 40, dtype=dtype), integers(900, 40, dtype=dtype)
    for metric in ("l2", "ip"):
        failures: list[int] = []
        result = search(
            queries, keys, 32, metric, shape=shape, failures=failures, **sampled(rank=40)
        )
        expect(result, queries, keys, 32, metric)
        assert failures == [0]


@pytest.mark.slow
def test_a_sample_of_the_sample():
    # Half of the sample's 300 rows settle a threshold under which its 40th can be found.
    queries, keys = integers(20, 12), integers(900, 12)
    for shape in ("few", "large"):
        failures: list[int] = []
        how = sampled(stride=3, second=2, rank=40)
        result = search(queries, keys, 32, shape=shape, failures=failures, **how)
        expect(result, queries, keys, 32)
        assert failures == [0]


def test_the_plans_own_sample():
    # Past 8,192 keys the plan samples by itself, and past 524,288 samples the sample.
    queries, keys = integers(3, 8), integers(9000, 8)
    failures: list[int] = []
    expect(search(queries, keys, 50, failures=failures), queries, keys, 50)
    assert failures == [0]


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize(
    "forced",
    [
        {"rank": 1},  # too tight: too few candidates
        {"rank": 40, "capacity": 8},  # no room
        {"rank": 220, "capacity": 100},
        {"rank": 40, "fail_all": 1},
    ],
)
def test_what_goes_wrong_is_seen_and_made_good(dtype: torch.dtype, forced: dict[str, int]):
    queries, keys = integers(37, 16, dtype=dtype), integers(900, 16, dtype=dtype)
    cases = (("l2", 1, 256), ("ip", 2, 512), ("l2", 40, 256))
    for metric, owners, owner_words in cases if dtype == torch.float16 else cases[1:2]:
        failures: list[int] = []
        how = {"owners": owners, "owner_words": owner_words, "failures": failures}
        result = search(queries, keys, 32, metric, **sampled(**forced), **how)
        expect(result, queries, keys, 32, metric)
        assert failures == [37]


def test_only_the_failed_queries_take_the_other_path():
    # About 120 pass the 30th of 225, give or take 20: room for 120 is enough for some.
    queries, keys = integers(12, 8), integers(900, 8)
    failures: list[int] = []
    result = search(queries, keys, 20, failures=failures, **sampled(rank=30, capacity=120))
    expect(result, queries, keys, 20)
    assert 0 < failures[0] < 12


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("fail_all", [0, 1])
def test_orders_that_fill_lists(order: str, fail_all: int):
    queries, keys = torch.zeros(6, 4).half(), keys_in_order(order, 1000, 4)
    failures: list[int] = []
    result = search(
        queries,
        keys,
        100,
        failures=failures,
        **sampled(rank=60, fail_all=fail_all, owner_words=256, owners=3),
    )
    expect(result, queries, keys, 100)
    # Ties are settled by row in the threshold too: nothing overflows even where all are equal.
    assert failures == [6 * fail_all]


@pytest.mark.parametrize("seed", range(1, 5))
def test_the_order_of_threads_and_blocks_changes_nothing(seed: int):
    queries, keys = torch.randn(18, 20).half(), torch.randn(700, 20).half()
    keys[300:400] = keys[200:300]
    plain = search(queries, keys, 65, seed=0, **sampled(rank=60))
    for how in (sampled(rank=60), sampled(rank=1, owners=3)):
        again = search(queries, keys, 65, seed=seed, **how)
        assert torch.equal(plain[0], again[0]) and torch.equal(plain[1], again[1])
