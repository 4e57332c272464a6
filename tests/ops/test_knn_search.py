"""knn_search against the float64 oracle: shapes, dtypes, strides, init, refine, order of ties."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import knnext
from knnext import _host, reference
from knnext.testing import assert_equal_results, assert_search, assert_topk_close
from tests.ops.search_threads import FEW, MANY, SWEPT, threads_that_share  # noqa: F401

DTYPES = [torch.float16, torch.bfloat16, torch.float32]
METRICS = ["l2", "ip"]


def integers(*shape: int, dtype: torch.dtype = torch.float32, high: int = 4) -> torch.Tensor:
    """Small integers: every product and sum is exact in float32, so results must be equal."""
    return torch.randint(1 - high, high, shape).to(dtype)


def assert_exact(queries: torch.Tensor, keys: torch.Tensor, k: int, metric: str, **kwargs) -> None:
    got = knnext.knn_search(queries, keys, k, metric, **kwargs)
    want = reference.knn_search(queries, keys, k, metric, compute_dtype=torch.float64, **kwargs)
    assert_equal_results(got, want)


@pytest.mark.parametrize("num_queries", [1, SWEPT, FEW, MANY])
def test_every_division_of_the_work_is_tested(num_queries: int) -> None:
    plan = _host.SearchPlan(
        queries=num_queries, entries=3000, dim=19, k=100, num_units=torch.get_num_threads()
    )
    division = {FEW: "_keys", MANY: "_queries"}.get(num_queries, "_sweep")
    assert plan.kernel.endswith(division)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_queries", [1, SWEPT, FEW, MANY])
@pytest.mark.parametrize("dim", [1, 7, 65, 768, 1600])
def test_random_vectors(metric: str, dtype: torch.dtype, num_queries: int, dim: int) -> None:
    queries = torch.randn(num_queries, dim).to(dtype)
    keys = torch.randn(500, dim).to(dtype)
    assert_search(knnext.knn_search(queries, keys, 20, metric), queries, keys, 20, metric)


def test_wide_rows() -> None:
    queries, keys = torch.randn(9, 4096).half(), torch.randn(200, 4096).half()
    assert_search(knnext.knn_search(queries, keys, 30), queries, keys, 30)
    assert_exact(integers(9, 4099), integers(200, 4099), 30, "l2")


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_queries", [SWEPT, FEW, MANY])
def test_integers_give_equal_results_with_order(metric, dtype, num_queries) -> None:
    queries, keys = integers(num_queries, 19, dtype=dtype), integers(3000, 19, dtype=dtype)
    assert_exact(queries, keys, 100, metric)


@settings(max_examples=60, deadline=None)
@given(
    num_queries=st.integers(0, 40),
    num_keys=st.integers(0, 400),
    dim=st.integers(1, 70),
    k=st.integers(1, 130),
    num_init=st.one_of(st.none(), st.integers(0, 150)),
    high=st.integers(1, 5),
    dtype=st.sampled_from(DTYPES),
    metric=st.sampled_from(METRICS),
    with_sqnorms=st.booleans(),
    refine=st.booleans(),
    offset=st.sampled_from([0, 3, 1 << 40]),
    seed=st.integers(0, 1 << 30),
)
def test_any_arguments(
    num_queries, num_keys, dim, k, num_init, high, dtype, metric, with_sqnorms, refine, offset, seed
) -> None:
    torch.manual_seed(seed)
    queries = integers(num_queries, dim, dtype=dtype, high=high)
    keys = integers(num_keys, dim, dtype=dtype, high=high)
    kwargs: dict = {"index_offset": offset, "refine": refine}
    if with_sqnorms:
        kwargs["key_sqnorms"] = knnext.key_sqnorms(keys)
    if num_init is not None:
        kwargs["init_distances"] = torch.randint(-20, 90, (num_queries, num_init)).float()
        kwargs["init_indices"] = torch.randint(-1, 500, (num_queries, num_init))
    assert_exact(queries, keys, k, metric, **kwargs)


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 1 << 30), metric=st.sampled_from(METRICS), refine=st.booleans())
def test_any_real_vectors(seed: int, metric: str, refine: bool) -> None:
    torch.manual_seed(seed)
    queries, keys = torch.randn(11, 50), torch.randn(700, 50) * torch.rand(700, 1) * 30
    got = knnext.knn_search(queries, keys, 40, metric, refine=refine)
    assert_search(got, queries, keys, 40, metric)


@pytest.mark.parametrize("k", [1, 2, 64, 65, 1024, 1025, 2048, 2049, 5000])
@pytest.mark.parametrize("num_queries", [SWEPT, FEW, MANY])
def test_k(k: int, num_queries: int) -> None:
    assert_exact(integers(num_queries, 5), integers(6000, 5), k, "l2")


@pytest.mark.parametrize("num_keys", [1, 7, 8, 9, 15, 16, 17, 47, 48, 49, 95, 96, 97])
@pytest.mark.parametrize("num_queries", [1, 4, 5, 6, 7, 8, 9, 63, 64, 65])
def test_sizes_about_the_tiles(num_keys: int, num_queries: int) -> None:
    assert_exact(integers(num_queries, 3), integers(num_keys, 3), 10, "l2")


@pytest.mark.parametrize("delta", [-1, 0, 1])
@pytest.mark.parametrize("num_queries", [SWEPT, FEW, pytest.param(MANY, marks=pytest.mark.slow)])
def test_keys_about_a_packed_block(delta: int, num_queries: int) -> None:
    plan = _host.SearchPlan(
        queries=num_queries, entries=1 << 20, dim=129, k=50, num_units=torch.get_num_threads()
    )
    assert_exact(integers(num_queries, 129), integers(2 * plan.key_tile + delta, 129), 50, "l2")


@pytest.mark.parametrize("shape", [(0, 50), (5, 0), (0, 0)])
def test_nothing_to_search(shape: tuple[int, int]) -> None:
    assert_exact(torch.randn(shape[0], 8), torch.randn(shape[1], 8), 4, "l2")


def test_no_keys_keep_the_given_neighbors() -> None:
    init_d, init_i = torch.tensor([[3.0, 1.0, 2.0]]), torch.tensor([[5, -1, 7]])
    distances, indices = knnext.knn_search(
        torch.randn(1, 4), torch.randn(0, 4), 3, init_distances=init_d, init_indices=init_i
    )
    assert indices.tolist() == [[7, 5, -1]]
    assert distances.tolist() == [[2.0, 3.0, float("inf")]]


@pytest.mark.parametrize("which", ["queries", "keys", "both"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("how", ["transposed", "sliced rows", "sliced columns", "expanded"])
def test_strides(which: str, dtype: torch.dtype, how: str) -> None:
    def strided(rows: int) -> torch.Tensor:
        if how == "transposed":
            return integers(33, rows, dtype=dtype).T
        if how == "sliced rows":
            return integers(3 * rows, 33, dtype=dtype)[1::3]
        if how == "sliced columns":
            return integers(rows, 100, dtype=dtype)[:, 1::3]
        return integers(1, 33, dtype=dtype).expand(rows, 33)

    def plain(rows: int) -> torch.Tensor:
        return integers(rows, 33, dtype=dtype)

    queries = (strided if which != "keys" else plain)(20)
    keys = (strided if which != "queries" else plain)(400)
    got = knnext.knn_search(queries, keys, 9)
    assert_equal_results(got, knnext.knn_search(queries.contiguous(), keys.contiguous(), 9))
    assert_exact(queries, keys, 9, "ip", refine=True)


def test_strided_optional_arguments() -> None:
    queries, keys = integers(6, 5), integers(90, 5)
    norms = knnext.key_sqnorms(keys).repeat_interleave(2)[::2]
    init_d = torch.randint(0, 30, (8, 6)).float().T
    init_i = torch.arange(48).reshape(8, 6).T
    kwargs = {"key_sqnorms": norms, "init_distances": init_d, "init_indices": init_i}
    assert_exact(queries, keys, 7, "l2", **kwargs)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("num_queries", [SWEPT, FEW, MANY])
@pytest.mark.parametrize("dtype", DTYPES)
def test_chunks_and_shards_give_the_bits_of_one_search(metric, num_queries, dtype) -> None:
    queries, keys = torch.randn(num_queries, 70).to(dtype), torch.randn(2500, 70).to(dtype)
    keys[1200:] = keys[:1300].clone()  # each key twice, on both sides of most borders
    whole = knnext.knn_search(queries, keys, 200, metric)
    chunked: dict = {}
    for start, stop in [(0, 1), (1, 700), (700, 700), (700, 1900), (1900, 2500)]:
        distances, indices = knnext.knn_search(
            queries, keys[start:stop], 200, metric, index_offset=start, **chunked
        )
        chunked = {"init_distances": distances, "init_indices": indices}
    assert_equal_results((distances, indices), whole)
    shards = [
        knnext.knn_search(queries, keys[a : a + 500], 200, metric, index_offset=a)
        for a in (1500, 0, 2000, 1000, 500)
    ]
    merged = knnext.merge_topk(*(torch.cat(parts, 1) for parts in zip(*shards, strict=True)), 200)
    assert_equal_results(merged, whole)


@pytest.mark.parametrize("metric", METRICS)
def test_batches_of_queries_give_the_bits_of_one_search(metric: str) -> None:
    queries, keys = torch.randn(150, 100), torch.randn(3000, 100)
    distances, indices = knnext.knn_search(queries, keys, 50, metric)
    for rows in (slice(0, 1), slice(3, 10), slice(77, 150)):
        part = knnext.knn_search(queries[rows], keys, 50, metric)
        assert_equal_results(part, (distances[rows], indices[rows]))


def test_given_sqnorms_are_used_as_they_are() -> None:
    queries, keys = integers(4, 6), integers(50, 6)
    norms = knnext.key_sqnorms(keys)
    assert_equal_results(
        knnext.knn_search(queries, keys, 9, key_sqnorms=norms), knnext.knn_search(queries, keys, 9)
    )
    pushed = norms.clone()
    pushed[7] = -1e6
    pushed[8] = float("nan")
    _, indices = knnext.knn_search(queries, keys, 50, key_sqnorms=pushed)
    assert (indices[:, 0] == 7).all() and not (indices == 8).any()


def test_refine_is_rescore_of_the_winners() -> None:
    queries, keys = torch.randn(12, 90) + 50, torch.randn(800, 90) + 50
    distances, indices = knnext.knn_search(queries, keys, 25, refine=True)
    torch.testing.assert_close(distances, knnext.rescore(queries, keys, indices), rtol=0, atol=0)
    assert_search((distances, indices), queries, keys, 25)


def test_refine_leaves_given_distances_alone() -> None:
    queries, keys = integers(2, 5), integers(40, 5)
    init = {"init_distances": torch.full((2, 1), -7.0), "init_indices": torch.full((2, 1), 1000)}
    distances, indices = knnext.knn_search(queries, keys, 3, refine=True, **init)
    assert (distances[:, 0] == -7.0).all() and (indices[:, 0] == 1000).all()


def test_against_the_reference_in_float32() -> None:
    queries, keys = torch.randn(30, 128), torch.randn(4000, 128)
    slack = 2e-6 * 400
    want = reference.knn_search(queries, keys, 64)
    assert_topk_close(knnext.knn_search(queries, keys, 64), want, slack)
