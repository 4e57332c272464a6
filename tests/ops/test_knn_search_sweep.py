"""A few queries are compared with the keys where they lie. Nothing of the answer may tell: it has
the bits that a larger batch gets, in which keys are packed."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import knnext
from knnext import _host
from knnext.testing import assert_equal_results, assert_search
from tests.ops.test_knn_search_refine import CLOUDS

INF, NAN = float("inf"), float("nan")
DTYPES = [torch.float16, torch.bfloat16, torch.float32]
METRICS = ["l2", "ip"]
NUM_KEYS, K, BATCH = 1100, 40, 30
PARTS = [(0, 1), (1, 2), (3, 3), (6, 4), (10, 5), (15, 7), (22, 8)]


def kernel(queries: int, keys: int, dim: int, k: int) -> str:
    plan = _host.SearchPlan(
        queries=queries, entries=keys, dim=dim, k=k, num_units=torch.get_num_threads()
    )
    return plan.kernel.rpartition("_")[2]


def assert_parts_are_as_the_whole(queries: Tensor, keys: Tensor, k: int = K, **options) -> None:
    whole = knnext.knn_search(queries, keys, k, **options)
    for first, count in PARTS:
        rows = slice(first, first + count)
        part = {
            name: value[rows] if name.startswith("init") else value
            for name, value in options.items()
        }
        got = knnext.knn_search(queries[rows], keys, k, **part)
        assert_equal_results(got, (whole[0][rows], whole[1][rows]))


def test_the_parts_are_swept_and_the_whole_is_not() -> None:
    assert kernel(BATCH, NUM_KEYS, 64, K) == "keys"
    assert {kernel(count, NUM_KEYS, 64, K) for _, count in PARTS} == {"sweep"}
    # Where most keys would be computed twice, packing them is cheaper.
    assert kernel(1, NUM_KEYS, 64, NUM_KEYS // 4) == "keys"


@pytest.mark.parametrize("refine", [False, True])
@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", [1, 7, 8, 31, 33, 64, 100, 129, 576, 1600, 4096])
def test_shapes_and_dtypes(dim: int, dtype: torch.dtype, metric: str, refine: bool) -> None:
    queries, keys = torch.randn(BATCH, dim).to(dtype), torch.randn(NUM_KEYS, dim).to(dtype)
    queries[4] = keys[777]
    assert_parts_are_as_the_whole(queries, keys, metric=metric, refine=refine)
    assert_search(knnext.knn_search(queries[:2], keys, K, metric), queries[:2], keys, K, metric)


@pytest.mark.parametrize("given", ["nothing", "norms", "neighbors"])
@pytest.mark.parametrize("refine", [False, True])
@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("name", CLOUDS)
def test_clouds(name: str, metric: str, refine: bool, given: str) -> None:
    """Among them those of which the sweep's bounds say too little, or nothing."""
    queries, keys = CLOUDS[name](BATCH, 48), CLOUDS[name](NUM_KEYS, 48)
    queries[0] = keys[5]
    options: dict = {"metric": metric, "refine": refine}
    if given == "norms":
        options["key_sqnorms"] = knnext.key_sqnorms(keys)
    if given == "neighbors":
        found = knnext.knn_search(queries, keys[:300], K, metric, refine=refine)
        options |= {"init_distances": found[0], "init_indices": found[1], "index_offset": 300}
        keys = keys[300:]
    assert_parts_are_as_the_whole(queries, keys, **options)


@pytest.mark.parametrize("metric", METRICS)
def test_norms_that_are_none(metric: str) -> None:
    """The expanded form takes them as they are; the bounds must not take them for true."""
    queries, keys = torch.randn(BATCH, 70), torch.randn(NUM_KEYS, 70)
    true = knnext.key_sqnorms(keys)
    scale = 10.0 ** torch.randint(-3, 4, true.shape).float()
    for norms in (true * 1.5 - 70, true * scale, -true * scale, torch.zeros_like(true)):
        norms[::50] = torch.tensor([NAN, INF, -INF, 1e38])[torch.arange(0, 22) % 4]
        assert_parts_are_as_the_whole(queries, keys, metric=metric, key_sqnorms=norms)


@pytest.mark.parametrize("refine", [False, True])
@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_that_are_no_numbers(dtype: torch.dtype, metric: str, refine: bool) -> None:
    queries, keys = torch.randn(BATCH, 50).to(dtype), torch.randn(NUM_KEYS, 50).to(dtype)
    for row, value in enumerate((NAN, INF, -INF, torch.finfo(dtype).max)):
        keys[row::5, row] = value
        queries[7 * row, 3] = value
    assert_parts_are_as_the_whole(queries, keys, metric=metric, refine=refine)
    keys[:] = NAN
    assert (knnext.knn_search(queries[:3], keys, K, metric, refine=refine)[1] == -1).all()


@pytest.mark.parametrize("refine", [False, True])
@pytest.mark.parametrize("num_keys", [0, 1, 7, 15, 16, 17, 47, 48, 49, 500])
def test_numbers_of_keys(num_keys: int, refine: bool) -> None:
    queries, keys = torch.randn(BATCH, 20), torch.randn(num_keys, 20)
    for k in (1, 3, 16, 63):
        assert_parts_are_as_the_whole(queries, keys, k, refine=refine)


@pytest.mark.parametrize("refine", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("how", ["transposed", "rows", "columns", "expanded"])
def test_strides(how: str, dtype: torch.dtype, refine: bool) -> None:
    plain = torch.randn(2 * NUM_KEYS, 99).to(dtype)
    keys = {
        "transposed": plain.T.contiguous().T,
        "rows": plain[1::2],
        "columns": plain[:, 1::3],
        "expanded": plain[:1].expand(NUM_KEYS, 99),
    }[how]
    queries = torch.randn(BATCH, keys.shape[1]).to(dtype)
    assert_parts_are_as_the_whole(queries, keys, refine=refine)
    assert_equal_results(
        knnext.knn_search(queries[:2], keys, K, refine=refine),
        knnext.knn_search(queries[:2], keys.contiguous(), K, refine=refine),
    )
