"""The CUDA search, its real kernel source run on the host: tiles, lists, thresholds, what happens
when they fail, order and ties. Shapes are small; the plan's choices are forced to meet what only
large shapes would (see tests/emulator/api_search.cpp).

Keys and queries are mostly small integers: every distance is then exact in float32, and results
must equal the reference's to the bit, ties included.
"""

from __future__ import annotations

import ctypes
from typing import Any

import pytest
import torch
from emulator.build import call, compiler_found, load
from torch import Tensor

from knnext import reference

pytestmark = pytest.mark.skipif(not compiler_found(), reason="no C++ compiler to build it with")
INF = float("inf")
DTYPES = {torch.float16: 0, torch.bfloat16: 1, torch.float32: 2}
SHAPES = {"auto": 0, "few": 1, "small": 2, "large": 3}
FIELDS = [
    "dtype",
    "num_queries",
    "num_keys",
    "dim",
    "k",
    "inner_product",
    "index_offset",
    "num_init",
    "refine",
    "query_stride",
    "key_stride",
    "shape",
    "resident",
    "chunk_keys",
    "queries_per_pass",
    "num_units",
    "stride",
    "rank",
    "capacity",
    "fail_all",
    "owners",
    "owner_words",
    "num_failed",
]


class Options(ctypes.Structure):
    _fields_ = [(name, ctypes.c_int64) for name in FIELDS]


def search(
    queries: Tensor,
    keys: Tensor,
    k: int,
    metric: str = "l2",
    *,
    seed: int = 1,
    shape: str = "auto",
    init: tuple[Tensor, Tensor] | None = None,
    key_sqnorms: Tensor | None = None,
    failures: list[int] | None = None,
    **options: int,
) -> tuple[Tensor, Tensor]:
    """The emulated search. ``failures`` receives how many queries left the usual path."""
    num_queries, dim = queries.shape
    o = Options(resident=-1, num_units=3)
    o.dtype, o.num_queries, o.num_keys = DTYPES[keys.dtype], num_queries, keys.shape[0]
    o.dim, o.k, o.inner_product, o.shape = dim, k, metric == "ip", SHAPES[shape]
    o.query_stride, o.key_stride = queries.stride(0), keys.stride(0)
    for name, value in options.items():
        assert name in FIELDS
        setattr(o, name, value)
    o.num_init = init[0].shape[1] if init else 0
    distances = torch.full((num_queries, k), float("nan"))
    indices = torch.full((num_queries, k), -7)
    pointer = [ctypes.c_void_p(t.data_ptr()) for t in (queries, keys)]
    earlier = init or (None, None)
    call(
        load().emulate_knn_search,
        seed,
        ctypes.byref(o),
        *pointer,
        key_sqnorms,
        *earlier,
        distances,
        indices,
    )
    if failures is not None:
        failures.append(o.num_failed)
    return distances, indices


def expect(result: tuple[Tensor, Tensor], *args: Any, **kwargs: Any) -> None:
    distances, indices = reference.knn_search(*args, **kwargs, compute_dtype=torch.float64)
    assert torch.equal(result[1], indices), (result[1] != indices).nonzero()[:5]
    assert torch.equal(result[0], distances.float())


def integers(*size: int, dtype: torch.dtype = torch.float16, high: int = 4) -> Tensor:
    return torch.randint(-high, high + 1, size).to(dtype)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


# Tiles


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


@pytest.mark.parametrize("dtype", DTYPES)
def test_real_numbers_come_close(dtype: torch.dtype):
    queries, keys = torch.randn(20, 96).to(dtype), torch.randn(400, 96).to(dtype)
    for metric in ("l2", "ip"):
        distances, indices = search(queries, keys, 400, metric)
        wanted = reference.rescore(queries, keys, indices, metric, torch.float64)
        torch.testing.assert_close(distances.double(), wanted, rtol=2e-6, atol=2e-5)
        assert (distances.diff(dim=1) >= 0).all()


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


def sampled(**more: int) -> dict[str, int]:
    """One sample of one key in four; about 2 k candidates."""
    return {"stride": 4, **more}


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


def test_the_plans_own_sample():
    # Past 8,192 keys the plan samples by itself, and past 524,288 samples the sample.
    queries, keys = integers(3, 8), integers(9000, 8)
    failures: list[int] = []
    expect(search(queries, keys, 50, failures=failures), queries, keys, 50)
    assert failures == [0]


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


@pytest.mark.parametrize("order", ["near to far", "far to near", "equal", "one giant cluster"])
@pytest.mark.parametrize("fail_all", [0, 1])
def test_orders_that_fill_lists(order: str, fail_all: int):
    keys = integers(1000, 4, high=9)
    queries = torch.zeros(6, 4).half()
    by_distance = keys.float().square().sum(1).argsort(stable=True)
    if order == "near to far":
        keys = keys[by_distance].contiguous()
    elif order == "far to near":
        keys = keys[by_distance.flip(0)].contiguous()
    elif order == "equal":
        keys[:] = 3
    else:
        keys[100:950] = integers(1, 4)
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


# Order, ties, padding


def test_duplicates_across_tiles_and_across_the_kth_place():
    base = integers(60, 12)
    keys = base.repeat(10, 1)
    queries = base[:9]
    for k in (1, 5, 15, 64, 65):
        expect(search(queries, keys, k), queries, keys, k)
        expect(search(queries, keys, k, **sampled(rank=50)), queries, keys, k)


@pytest.mark.parametrize("k", [1, 64, 65, 127, 128, 129, 1024, 1025, 2048, 2049, 4100])
def test_every_size_of_selection(k: int):
    queries, keys = integers(2, 3), integers(4097, 3)
    expect(search(queries, keys, k), queries, keys, k)
    if k in (65, 1025, 2049):
        failures: list[int] = []
        result = search(queries, keys, k, failures=failures, **sampled(rank=k // 2, fail_all=1))
        expect(result, queries, keys, k)
        assert failures == [2]


def test_fewer_keys_than_k_and_none_at_all():
    queries, keys = integers(3, 5), integers(4, 5)
    expect(search(queries, keys, 10, index_offset=100), queries, keys, 10, index_offset=100)
    empty = keys[:0].contiguous()
    distances, indices = search(queries, empty, 3)
    assert (distances == INF).all() and (indices == -1).all()
    init = (torch.tensor([[2.0, INF]] * 3), torch.tensor([[7, -1]] * 3))
    expect(
        search(queries, empty, 3, init=init),
        queries,
        empty,
        3,
        init_distances=init[0],
        init_indices=init[1],
    )


@pytest.mark.parametrize("metric", ["l2", "ip"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_nan_and_infinity(metric: str, dtype: torch.dtype):
    queries, keys = integers(6, 10, dtype=dtype), integers(600, 10, dtype=dtype)
    keys[::3, 4] = float("nan")
    keys[1, 0], keys[4, 1], keys[301, 2] = INF, -INF, INF
    queries[2, 3] = float("nan")
    queries[3, 0] = INF
    for how in ({}, sampled(rank=30), sampled(rank=1, owners=3)):
        expect(search(queries, keys, 40, metric, **how), queries, keys, 40, metric)
    keys[:] = float("nan")
    for how in ({}, sampled(rank=30), sampled(rank=30, fail_all=1)):
        expect(search(queries, keys, 40, metric, **how), queries, keys, 40, metric)


def test_negative_zero_ties_with_zero():
    keys = torch.tensor([[0.0], [-0.0], [1.0], [0.0]]).half()
    queries = torch.tensor([[1.0], [-1.0]]).half()
    _distances, indices = search(queries, keys, 4, "ip")
    assert indices.tolist() == [[2, 0, 1, 3], [0, 1, 3, 2]]


def test_a_distance_is_never_below_zero():
    keys = torch.randn(200, 40).half() * 30
    distances, _ = search(keys[:8].contiguous(), keys, 5)
    assert (distances >= 0).all()


# Chunks, passes, earlier results, refinement


@pytest.mark.parametrize("how", [{}, sampled(rank=40)], ids=["all", "sampled"])
def test_chunks_and_passes_change_nothing(how: dict[str, int]):
    queries, keys = torch.randn(40, 12).half(), torch.randn(900, 12).half()
    keys[500:520] = keys[100:120]
    whole = search(queries, keys, 30)
    norms = reference.key_sqnorms(keys)
    for more in ({"chunk_keys": 300}, {"chunk_keys": 256, "queries_per_pass": 16}):
        for key_sqnorms in (None, norms):
            parts = search(queries, keys, 30, key_sqnorms=key_sqnorms, **more, **how)
            assert torch.equal(whole[1], parts[1])
            torch.testing.assert_close(whole[0], parts[0], rtol=1e-6, atol=1e-5)
    parts = search(queries, keys, 30, queries_per_pass=16, **how)
    assert torch.equal(whole[0], parts[0]) and torch.equal(whole[1], parts[1])


@pytest.mark.parametrize("refine", [0, 1])
@pytest.mark.parametrize("m", [3, 20, 50])
def test_an_earlier_result_is_gone_on_from(m: int, refine: int):
    queries, keys = integers(9, 12), integers(800, 12)
    first = reference.knn_search(queries, keys[:300], m)
    init = (first[0].float().contiguous(), first[1])
    init[1][0, -1], init[0][0, -1] = -1, INF
    rest = keys[300:].contiguous()
    for how in ({}, sampled(rank=30), {"chunk_keys": 256}):
        result = search(queries, rest, 20, init=init, index_offset=300, refine=refine, **how)
        expect(
            result,
            queries,
            rest,
            20,
            index_offset=300,
            init_distances=init[0],
            init_indices=init[1],
            refine=bool(refine),
        )


def test_an_earlier_result_spares_candidates():
    # With k neighbors at hand a tight threshold needs no sample: a failed guess is none.
    queries, keys = integers(9, 12), integers(800, 12)
    best = reference.knn_search(queries, keys, 20)
    init = (best[0].float(), best[1] + 10_000)
    failures: list[int] = []
    result = search(queries, keys, 20, init=init, failures=failures, **sampled(rank=199))
    expect(result, queries, keys, 20, init_distances=init[0], init_indices=init[1])
    assert failures == [0]


def test_refinement_is_exact_at_zero():
    keys = (torch.randn(300, 64) * 0.2 + 20).half()
    queries = keys[:7].contiguous()
    distances, indices = search(queries, keys, 5, refine=1)
    assert torch.equal(indices[:, 0], torch.arange(7)) and (distances[:, 0] == 0).all()
    wanted = reference.rescore(queries, keys, indices, compute_dtype=torch.float64)
    torch.testing.assert_close(distances.double(), wanted, rtol=1e-6, atol=1e-9)


def test_norms_given_are_norms_used():
    queries, keys = integers(4, 6), integers(100, 6)
    norms = torch.arange(100).flip(0).float() * 1000
    result = search(queries, keys, 10, key_sqnorms=norms)
    expect(result, queries, keys, 10, key_sqnorms=norms)
