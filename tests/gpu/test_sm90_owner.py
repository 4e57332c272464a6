"""The Hopper scan for few queries on a Hopper GPU: it runs where the plan says so, and gives what
the float64 reference and the portable kernels give. test_search.py runs over it too,
with KNNEXT_SM90=all.
"""

from __future__ import annotations

import pytest
import torch

import knnext
from knnext.testing import assert_search
from tests.gpu.runs import assert_same_bits_a_hundred_times
from tests.gpu.searches import (
    ORDERS,
    assert_exact,
    assert_late_keys_are_waited_for,
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
FORCED = {
    "as planned": "",
    "too tight": "stride=16,rank=1",
    "no room": "stride=16,rank=90,capacity=20",
    "all fail": "stride=16,rank=90,fail=1",
}


@pytest.fixture(autouse=True)
def _on_hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    needs_hopper(monkeypatch)


def test_it_runs_where_the_plan_says(monkeypatch) -> None:
    cases = (
        ("1", 8, 20_000, 64),
        ("1", 8, 16_000, 64),
        ("1", 64, 20_000, 1280),
        ("1", 64, 20_000, 1288),
        ("all", 8, 9000, 64),
        ("0", 8, 20_000, 64),
        ("1", 8, 20_000, 65),
    )
    assert_runs_where_the_plan_says("sm90_owner", cases, monkeypatch)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("q", [1, 7, 8, 9, 16, 17, 32, 33, 63, 64])
def test_every_number_of_queries(q: int, dtype: torch.dtype, metric: str) -> None:
    for n in (8193, 20_000, 70_001):
        assert_exact(integers(q, 72, dtype=dtype), integers(n, 72, dtype=dtype), 65, metric)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("dim", [8, 56, 64, 72, 128, 200, 768, 1024, 1280, 1600, 4096])
def test_every_dimension(dim: int, dtype: torch.dtype) -> None:
    for q in (3, 16, 64):
        queries, keys = integers(q, dim, dtype=dtype), integers(20_000, dim, dtype=dtype)
        for metric in METRICS:
            assert_exact(queries, keys, 100, metric)


@pytest.mark.parametrize("n", [16_384 + d for d in (-1, 0, 1, 127, 128, 129)])
def test_sizes_around_a_tile(n: int) -> None:
    assert_exact(integers(20, 40), integers(n, 40), 300)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("dim", [64, 1024])
def test_real_numbers(dim: int, dtype: torch.dtype, metric: str) -> None:
    queries, keys = gaussian(40, dim, dtype=dtype), gaussian(60_000, dim, dtype=dtype)
    got = knnext.knn_search(queries, keys, 128, metric)
    assert_search(got, queries, keys, 128, metric, kind="tensor_core")


@pytest.mark.parametrize("forced", FORCED)
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_forced_failures_change_nothing(forced: str, dtype: torch.dtype, monkeypatch) -> None:
    monkeypatch.setenv("KNNEXT_TEST_SEARCH", FORCED[forced])
    for metric in METRICS:
        before = knnext.failed_queries()
        assert_exact(integers(40, 40, dtype=dtype), integers(40_000, 40, dtype=dtype), 500, metric)
        assert knnext.failed_queries() - before == (0 if forced == "as planned" else 40)


@pytest.mark.parametrize("order", ORDERS)
def test_orders_that_fill_lists(order: str) -> None:
    queries, keys = integers(40, 16), keys_in_order(order)
    before = knnext.failed_queries()
    assert_exact(queries, keys, 1024)
    assert knnext.failed_queries() == before


def test_rows_apart_and_expanded() -> None:
    wide = integers(30_000, 104)
    for columns in (slice(8, 72), slice(3, 67)):
        assert_exact(wide[:20, columns], wide[:, columns], 50)
    assert_exact(wide[100:101, 8:72], wide[:, 16:80], 50)
    assert_exact(wide[:1, :64].expand(5, 64), wide[:, :64], 50)


@pytest.mark.parametrize("q", [1, 64])
def test_a_hundred_runs_give_the_same_bits(q: int) -> None:
    queries, keys = gaussian(q, 256), gaussian(100_000, 256)
    assert_same_bits_a_hundred_times(lambda: knnext.knn_search(queries, keys, 500))


def test_identical_keys_tie_by_index_wherever_they_lie() -> None:
    queries, keys = gaussian(50, 768), gaussian(30_000, 768)
    places = torch.tensor([0, 77, 128, 9999, 20_000, 29_999], device="cuda")
    keys[places] = queries[:1] + 0.01
    for q in (queries[:3], queries):
        distances, indices = knnext.knn_search(q, keys, 6)
        assert torch.equal(indices[0], places) and (distances[0] == distances[0, 0]).all()


def test_a_graph_replays_on_new_data() -> None:
    assert_replays_on_new_data(integers(30, 64), integers(40_000, 64))


def test_a_side_stream_is_kept_to() -> None:
    assert_late_keys_are_waited_for()
