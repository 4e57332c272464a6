"""The refined CUDA search on the host: neighbors by the direct form, wherever the keys lie, by
lists of lower bounds, the certificate of each query, and the direct scan of those left open.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from knnext import reference
from tests.emulator import ops
from tests.emulator.build import call, compiler_found, load
from tests.emulator.search import DTYPES, INF, expect, integers, sampled, search

pytestmark = pytest.mark.skipif(not compiler_found(), reason="no C++ compiler to build it with")
METRICS = ["l2", "ip"]


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def direct(queries: Tensor, keys: Tensor, k: int, metric: str = "l2") -> tuple[Tensor, Tensor]:
    """Every key computed as rescore does, and the k best of those at a finite distance."""
    every = torch.arange(len(keys)).expand(len(queries), -1).contiguous()
    distances = ops.rescore(queries, keys, every, metric)
    return reference.merge_topk(distances, every.masked_fill(~distances.isfinite(), -1), k)


def check(queries: Tensor, keys: Tensor, k: int, metric: str = "l2", **how: int) -> int:
    """To the bit; returns how many queries were left open."""
    failures: list[int] = []
    got = search(queries, keys, k, metric, refine=1, failures=failures, **how)
    wanted = direct(queries, keys, k, metric)
    assert torch.equal(got[1], wanted[1]), (got[1] != wanted[1]).nonzero()[:5]
    assert torch.equal(got[0], wanted[0])
    return failures[0]


def cloud(count: int, dim: int, far: float, dtype: torch.dtype, spread: float = 1) -> Tensor:
    """Keys close together, far from the origin: the expanded form tells none from another."""
    return (far + spread * torch.randn(count, dim)).to(dtype)


# Where the certificate does not hold


@pytest.mark.slow
@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_keys_far_from_the_origin(dtype: torch.dtype, metric: str):
    where = {torch.float16: (500, 1), torch.bfloat16: (400, 2), torch.float32: (4000, 1)}
    far, spread = where[dtype]
    keys = cloud(600, 40, far, dtype, spread)
    queries = torch.cat([keys[:20:4], cloud(3, 40, far, dtype, spread)])
    opened = check(queries, keys, 5, metric)
    assert metric == "ip" or opened
    assert check(queries, keys, 5, metric, **sampled(rank=30)) or metric == "ip"
    if dtype != torch.bfloat16:  # whose squares of eight bits add up with hardly a rounding
        plain = search(queries, keys, 5)  # what the expanded form would choose
        assert not torch.equal(plain[1], direct(queries, keys, 5)[1])


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES)
def test_chunks_change_no_bit_far_from_the_origin(dtype: torch.dtype):
    keys = cloud(560, 24, 300.0, dtype)
    keys[500:520] = keys[100:120]
    queries = keys[::80].contiguous()
    for metric in METRICS:
        for more in ({"chunk_keys": 256}, {"chunk_keys": 300, "queries_per_pass": 4}):
            check(queries, keys, 30, metric, **more)
        check(queries, keys, 30, metric, chunk_keys=300, **sampled(rank=40))


@pytest.mark.slow
@pytest.mark.parametrize("shape", ["few", "small", "large", "filter", "owner"])
def test_every_kernel_that_lists(shape: str):
    for far in (0.0, 200.0):
        keys = cloud(900, 64, far, torch.float16)
        keys[7] = float("nan")
        queries = keys[5::80].contiguous()
        for metric in METRICS:
            check(queries, keys, 9, metric, shape=shape, **sampled(rank=60))


@pytest.mark.slow
@pytest.mark.parametrize("sm", [80, 90])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_what_the_units_cut_is_within_the_bound(sm: int, dtype: torch.dtype):
    """Products of one sign, so that all that is cut adds up; few neighbors and long rows."""
    call(load().emulate_tensor_core, sm)
    try:
        for spread in (0.02, 0.1, 0.5):
            keys = (1 + spread * torch.rand(300, 1024)).to(dtype)
            queries = (1 + spread * torch.rand(2, 1024)).to(dtype)
            for metric in METRICS:
                check(queries, keys, 3, metric)
    finally:
        call(load().emulate_tensor_core, 90)


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_below_the_normal_range(dtype: torch.dtype):
    """Float16 with no bit before its last ten; squares of the others that have few bits."""
    unit = 2.0**-24 if dtype == torch.float16 else 2.0**-73
    keys = (torch.randint(-300, 301, (400, 24)) * unit).to(dtype)
    queries = (torch.randint(-300, 301, (4, 24)) * unit).to(dtype)
    for metric in METRICS:
        check(queries, keys, 5, metric)
        check(queries, keys, 5, metric, **sampled(rank=30))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_identical_rows_meet_at_zero_where_squares_overflow(dtype: torch.dtype):
    keys = (torch.randn(300, 8) * 1e20).to(dtype)
    keys[200] = keys[3]
    queries = torch.cat([keys[:4], torch.randn(2, 8).to(dtype)])
    got = search(queries, keys, 3, refine=1)
    assert (got[0][:4, 0] == 0).all() and got[1][:3, 0].tolist() == [0, 1, 2]
    assert got[1][3, :2].tolist() == [3, 200] and (got[0][3, :2] == 0).all()
    # One such key among others leaves all queries open, and one such query only itself.
    assert check(queries, keys, 3) == 6
    usual = torch.randn(300, 8).to(dtype)
    assert check(queries, usual, 3) == 4
    for metric in METRICS:
        check(queries, torch.cat([usual, keys]), 9, metric, chunk_keys=300)


@pytest.mark.slow
@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_nan_and_infinity_are_never_found(metric: str, dtype: torch.dtype):
    queries, keys = integers(6, 10, dtype=dtype), integers(600, 10, dtype=dtype)
    keys[::3, 4] = float("nan")
    keys[1, 0], keys[4, 1], keys[301, 2] = INF, -INF, INF
    queries[2, 3], queries[3, 0] = float("nan"), INF
    for how in ({}, sampled(rank=30), sampled(rank=30, fail_all=1), {"chunk_keys": 256}):
        check(queries, keys, 40, metric, **how)
        expect(
            search(queries, keys, 40, metric, refine=1, **how),
            queries,
            keys,
            40,
            metric,
            refine=True,
        )
    keys[:] = float("nan")
    assert (search(queries, keys, 4, metric, refine=1)[1] == -1).all()


# Where it does, and where it is forced not to


@pytest.mark.slow
@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_ordinary_keys_leave_no_query_open(dtype: torch.dtype, metric: str):
    queries, keys = torch.randn(20, 32).to(dtype), torch.randn(900, 32).to(dtype)
    assert check(queries, keys, 10, metric) == 0
    assert check(queries, keys, 10, metric, **sampled(rank=60)) == 0
    for k in (300, 900, 1000):  # every key is listed
        assert check(queries[:3], keys[:300].contiguous(), k, metric) == 0


@pytest.mark.slow
@pytest.mark.parametrize(
    "forced",
    [{"rank": 1}, {"rank": 40, "capacity": 8}, {"rank": 40, "fail_all": 1}, {"fail_all": 1}],
)
@pytest.mark.parametrize("dtype", DTYPES)
def test_what_goes_wrong_is_made_good(dtype: torch.dtype, forced: dict[str, int]):
    queries, keys = integers(37, 16, dtype=dtype), integers(900, 16, dtype=dtype)
    for metric, owners, owner_words in (("l2", 1, 256), ("ip", 2, 512), ("l2", 40, 256)):
        how = {"owners": owners, "owner_words": owner_words}
        assert check(queries, keys, 32, metric, **sampled(**forced), **how) == 37


@pytest.mark.parametrize("dim", [1, 7, 33, 100, 257])
def test_any_dimension_and_alignment(dim: int):
    wide = torch.randn(400, dim + 3).half()
    queries, keys = wide[:5, 1 : dim + 1], wide[:, 1 : dim + 1]
    for metric in METRICS:
        usual = search(queries, keys, 6, metric, refine=1)
        forced = search(queries, keys, 6, metric, refine=1, fail_all=1)
        wanted = direct(queries.contiguous(), keys.contiguous(), 6, metric)
        for got in (usual, forced):
            assert torch.equal(got[1], wanted[1]) and torch.equal(got[0], wanted[0])


@pytest.mark.slow
@pytest.mark.parametrize("fail_all", [0, 1])
def test_ties_go_by_row(fail_all: int):
    keys = integers(60, 12).repeat(10, 1)
    for k in (1, 15, 65, 300):
        check(keys[:9].contiguous(), keys, k, fail_all=fail_all)
        check(keys[:9].contiguous(), keys, k, chunk_keys=256, fail_all=fail_all)
    equal = keys[:1].repeat(500, 1)
    check(keys[:3].contiguous(), equal, 20, fail_all=fail_all, owner_words=256)


@pytest.mark.parametrize("k", [1025, 2049])
def test_many_neighbors(k: int):
    queries, keys = torch.randn(2, 5).half(), torch.randn(4097, 5).half()
    check(queries, keys, k)
    assert check(queries, keys, k, fail_all=1) == 2


@pytest.mark.slow
@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("fail_all", [0, 1])
def test_an_earlier_result_is_gone_on_from(metric: str, fail_all: int):
    keys = cloud(700, 12, 300.0, torch.float16)
    queries = keys[::90].contiguous()
    rest, k = keys[300:].contiguous(), 20
    for m in (3, 20, 50):
        init = direct(queries, keys[:300].contiguous(), m, metric)
        init = (init[0].contiguous(), init[1].contiguous())
        for more in ({}, {"chunk_keys": 256}):
            got = search(
                queries, rest, k, metric, init=init, index_offset=300, refine=1,
                fail_all=fail_all, **more,
            )  # fmt: skip
            found = direct(queries, rest, k, metric)
            both = [torch.cat([init[0], found[0]], 1), torch.cat([init[1], found[1] + 300], 1)]
            wanted = reference.merge_topk(*both, k)
            assert torch.equal(got[0], wanted[0]) and torch.equal(got[1], wanted[1])


def test_given_norms_of_the_keys_serve_and_nothing_is_an_answer():
    queries, keys = torch.randn(4, 48).half(), torch.randn(300, 48).half()
    for metric in METRICS:
        without = search(queries, keys, 7, metric, refine=1)
        norms = reference.key_sqnorms(keys)
        got = search(queries, keys, 7, metric, refine=1, key_sqnorms=norms)
        assert torch.equal(got[0], without[0]) and torch.equal(got[1], without[1])
        assert torch.equal(norms, reference.key_sqnorms(keys))  # the caller's are not written to
    distances, indices = search(queries, keys[:0].contiguous(), 40, refine=1)
    assert (distances == INF).all() and (indices == -1).all()


@pytest.mark.parametrize("seed", range(1, 4))
def test_the_order_of_threads_and_blocks_changes_nothing(seed: int):
    keys = torch.cat([torch.randn(300, 20), 200 + torch.randn(300, 20)]).half()
    queries = keys[5::50].contiguous()
    check(queries, keys, 12, seed=seed, **sampled(rank=30))
    check(queries, keys, 12, seed=seed, owners=3, **sampled(rank=1))
