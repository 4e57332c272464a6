"""The Hopper scan for many queries on a Hopper GPU, with clusters of one block and of two: it runs
where the plan says so, and gives what the float64 reference and the portable kernels give.
test_search.py runs over it too, with KNNEXT_SM90=all.
"""

from __future__ import annotations

import pytest
import torch

import knnext
from knnext import reference
from knnext.testing import assert_equal_results, assert_search
from tests.gpu.runs import assert_same_bits_a_hundred_times
from tests.gpu.searches import (
    ORDERS,
    assert_exact,
    assert_replays_on_new_data,
    assert_runs_where_the_plan_says,
    gaussian,
    integers,
    keys_in_order,
    needs_hopper,
)

pytestmark = pytest.mark.gpu
HALVES = [torch.float16, torch.bfloat16]
METRICS = ["l2", "ip"]
CLUSTERS = ["cluster=1", "cluster=2"]
FORCED = {
    "as planned": "",
    "too tight": "stride=16,rank=1",
    "no room": "stride=16,rank=90,capacity=20",
    "all fail": "stride=16,rank=90,fail=1",
    "a sample of the sample": "stride=3,second=5,rank=300",
}
FAILS = {"too tight", "no room", "all fail"}


@pytest.fixture(autouse=True)
def _on_hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    needs_hopper(monkeypatch)


@pytest.fixture(params=CLUSTERS)
def cluster(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("KNNEXT_TEST_SEARCH", request.param)
    return str(request.param)


def test_it_runs_where_the_plan_says(monkeypatch) -> None:
    cases = (
        ("1", 65, 100_000, 64),
        ("1", 4096, 100_000, 64),
        ("1", 300, 20_000, 64),
        ("all", 300, 20_000, 64),
        ("0", 300, 100_000, 64),
        ("1", 300, 100_000, 65),
    )
    assert_runs_where_the_plan_says("sm90_filter", cases, monkeypatch)


# Shapes


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("q", [65, 127, 128, 129, 256, 257, 1000, 2100])
def test_every_number_of_queries(q: int, dtype: torch.dtype, metric: str, cluster: str) -> None:
    for n in (8193, 70_001):
        assert_exact(integers(q, 72, dtype=dtype), integers(n, 72, dtype=dtype), 65, metric)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("dim", [8, 56, 64, 72, 128, 192, 200, 256, 768, 1024, 1600, 4096])
def test_every_dimension(dim: int, dtype: torch.dtype, cluster: str) -> None:
    for q in (65, 260):
        queries, keys = integers(q, dim, dtype=dtype), integers(20_000, dim, dtype=dtype)
        for metric in METRICS:
            assert_exact(queries, keys, 100, metric)


@pytest.mark.parametrize("n", [16_384 + d for d in (-1, 0, 1, 255, 256, 257)])
def test_sizes_around_a_tile(n: int, cluster: str) -> None:
    for metric in METRICS:
        assert_exact(integers(200, 40), integers(n, 40), 300, metric)


@pytest.mark.parametrize("k", [1, 64, 1024, 1025, 2048, 4096])
def test_every_k(k: int, cluster: str) -> None:
    assert_exact(integers(200, 24), integers(100_000, 24), k)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("dim", [64, 1024])
def test_real_numbers(dim: int, dtype: torch.dtype, metric: str, cluster: str) -> None:
    queries, keys = gaussian(300, dim, dtype=dtype), gaussian(200_000, dim, dtype=dtype)
    before = knnext.failed_queries()
    got = knnext.knn_search(queries, keys, 128, metric)
    assert_search(got, queries, keys, 128, metric, kind="tensor_core")
    assert knnext.failed_queries() == before


def test_far_from_the_origin_no_one_is_lost(cluster: str) -> None:
    # Distances are all rounding error: the quick test before the exact one must let all pass.
    keys = (torch.randn(100_000, 128, device="cuda") * 0.02 + 20).half()
    before = knnext.failed_queries()
    got = knnext.knn_search(keys[:300], keys, 1000)
    assert_search(got, keys[:300], keys, 1000, "l2", kind="tensor_core")
    assert knnext.failed_queries() == before


def test_rows_apart_and_unaligned(cluster: str) -> None:
    wide = integers(30_000, 104)
    wide[:, 96:] = float("nan")
    for columns in (slice(8, 72), slice(8, 96), slice(3, 67)):
        assert_exact(wide[:200, columns], wide[:, columns], 50)
    assert_exact(wide[:1, :64].expand(200, 64), wide[:, :64], 50)


# What happens when a list fails


@pytest.mark.parametrize("forced", FORCED)
@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("size", CLUSTERS)
def test_forced_failures_change_nothing(
    forced: str, dtype: torch.dtype, size: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KNNEXT_TEST_SEARCH", ",".join(filter(None, (FORCED[forced], size))))
    for q, metric in ((130, "l2"), (300, "ip")):
        before = knnext.failed_queries()
        assert_exact(integers(q, 40, dtype=dtype), integers(40_000, 40, dtype=dtype), 500, metric)
        assert knnext.failed_queries() - before == (q if forced in FAILS else 0)


@pytest.mark.parametrize("order", ORDERS)
def test_orders_that_fill_lists(order: str, cluster: str) -> None:
    assert_exact(integers(140, 16), keys_in_order(order), 1024)


def test_a_store_with_a_period_does_not_bend_the_sample(cluster: str) -> None:
    # Keys near the queries come at one place of every 64, 128 or 512 rows.
    for period in (64, 128, 512):
        keys = gaussian(400_000, 64) + 3
        keys[::period] = gaussian(len(keys[::period]), 64)
        before = knnext.failed_queries()
        knnext.knn_search(gaussian(200, 64), keys, 256)
        assert knnext.failed_queries() == before, period


@pytest.mark.parametrize("metric", METRICS)
def test_nan_and_infinity(metric: str, cluster: str) -> None:
    queries, keys = integers(130, 16), integers(20_000, 16)
    keys[::3, 4] = float("nan")
    keys[1, 0], keys[4, 1], keys[10_000, 2] = float("inf"), -float("inf"), float("inf")
    queries[2, 3], queries[3, 0] = float("nan"), float("inf")
    assert_exact(queries, keys, 200, metric)
    keys[:] = float("nan")
    assert_exact(queries, keys, 200, metric)


# The machine


@pytest.mark.parametrize("q", [65, 1000])
def test_a_hundred_runs_give_the_same_bits(q: int, cluster: str) -> None:
    queries, keys = gaussian(q, 256), gaussian(100_000, 256)
    assert_same_bits_a_hundred_times(lambda: knnext.knn_search(queries, keys, 500))


def test_both_sizes_of_clusters_give_the_same_bits(monkeypatch) -> None:
    queries, keys = gaussian(700, 320), gaussian(150_000, 320)
    results = []
    for size in CLUSTERS:
        monkeypatch.setenv("KNNEXT_TEST_SEARCH", size)
        results.append(knnext.knn_search(queries, keys, 700))
    assert_equal_results(*results)


def test_identical_keys_tie_by_index_wherever_they_lie(cluster: str) -> None:
    queries, keys = gaussian(150, 768), gaussian(30_000, 768)
    places = torch.tensor([0, 77, 128, 9999, 20_000, 29_999], device="cuda")
    keys[places] = queries[:1] + 0.01
    distances, indices = knnext.knn_search(queries, keys, 6)
    assert torch.equal(indices[0], places) and (distances[0] == distances[0, 0]).all()


def test_a_graph_replays_on_new_data(cluster: str) -> None:
    assert_replays_on_new_data(integers(140, 64), integers(40_000, 64))


def test_more_keys_than_a_chunk(cluster: str) -> None:
    keys, queries = integers((1 << 24) + 5000, 8, high=100), integers(130, 8, high=100)
    got = knnext.knn_search(queries, keys, 300)
    wanted = reference.rescore(queries, keys, got[1], compute_dtype=torch.float64)
    assert torch.equal(got[0].double(), wanted)
    halves = [knnext.knn_search(queries, keys[: 1 << 23], 300)]
    halves.append(knnext.knn_search(queries, keys[1 << 23 :], 300, index_offset=1 << 23))
    want = reference.merge_topk(
        torch.cat([h[0] for h in halves], 1), torch.cat([h[1] for h in halves], 1), 300
    )
    assert_equal_results(got, want)
