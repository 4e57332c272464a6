"""knn_search(refine=True): the k nearest by the direct form, whatever the expanded form says."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys

import pytest
import torch
from torch import Tensor

import knnext
from knnext import _host, reference
from knnext.testing import assert_equal_results
from tests.ops.mixing_cases import threads
from tests.ops.search_threads import FEW, MANY, SWEPT, threads_that_share  # noqa: F401

INF, NAN = float("inf"), float("nan")
DTYPES = [torch.float16, torch.bfloat16, torch.float32]
METRICS = ["l2", "ip"]
Result = tuple[Tensor, Tensor]


def by_definition(queries: Tensor, keys: Tensor, k: int, metric: str = "l2") -> Result:
    """rescore of every key, then the k best of those that are finite."""
    everything = torch.arange(keys.shape[0]).expand(queries.shape[0], -1)
    distances = knnext.rescore(queries, keys, everything, metric)
    return reference.merge_topk(distances, everything.masked_fill(~distances.isfinite(), -1), k)


def assert_refined(queries: Tensor, keys: Tensor, k: int, metric: str = "l2") -> None:
    got = knnext.knn_search(queries, keys, k, metric, refine=True)
    assert_equal_results(got, by_definition(queries, keys, k, metric))


def cloud(*shape: int, at: float = 0.0, spread: float = 1.0) -> Tensor:
    return at + spread * torch.randn(shape)


def clusters(rows: int, dim: int) -> Tensor:
    """Small clouds at several offsets, far from each other."""
    offsets = torch.tensor([0.0, 100.0, -100.0, 1e4, 3e-3])[torch.randint(0, 5, (rows, 1))]
    return offsets + 0.01 * torch.randn(rows, dim)


def outliers(rows: int, dim: int) -> Tensor:
    """One huge dimension, and every tenth row a hundred times the others."""
    x = torch.randn(rows, dim)
    x[:, dim // 2] += 3000.0
    x[::10] *= 100.0
    return x


def duplicates(rows: int, dim: int) -> Tensor:
    return cloud(7, dim, at=30.0)[torch.randint(0, 7, (rows,))]


def scales(rows: int, dim: int) -> Tensor:
    """Rows from subnormal squares to squares that overflow."""
    return torch.randn(rows, dim) * 10.0 ** torch.randint(-30, 22, (rows, 1)).float()


CLOUDS = {
    "origin": cloud,
    "near 100": lambda n, d: cloud(n, d, at=100.0, spread=0.01),
    "near 1e4": lambda n, d: cloud(n, d, at=1e4, spread=1.0),
    "clusters": clusters,
    "outliers": outliers,
    "duplicates": duplicates,
    "scales": scales,
    "near 1e20": lambda n, d: cloud(n, d, at=1e20, spread=1e14),
    "near 1e-30": lambda n, d: cloud(n, d, at=1e-30, spread=1e-33),
    "subnormal": lambda n, d: cloud(n, d, spread=1e-40),
}


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("name", CLOUDS)
@pytest.mark.parametrize("num_queries", [1, SWEPT, FEW, MANY])
def test_the_direct_form_decides(name: str, metric: str, num_queries: int) -> None:
    keys = CLOUDS[name](3000, 48)
    queries = torch.cat([keys[:1], CLOUDS[name](num_queries, 48)])[:num_queries]
    assert_refined(queries, keys, 30, metric)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", [1, 7, 65, 576, 1600, 4096])
def test_shapes_and_dtypes(dtype: torch.dtype, dim: int, metric: str) -> None:
    for make in (cloud, clusters, outliers):
        keys = make(700, dim).to(dtype)
        assert_refined(torch.cat([make(9, dim).to(dtype), keys[:2]]), keys, 20, metric)


@pytest.mark.parametrize("k", [1, 2, 64, 65, 1024, 2999, 3000, 5000])
def test_k(k: int) -> None:
    keys = cloud(3000, 16, at=100.0, spread=0.01)
    assert_refined(keys[::500].clone(), keys, k)


@pytest.mark.parametrize("num_keys", [0, 1, 7, 8, 9, 15, 16, 17, 47, 48, 49, 97])
@pytest.mark.parametrize("num_queries", [0, 1, 6, 7, 9])
def test_sizes_about_the_tiles(num_keys: int, num_queries: int) -> None:
    keys, queries = cloud(num_keys, 5, at=50.0), cloud(num_queries, 5, at=50.0)
    got = knnext.knn_search(queries, keys, 20, refine=True)
    if num_keys and num_queries:
        assert_equal_results(got, by_definition(queries, keys, 20))
    assert got[0].shape == got[1].shape == (num_queries, 20)
    assert int((got[1] >= 0).sum()) == num_queries * min(20, num_keys)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("offset", [100.0, 1e20, 1e38])
def test_identical_rows_meet_at_zero(dtype: torch.dtype, offset: float) -> None:
    keys = (offset * (1 + torch.randn(2000, 33) / 50)).to(dtype)
    distances, indices = knnext.knn_search(keys[:60], keys, 3, refine=True)
    assert torch.equal(indices[:, 0], torch.arange(60)) and (distances[:, 0] == 0).all()


@pytest.mark.parametrize("value", [65504.0, 2.0**-24])
def test_the_ends_of_float16(value: float) -> None:
    keys = (torch.randint(0, 2, (500, 40)) * 2 - 1).half() * value
    assert_refined(keys[:20], keys, 12)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["origin", "near 100", "clusters", "duplicates", "scales"])
def test_chunks_give_the_bits_of_one_search(name: str, dtype: torch.dtype, metric: str) -> None:
    keys = CLOUDS[name](2400, 20).to(dtype)
    keys[1300:] = keys[:1100].clone()  # each key twice, on both sides of most cuts
    queries = torch.cat([keys[:40:2], CLOUDS[name](10, 20).to(dtype)])
    whole = knnext.knn_search(queries, keys, 60, metric, refine=True)
    assert_equal_results(whole, by_definition(queries, keys, 60, metric))
    for _ in range(3):
        cuts = [0, *torch.randint(0, 2401, (5,)).sort().values.tolist(), 2400]
        carried: dict[str, Tensor] = {}
        for start, stop in itertools.pairwise(cuts):
            part = keys[start:stop]
            distances, indices = knnext.knn_search(
                queries, part, 60, metric, index_offset=start, refine=True, **carried
            )
            carried = {"init_distances": distances, "init_indices": indices}
        assert_equal_results((distances, indices), whole)


def test_rows_left_out_by_ranges() -> None:
    """What exact search over a datastore without one document does: two ranges of the keys."""
    keys = cloud(2000, 24, at=100.0, spread=0.01)
    first = knnext.knn_search(keys[:9], keys[:700], 15, refine=True)
    init = {"init_distances": first[0], "init_indices": first[1]}
    got = knnext.knn_search(keys[:9], keys[900:], 15, index_offset=900, refine=True, **init)
    kept = torch.cat([torch.arange(700), torch.arange(900, 2000)])
    distances, rows = by_definition(keys[:9], keys[kept], 15)
    assert_equal_results(got, (distances, kept[rows]))


@pytest.mark.parametrize("num_queries", [1, SWEPT, FEW, MANY])
@pytest.mark.parametrize("metric", METRICS)
def test_the_same_bits_whatever_the_threads_and_the_batch(num_queries: int, metric: str) -> None:
    keys, queries = clusters(3000, 40), clusters(num_queries, 40)
    want = by_definition(queries, keys, 100, metric)
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3, 8):
            torch.set_num_threads(threads)
            got = knnext.knn_search(queries, keys, 100, metric, refine=True)
            assert_equal_results(got, want)
            part = knnext.knn_search(queries[:2], keys, 100, metric, refine=True)
            assert_equal_results(part, (want[0][:2], want[1][:2]))
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("refine", [False, True])
@pytest.mark.parametrize("value", [NAN, INF, -INF])
@pytest.mark.parametrize("num_queries", [1, SWEPT, FEW, MANY])
def test_keys_that_are_not_finite_are_never_returned(
    metric: str, refine: bool, value: float, num_queries: int
) -> None:
    keys, queries = torch.randn(900, 6), torch.randn(num_queries, 6)
    keys[::3] = value
    keys[1::3, 2] = value
    _, indices = knnext.knn_search(queries, keys, 400, metric, refine=refine)
    assert (indices[:, :300] % 3 == 2).all() and (indices[:, 300:] == -1).all()
    if refine:
        assert_refined(queries, keys, 50, metric)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("refine", [False, True])
def test_finite_rows_whose_distance_overflows(metric: str, refine: bool) -> None:
    keys = torch.tensor([[1e30], [1.0], [-1e30], [2.0]])
    queries = torch.tensor([[-1e30], [1e30]])
    _, indices = knnext.knn_search(queries, keys, 4, metric, refine=refine)
    found = [sorted(i for i in row if i >= 0) for row in indices.tolist()]
    apart = [[2], [0]] if refine else [[], []]
    assert found == ([[1, 3], [1, 3]] if metric == "ip" else apart)


@pytest.mark.parametrize("metric", METRICS)
def test_keys_whose_squares_alone_overflow(metric: str) -> None:
    keys = torch.tensor([[1.9e19], [1e19], [2.2e19], [1.0], [2.5e19]])
    queries = torch.tensor([[6e18], [1.9e19], [1e18]])
    _, indices = knnext.knn_search(queries, keys, 5, refine=True)
    assert indices[0].tolist() == [1, 3, 0, 2, -1]  # (2.5e19 - 6e18)^2 overflows
    assert_refined(queries, keys, 5, metric)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("refine", [False, True])
@pytest.mark.parametrize("value", [NAN, INF, -INF])
def test_a_query_that_is_not_finite_keeps_what_it_came_with(
    metric: str, refine: bool, value: float
) -> None:
    queries = torch.randn(4, 5)
    queries[::2, 3] = value
    init = {
        "init_distances": torch.tensor([[1e6, 3.0]]).repeat(4, 1),
        "init_indices": torch.tensor([[800, -1]]).repeat(4, 1),
    }
    distances, indices = knnext.knn_search(
        queries, torch.randn(50, 5), 3, metric, refine=refine, **init
    )
    assert indices[::2].tolist() == [[800, -1, -1]] * 2
    assert distances[::2].tolist() == [[1e6, INF, INF]] * 2
    assert (indices[1::2] >= 0).all() and (indices[1::2] < 50).all()


def misplaced(dim: int = 128, decoys: int = 4000) -> tuple[Tensor, Tensor]:
    """A query and keys of which the expanded form misplaces the nearest, as far as it can.

    Every row begins with 1. After it, the nearest key's products with the query lie just below half
    a unit in the last place of the running sum, which loses them all; its own squares just above.
    """
    ulp = 2.0**-23
    query = torch.full((1, dim), (0.25 * ulp) ** 0.5)
    nearest = torch.full((1, dim), (0.9 * ulp) ** 0.5)
    query[:, 0] = nearest[:, 0] = 1.0
    true = float((query.double() - nearest.double()).square().sum())
    # Decoys are a little farther in truth; their single step to the side is summed well.
    away = true**0.5 * torch.linspace(1.05, 1.4, decoys)
    keys = query.repeat(decoys, 1)
    keys[:, 0] += away
    return query, torch.cat([keys, nearest])


@pytest.mark.parametrize("k", [1, 20])
def test_a_key_that_the_expanded_form_misplaces_is_found(k: int) -> None:
    query, keys = misplaced()
    plain = knnext.knn_search(query, keys, 500)[1]
    assert keys.shape[0] - 1 not in plain  # or this tests nothing
    assert knnext.knn_search(query, keys, k, refine=True)[1][0, 0] == keys.shape[0] - 1
    assert_refined(query, keys, k)


CODE = """
import sys, torch, knnext
queries, keys = torch.load(sys.argv[1])
for metric in ("l2", "ip"):
    got = knnext.knn_search(queries, keys, 40, metric, refine=True)
    everything = torch.arange(len(keys)).expand(len(queries), -1)
    distances = knnext.rescore(queries, keys, everything, metric)
    want = knnext.merge_topk(distances, everything, 40)
    assert torch.equal(got[1], want[1]) and torch.equal(got[0], want[0])
"""


@pytest.mark.slow
@pytest.mark.parametrize("path", ["plain", "avx2", "avx512"])
def test_every_vector_path(path: str, tmp_path) -> None:
    if path not in _host.usable_cpu_isas():
        pytest.skip(f"this processor has no {path}")
    torch.save((torch.cat([clusters(20, 77), cloud(5, 77)]), clusters(3000, 77)), tmp_path / "in")
    run = subprocess.run(
        [sys.executable, "-c", CODE, str(tmp_path / "in")],
        capture_output=True,
        text=True,
        env={**os.environ, "KNNEXT_CPU_ISA": path},
    )
    assert run.returncode == 0, run.stderr


@pytest.mark.parametrize("dtype", DTYPES)
def test_strides(dtype: torch.dtype) -> None:
    for keys in (cloud(33, 900).to(dtype).T, clusters(1800, 99).to(dtype)[::2, ::3]):
        queries = keys[:40:4]
        got = knnext.knn_search(queries, keys, 9, refine=True)
        assert_equal_results(got, by_definition(queries.contiguous(), keys.contiguous(), 9))


@pytest.mark.parametrize("metric", METRICS)
def test_given_sqnorms_do_not_change_the_answer(metric: str) -> None:
    for keys in (cloud(2000, 30), clusters(2000, 30), scales(2000, 30)):
        for norms in (knnext.key_sqnorms(keys), keys.double().square().sum(1).float()):
            got = knnext.knn_search(keys[:20], keys, 25, metric, key_sqnorms=norms, refine=True)
            assert_equal_results(got, by_definition(keys[:20], keys, 25, metric))


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("name", CLOUDS)
def test_the_reference_does_the_same(name: str, metric: str) -> None:
    keys, queries = CLOUDS[name](400, 12), CLOUDS[name](7, 12)
    everything = torch.arange(400).expand(7, -1)
    distances = reference.rescore(queries, keys, everything, metric)
    everything = everything.masked_fill(~distances.isfinite(), -1)
    want = reference.merge_topk(distances, everything, 30)
    assert_equal_results(reference.knn_search(queries, keys, 30, metric, refine=True), want)


@pytest.mark.parametrize("refine", [True, False])
@pytest.mark.parametrize("count", [1, 2])
def test_ties_at_zero_where_subnormals_are_taken_for_it(count: int, refine: bool) -> None:
    """The step above 0 is a subnormal: keys at just this distance must not be lost to it."""
    keys, k = torch.ones(6000, 12), 30
    first = torch.arange(k).expand(400, k)
    given = {"init_distances": torch.zeros(400, k), "init_indices": 6000 + first}
    torch.set_flush_denormal(True)
    try:
        for init in ({}, given):
            with threads(count):
                distances, indices = knnext.knn_search(keys[:400], keys, k, refine=refine, **init)
            assert torch.equal(indices, first) and (distances == 0).all()
    finally:
        torch.set_flush_denormal(False)
