"""knn_search on a GPU, held to the float64 reference: every dtype and shape of kernel, the paths
taken when a list fails, every trap of the contract, graphs, streams, devices, memory.

Small integers make every sum exact in float32: those results must equal the reference's to the bit.
KNNEXT_FUZZ_SECONDS (default 20) bounds the fuzz; KNNEXT_FUZZ_SEED begins it where it failed.
"""

from __future__ import annotations

import os
import random
import time
from typing import Any

import pytest
import torch

import knnext
from knnext import reference
from knnext.testing import assert_equal_results, assert_search
from tests.gpu.runs import assert_same_bits_a_hundred_times
from tests.gpu.searches import (
    ORDERS,
    assert_exact,
    assert_late_keys_are_waited_for,
    assert_replays_on_new_data,
    gaussian,
    integers,
    keys_in_order,
)

pytestmark = pytest.mark.gpu
INF = float("inf")
DTYPES = [torch.float16, torch.bfloat16, torch.float32]
METRICS = ["l2", "ip"]
FORCED = {
    "as planned": "",
    "too tight": "stride=4,rank=1",
    "no room": "stride=16,rank=60,capacity=20",
    "all fail": "stride=16,rank=60,fail=1",
}


@pytest.fixture(autouse=True)
def _needs_the_kernel() -> None:
    from knnext.ops._library import cuda_symbols

    assert "knn_search" in cuda_symbols(), "the CUDA library does not carry knn_search"


# Shapes


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("q", [1, 16, 17, 64, 65, 300])
@pytest.mark.parametrize("n", [127, 129, 257, 8193, 70_001])
def test_every_kernel_shape(q: int, n: int, dtype: torch.dtype, metric: str) -> None:
    assert_exact(integers(q, 72, dtype=dtype), integers(n, 72, dtype=dtype), 65, metric)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dim", [1, 7, 65, 128, 768, 1600, 4096])
def test_every_dimension(dim: int, dtype: torch.dtype) -> None:
    for q in (5, 130):
        assert_exact(integers(q, dim, dtype=dtype), integers(9000, dim, dtype=dtype), 100)


@pytest.mark.parametrize("k", [1, 64, 65, 1024, 1025, 2048, 2049, 4096, 16384])
def test_every_k(k: int) -> None:
    for n in (3000, 40_000):
        assert_exact(integers(33, 24), integers(n, 24), k)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dim", [64, 1024])
def test_real_numbers(dim: int, dtype: torch.dtype, metric: str) -> None:
    kind = "expanded" if dtype == torch.float32 and dim == 64 else "tensor_core"
    for q in (9, 200):
        queries, keys = gaussian(q, dim, dtype=dtype), gaussian(20_000, dim, dtype=dtype)
        got = knnext.knn_search(queries, keys, 128, metric)
        assert_search(got, queries, keys, 128, metric, kind=kind)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
@pytest.mark.parametrize("dim", [1024, 2048, 4096])
def test_keys_like_the_queries(dim: int, dtype: torch.dtype, metric: str) -> None:
    """Sums of positive products, of which the units cut off a little at each step."""
    for q in (9, 40, 200):
        queries = gaussian(q, dim, dtype=dtype)
        near = queries[:, None].float() + 0.05 * torch.randn(q, 8, dim, device="cuda")
        keys = torch.cat([queries, near.flatten(0, 1).to(dtype), gaussian(2000, dim, dtype=dtype)])
        got = knnext.knn_search(queries, keys, 9, metric)
        assert_search(got, queries, keys, 9, metric, kind="tensor_core")
        if metric == "l2":
            refined = knnext.knn_search(queries, keys, 1, refine=True)
            assert (refined[0] == 0).all() and torch.equal(
                refined[1][:, 0], torch.arange(q, device="cuda")
            )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dim", [65, 100, 769])
def test_identical_keys_tie_at_any_alignment(dim: int, dtype: torch.dtype) -> None:
    """Their rows begin at every multiple of an element; their norms and sums are the same."""
    for q in (3, 40, 130):
        queries, key = gaussian(q, dim, dtype=dtype), gaussian(1, dim, dtype=dtype)
        keys = torch.cat([gaussian(7, dim, dtype=dtype) + 99, key.repeat(9001, 1)])
        for refine in (False, True):
            distances, indices = knnext.knn_search(queries, keys, 64, refine=refine)
            assert torch.equal(indices, torch.arange(7, 71, device="cuda").expand(q, 64))
            assert (distances == distances[:, :1]).all()


def test_strided_and_unaligned_rows() -> None:
    wide = integers(9000, 100)
    for columns in (slice(3, 70), slice(8, 72), slice(0, 99)):
        assert_exact(wide[:20, columns], wide[:, columns], 50)
    assert_exact(wide[:20].T.contiguous().T, wide.T.contiguous().T, 50)


def test_more_keys_than_a_chunk() -> None:
    keys, queries = integers((1 << 24) + 5000, 8, high=100), integers(20, 8, high=100)
    keys[-1] = queries[0]
    got = knnext.knn_search(queries, keys, 300)
    halves = [knnext.knn_search(queries, keys[: 1 << 23], 300)]
    halves.append(knnext.knn_search(queries, keys[1 << 23 :], 300, index_offset=1 << 23))
    want = reference.merge_topk(
        torch.cat([h[0] for h in halves], 1), torch.cat([h[1] for h in halves], 1), 300
    )
    assert_equal_results(got, want)
    wanted = reference.rescore(queries, keys, got[1], compute_dtype=torch.float64)
    assert torch.equal(got[0].double(), wanted)


@pytest.mark.slow
def test_products_of_sizes_beyond_32_bits() -> None:
    n, dim = 2_300_000, 1024  # 2.4e9 elements
    if torch.cuda.mem_get_info()[0] < 12 << 30:
        pytest.skip("needs 12 GB")
    keys = torch.empty(n, dim, dtype=torch.float16, device="cuda")
    for chunk in keys.split(100_000):
        chunk.copy_(integers(len(chunk), dim))
    queries = keys[[0, n // 2, n - 1]].contiguous()
    distances, indices = knnext.knn_search(queries, keys, 5)
    assert indices[:, 0].tolist() == [0, n // 2, n - 1] and (distances[:, 0] == 0).all()


# What happens when a list fails


@pytest.mark.parametrize("forced", FORCED)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_forced_failures_change_nothing(forced: str, dtype: torch.dtype, monkeypatch) -> None:
    monkeypatch.setenv("KNNEXT_TEST_SEARCH", FORCED[forced])
    for q, metric in ((40, "l2"), (300, "ip")):
        before = knnext.failed_queries()
        assert_exact(integers(q, 40, dtype=dtype), integers(6000, 40, dtype=dtype), 100, metric)
        assert knnext.failed_queries() - before == (0 if forced == "as planned" else q)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("fail", [False, True])
def test_orders_that_fill_lists(order: str, fail: bool, monkeypatch) -> None:
    queries, keys = integers(40, 16), keys_in_order(order)
    if fail:
        monkeypatch.setenv("KNNEXT_TEST_SEARCH", "fail=1")
    before = knnext.failed_queries()
    assert_exact(queries, keys, 1024)
    assert knnext.failed_queries() - before == 40 * fail


def test_all_equal_keys_end_in_time() -> None:
    keys, queries = torch.ones(1_000_000, 64, device="cuda").half(), gaussian(4096, 64)
    knnext.knn_search(queries, keys, 1024)
    torch.cuda.synchronize()
    start = time.perf_counter()
    _, indices = knnext.knn_search(queries, keys, 1024)
    assert torch.equal(indices, torch.arange(1024, device="cuda").expand(4096, 1024))
    assert time.perf_counter() - start < 5.0


# Traps


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nan_and_infinity(metric: str, dtype: torch.dtype) -> None:
    queries, keys = integers(30, 10, dtype=dtype), integers(20_000, 10, dtype=dtype)
    keys[::3, 4] = float("nan")
    keys[1, 0], keys[4, 1], keys[10_000, 2] = INF, -INF, INF
    queries[2, 3], queries[3, 0] = float("nan"), INF
    assert_exact(queries, keys, 200, metric)
    keys[:] = float("nan")
    assert_exact(queries, keys, 200, metric)
    keys[:] = -INF
    assert_exact(queries, keys, 200, metric)


def test_identical_keys_tie_by_index_wherever_they_lie() -> None:
    queries, keys = gaussian(150, 768), gaussian(30_000, 768)
    places = torch.tensor([0, 77, 128, 9999, 20_000, 29_999], device="cuda")
    keys[places] = queries[:1] + 0.01
    for q in (queries[:3], queries):
        distances, indices = knnext.knn_search(q, keys, 6)
        assert torch.equal(indices[0], places) and (distances[0] == distances[0, 0]).all()


def test_empty_and_short() -> None:
    queries, keys = integers(4, 8), integers(10, 8)
    assert_exact(queries, keys, 20, index_offset=7)
    assert_exact(queries, keys[:0], 3)
    assert knnext.knn_search(queries[:0], keys, 3)[0].shape == (0, 3)
    assert_exact(torch.zeros_like(queries), torch.zeros_like(keys), 5)


@pytest.mark.parametrize("refine", [False, True])
def test_an_earlier_result_is_gone_on_from(refine: bool) -> None:
    queries, keys = integers(70, 24), integers(50_000, 24)
    for m in (10, 100, 700):
        d, i = knnext.knn_search(queries, keys[:20_000], m)
        assert_exact(
            queries,
            keys[20_000:],
            100,
            index_offset=20_000,
            init_distances=d,
            init_indices=i,
            refine=refine,
        )


def test_chunks_give_what_the_whole_gives() -> None:
    queries, keys = gaussian(100, 256), gaussian(60_000, 256)
    norms = knnext.key_sqnorms(keys)
    whole = knnext.knn_search(queries, keys, 1024, key_sqnorms=norms)
    d, i = None, None
    for start in range(0, 60_000, 17_000):
        part = slice(start, start + 17_000)
        d, i = knnext.knn_search(
            queries,
            keys[part],
            1024,
            key_sqnorms=norms[part],
            index_offset=start,
            init_distances=d,
            init_indices=i,
        )
    assert_equal_results((d, i), whole)


def test_refinement_is_exact_for_identical_rows() -> None:
    keys = (gaussian(5000, 512).float() * 0.5 + 20).half()
    distances, indices = knnext.knn_search(keys[:50], keys, 8, refine=True)
    assert torch.equal(indices[:, 0], torch.arange(50, device="cuda"))
    assert (distances[:, 0] == 0).all()


def test_float32_is_never_tf32() -> None:
    queries, keys = gaussian(90, 512, dtype=torch.float32), gaussian(9000, 512, dtype=torch.float32)
    results = []
    for allow in (False, True):
        torch.backends.cuda.matmul.allow_tf32 = allow
        results.append(knnext.knn_search(queries, keys, 50))
    torch.backends.cuda.matmul.allow_tf32 = False
    assert_equal_results(*results)
    assert_search(results[0], queries, keys, 50)


def test_limits_are_said() -> None:
    queries, keys = integers(2, 8), integers(9, 8)
    with pytest.raises(RuntimeError, match="k must be at most 16384 on CUDA, got 16385"):
        knnext.knn_search(queries, keys, 16385)
    with pytest.raises(RuntimeError, match="keys must be on the device of queries"):
        knnext.knn_search(queries, keys.cpu(), 3)


# The machine


@pytest.mark.parametrize("q", [8, 200])
def test_a_hundred_runs_give_the_same_bits(q: int) -> None:
    queries, keys = gaussian(q, 128), gaussian(100_000, 128)
    assert_same_bits_a_hundred_times(lambda: knnext.knn_search(queries, keys, 500))


@pytest.mark.parametrize("forced", FORCED)
def test_a_graph_replays_on_new_data(forced: str, monkeypatch) -> None:
    monkeypatch.setenv("KNNEXT_TEST_SEARCH", FORCED[forced])
    assert_replays_on_new_data(integers(70, 32), integers(7000, 32), refine=True)


def test_a_side_stream_is_kept_to() -> None:
    assert_late_keys_are_waited_for()


@pytest.mark.multi_gpu
def test_a_second_device() -> None:
    queries, keys = integers(64, 64), integers(50_000, 64)
    got = knnext.knn_search(queries.to("cuda:1"), keys.to("cuda:1"), 100)
    assert got[0].device.index == 1 and torch.cuda.current_device() == 0
    assert_equal_results(got, knnext.knn_search(queries, keys, 100))


@pytest.mark.parametrize(("q", "n", "k"), [(4096, 200_000, 1024), (64, 1_000_000, 2048)])
def test_memory_stays_within_the_contract(q: int, n: int, k: int) -> None:
    queries, keys = gaussian(q, 64), gaussian(n, 64)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    distances, indices = knnext.knn_search(queries, keys, k)
    used = torch.cuda.max_memory_allocated() - before
    outputs = distances.nbytes + indices.nbytes
    assert used - outputs <= (256 << 20) + q * max(128 << 10, 64 * k) + (4 << 20)


def test_opcheck() -> None:
    queries, keys = integers(20, 16), integers(300, 16)
    torch.library.opcheck(torch.ops.knnext.knn_search.default, (queries, keys, 10))


def draw(rng: random.Random) -> dict[str, Any]:
    return {
        "q": rng.choice([1, 3, 16, 17, 40, 64, 65, 129, 500]),
        "n": rng.choice([1, 50, 127, 128, 2000, 8192, 8193, 30_000, 120_000]),
        "dim": rng.choice([1, 5, 8, 33, 64, 100, 300]),
        "k": rng.choice([1, 7, 64, 65, 500, 1024, 2049]),
        "dtype": rng.choice(DTYPES),
        "metric": rng.choice(METRICS),
        "high": rng.choice([1, 3, 15]),
        "forced": rng.choice(["", "", "", "stride=9,rank=2", "fail=1", "stride=8,rank=40"]),
        "shape_of_data": rng.choice(["random", "sorted", "repeated", "nan"]),
    }


FUZZ_PARTS = 4  # of the time, so that parallel workers share it


@pytest.mark.parametrize("part", range(FUZZ_PARTS))
def test_fuzz(part: int, monkeypatch) -> None:
    seconds = float(os.environ.get("KNNEXT_FUZZ_SECONDS", "20")) / FUZZ_PARTS
    end = time.monotonic() + seconds
    seed = int(os.environ.get("KNNEXT_FUZZ_SEED", "0")) + part * 1_000_000
    rounds = 0
    while time.monotonic() < end:
        case = draw(random.Random(seed + rounds))
        torch.manual_seed(seed + rounds)
        queries = integers(case["q"], case["dim"], dtype=case["dtype"], high=case["high"])
        keys = integers(case["n"], case["dim"], dtype=case["dtype"], high=case["high"])
        if case["shape_of_data"] == "sorted":
            keys = keys[keys.float().square().sum(1).argsort()]
        elif case["shape_of_data"] == "repeated":
            keys = keys[torch.randint(0, max(1, case["n"] // 50), (case["n"],), device="cuda")]
        elif case["shape_of_data"] == "nan":
            keys[torch.rand(case["n"], device="cuda") < 0.5] = float("nan")
        monkeypatch.setenv("KNNEXT_TEST_SEARCH", case["forced"])
        try:
            assert_exact(queries, keys, case["k"], case["metric"])
        except AssertionError as error:
            raise AssertionError(f"KNNEXT_FUZZ_SEED={seed + rounds}: {case}") from error
        rounds += 1
    assert rounds > 0
