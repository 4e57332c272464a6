"""The CUDA search on the host, continued: order and ties, padding, chunks, passes, earlier results,
refinement. See test_search.py.
"""

from __future__ import annotations

import pytest
import torch

from knnext import reference
from tests.emulator.build import compiler_found
from tests.emulator.search import DTYPES, INF, expect, integers, sampled, search

pytestmark = pytest.mark.skipif(not compiler_found(), reason="no C++ compiler to build it with")


# Order, ties, padding


@pytest.mark.slow
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


@pytest.mark.slow
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
