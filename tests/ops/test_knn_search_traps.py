"""knn_search where other searches broke, each trap by its name."""

from __future__ import annotations

import pytest
import torch

import knnext
from knnext import reference
from knnext.testing import assert_equal_results, assert_search
from tests.ops.search_threads import FEW, MANY, SWEPT, threads_that_share  # noqa: F401

INF = float("inf")
NAN = float("nan")
COUNTS = [1, SWEPT, FEW, MANY]


def first(k: int, num_queries: int) -> torch.Tensor:
    return torch.arange(k).expand(num_queries, k)


@pytest.mark.parametrize("num_queries", COUNTS)
@pytest.mark.parametrize("metric", ["l2", "ip"])
def test_all_equal_keys_come_in_index_order(num_queries: int, metric: str) -> None:
    keys = torch.randn(1, 37).expand(20_000, 37)
    _, indices = knnext.knn_search(torch.randn(num_queries, 37), keys, 300, metric)
    assert torch.equal(indices, first(300, num_queries))


@pytest.mark.parametrize("num_queries", COUNTS)
def test_duplicates_across_tiles_blocks_and_threads(num_queries: int) -> None:
    base = torch.randn(40, 61)
    keys = base[torch.randint(0, 40, (30_011,))]
    queries = torch.randn(num_queries, 61)
    distances, indices = knnext.knn_search(queries, keys, 1500)
    assert_search((distances[:3], indices[:3]), queries[:3], keys, 1500)
    # Every copy of one key has the same bits, so within equal distances indices must ascend and be
    # the lowest there are.
    for q in range(min(3, num_queries)):
        for value in distances[q].unique()[:-1]:
            rows = indices[q][distances[q] == value]
            same = torch.unique((keys == keys[rows[0]]).all(1).nonzero().flatten())
            assert torch.isin(same, rows).all()


@pytest.mark.parametrize("num_queries", COUNTS)
@pytest.mark.parametrize("descending", [False, True])
def test_sorted_keys_do_not_overflow_a_list(num_queries: int, descending: bool) -> None:
    keys = torch.arange(20_000, dtype=torch.float32)[:, None] / 8
    if descending:
        keys = keys.flip(0)  # each key is nearer than all before it
    _, indices = knnext.knn_search(torch.zeros(num_queries, 1), keys, 100)
    want = first(100, num_queries)
    assert torch.equal(indices, 19_999 - want if descending else want)


@pytest.mark.parametrize("num_queries", COUNTS)
def test_one_giant_cluster(num_queries: int) -> None:
    # All distances to the far cluster round to one value: the order is by index.
    keys = torch.full((15_000, 4), 1000.0)
    keys[::1000] = 0.0
    _, indices = knnext.knn_search(torch.zeros(num_queries, 4), keys, 200)
    others = [i for i in range(300) if i % 1000][: 200 - 15]
    want = torch.tensor([*range(0, 15_000, 1000), *others])
    assert torch.equal(indices, want.expand(num_queries, 200))


@pytest.mark.slow
def test_k_2048_past_a_million_keys() -> None:
    keys = torch.randn((1 << 20) + 3, 2).half()
    queries = torch.randn(5, 2).half()
    got = knnext.knn_search(queries, keys, 2048)
    want = reference.knn_search(queries, keys, 2048, compute_dtype=torch.float64)
    assert torch.allclose(got[0].double(), want[0], atol=1e-5)
    assert_search(got, queries, keys, 2048)


def test_padding_is_last_and_has_no_offset() -> None:
    keys = torch.randn(5, 3)
    distances, indices = knnext.knn_search(torch.randn(2, 3), keys, 9, index_offset=1000)
    assert (indices[:, :5] >= 1000).all() and (indices[:, 5:] == -1).all()
    assert (distances[:, 5:] == INF).all() and (distances[:, :5] < INF).all()


def test_given_padding_stays_padding() -> None:
    init = {"init_distances": torch.zeros(2, 4), "init_indices": torch.full((2, 4), -1)}
    _, indices = knnext.knn_search(torch.randn(2, 3), torch.randn(2, 3), 4, index_offset=7, **init)
    assert (indices.sort(1).values == torch.tensor([-1, -1, 7, 8])).all()


def test_given_neighbors_tie_with_keys_by_index() -> None:
    keys, queries = torch.zeros(6, 2), torch.zeros(1, 2)
    init = {
        "init_distances": torch.zeros(1, 4),
        "init_indices": torch.tensor([[12, 3, 9, 100]]),
    }
    _, indices = knnext.knn_search(queries, keys, 4, index_offset=8, **init)
    assert indices.tolist() == [[3, 8, 9, 9]]  # one row may be found twice, if it was given
    _, indices = knnext.knn_search(queries, keys, 4, index_offset=1000, **init)
    assert indices.tolist() == [[3, 9, 12, 100]]


@pytest.mark.parametrize("num_queries", COUNTS)
@pytest.mark.parametrize("metric", ["l2", "ip"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_a_key_with_nan_is_never_returned(num_queries: int, metric: str, dtype) -> None:
    keys = torch.randn(200, 9).to(dtype)
    keys[::2, 3] = NAN
    _, indices = knnext.knn_search(torch.randn(num_queries, 9).to(dtype), keys, 150, metric)
    assert (indices[:, :100] % 2 == 1).all() and (indices[:, 100:] == -1).all()


@pytest.mark.parametrize("metric", ["l2", "ip"])
@pytest.mark.parametrize("refine", [False, True])
def test_a_query_with_nan_gets_padding(metric: str, refine: bool) -> None:
    queries = torch.randn(20, 9)
    queries[::2, 1] = NAN
    distances, indices = knnext.knn_search(queries, torch.randn(99, 9), 4, metric, refine=refine)
    assert (indices[::2] == -1).all() and (distances[::2] == INF).all()
    assert (indices[1::2] >= 0).all()


@pytest.mark.parametrize("metric", ["l2", "ip"])
@pytest.mark.parametrize("value", [INF, -INF])
def test_rows_of_infinity(metric: str, value: float) -> None:
    queries, keys = torch.randn(3, 5), torch.randn(60, 5)
    keys[10] = value
    keys[20, 2] = value
    queries[1] = value
    got = knnext.knn_search(queries, keys, 60, metric)
    assert_equal_results(got, _by_definition(queries, keys, metric))


def _by_definition(queries: torch.Tensor, keys: torch.Tensor, metric: str):
    """Float32 distances that the search itself gives, key by key, in order."""
    parts = [
        knnext.knn_search(queries, keys[i : i + 1], 1, metric, index_offset=i)
        for i in range(keys.shape[0])
    ]
    return reference.merge_topk(*(torch.cat(p, 1) for p in zip(*parts, strict=True)), keys.shape[0])


@pytest.mark.parametrize("refine", [False, True])
def test_an_inner_product_that_is_infinite_is_no_neighbor(refine: bool) -> None:
    keys = torch.tensor([[1.0], [INF], [2.0], [INF], [-INF]])
    distances, indices = knnext.knn_search(torch.ones(1, 1), keys, 5, "ip", refine=refine)
    assert indices.tolist() == [[2, 0, -1, -1, -1]]
    assert distances.tolist() == [[-2.0, -1.0, INF, INF, INF]]


def test_negative_zero_ties_with_zero() -> None:
    keys = torch.tensor([[0.0], [-0.0], [0.0], [-0.0]])
    for query in (1.0, -1.0):
        for refine in (False, True):
            _, indices = knnext.knn_search(torch.full((1, 1), query), keys, 4, "ip", refine=refine)
            assert indices.tolist() == [[0, 1, 2, 3]]


def test_all_zero_rows() -> None:
    distances, indices = knnext.knn_search(torch.zeros(2, 6), torch.zeros(70, 6), 70)
    assert (distances == 0).all() and torch.equal(indices, first(70, 2))


def test_squared_norms_past_the_range_of_half() -> None:
    keys = (torch.randn(300, 64) * 200).half()  # |x|^2 near 2.5 million
    queries = (torch.randn(4, 64) * 200).half()
    assert_search(knnext.knn_search(queries, keys, 20), queries, keys, 20)
    assert (knnext.knn_search(queries, keys, 20)[0] > 65_504).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_near_identical_rows_of_large_norm(dtype: torch.dtype) -> None:
    base = torch.randn(1, 512) * 40
    keys = (base + torch.randn(400, 512) * 0.05).to(dtype)
    queries = keys[:7].clone()
    got = knnext.knn_search(queries, keys, 10, refine=True)
    assert torch.equal(got[1][:, 0], torch.arange(7)) and (got[0][:, 0] == 0).all()
    assert_search(got, queries, keys, 10)
    plain = knnext.knn_search(queries, keys, 10)
    # Norm and product are summed in one order, so the expanded form cancels to 0 as well.
    assert (plain[0][:, 0] == 0).all() and torch.equal(plain[1][:, 0], torch.arange(7))
    assert (plain[0] >= 0).all()


def test_float16_subnormals() -> None:
    keys = (torch.arange(-50, 50).float()[:, None] * 2.0**-24).half()
    distances, indices = knnext.knn_search(keys, keys, 3, "l2", refine=True)
    assert torch.equal(indices[:, 0], torch.arange(100)) and (distances[:, 0] == 0).all()
    largest = torch.tensor([[65504.0], [-65504.0]]).half()
    assert knnext.knn_search(largest, largest, 1)[1].tolist() == [[0], [1]]


@pytest.mark.parametrize("num_queries", [1, pytest.param(70, marks=pytest.mark.slow)])
def test_more_than_2_31_elements(num_queries: int) -> None:
    # The rows lie on one another: 2^31 elements and more, in a few kilobytes.
    dim, num_keys = 4096, (1 << 19) + 5
    row = torch.randn(1, dim).half()
    keys = row.expand(num_keys, dim)
    norms = torch.full((num_keys,), 1e9)
    norms[-3:] = torch.tensor([3.0, 2.0, 1.0])
    queries = torch.zeros(num_queries, dim).half()
    distances, indices = knnext.knn_search(queries, keys, 3, key_sqnorms=norms)
    want = torch.tensor([num_keys - 1, num_keys - 2, num_keys - 3])
    assert torch.equal(indices, want.expand(num_queries, 3))
    assert torch.equal(distances, torch.tensor([1.0, 2.0, 3.0]).expand(num_queries, 3))


@pytest.mark.slow
def test_more_than_2_32_keys() -> None:
    # Rows pass 32 bits: the keys are searched in two runs.
    num_keys = (1 << 32) + 100
    keys = torch.ones(1, 1).half().expand(num_keys, 1)
    distances, indices = knnext.knn_search(torch.zeros(1, 1).half(), keys, 3)
    assert indices.tolist() == [[0, 1, 2]] and distances.tolist() == [[1.0, 1.0, 1.0]]
