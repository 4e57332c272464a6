"""merge_topk, key_sqnorms and rescore for CUDA, run by the host emulator, against the reference."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from knnext import reference
from tests.emulator import ops
from tests.emulator.build import call, compiler_found, load

pytestmark = pytest.mark.skipif(not compiler_found(), reason="no C++ compiler to build it with")
INF, NAN = float("inf"), float("nan")
DTYPES = [torch.float16, torch.bfloat16, torch.float32]


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def candidates(rows: int, m: int, kind: str) -> tuple[Tensor, Tensor]:
    distances = torch.randn(rows, m) * 10
    # Shards' indices: large, in no order, each once.
    indices = torch.stack([torch.randperm(m) for _ in range(rows)]) * 3 + (1 << 40)
    if kind == "ties":
        distances = torch.randint(-2, 3, (rows, m)).float() * -0.0 + torch.randint(0, 3, (rows, m))
    elif kind == "equal":
        distances[:] = 1.5
    elif kind == "sorted":
        distances = distances.sort(1).values
    elif kind == "reversed":
        distances = distances.sort(1, descending=True).values
    elif kind == "repeated":
        distances, indices = torch.ones(rows, m), indices[:, : m // 4 + 1].repeat(1, 4)[:, :m]
    elif kind == "gaps":
        indices[torch.rand(rows, m) < 0.5] = -1
        distances[torch.rand(rows, m) < 0.1] = NAN
        distances[torch.rand(rows, m) < 0.1] = INF
        distances[torch.rand(rows, m) < 0.1] = -INF
        distances[torch.rand(rows, m) < 0.1] = -0.0
    return distances, indices.contiguous()


def check_merge(distances: Tensor, indices: Tensor, k: int, seed: int = 1) -> None:
    got_d, got_i = ops.merge_topk(distances, indices, k, seed)
    want_d, want_i = reference.merge_topk(distances, indices, k)
    assert torch.equal(got_i, want_i)
    assert torch.equal(got_d, want_d)


KINDS = ["random", "ties", "equal", "sorted", "reversed", "repeated", "gaps"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("m", "k"),
    [(1, 1), (7, 3), (65, 64), (64, 65), (127, 129), (128, 128), (300, 300), (2048, 1024)],
)
def test_merge(m: int, k: int, kind: str) -> None:
    check_merge(*candidates(3, m, kind), k)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("m", "k"), [(1025, 1), (4100, 64), (5000, 1025)])
def test_merge_of_long_rows_selects_first(m: int, k: int, kind: str) -> None:
    for seed in (0, 1):
        check_merge(*candidates(2, m, kind), k, seed)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["random", "equal", "gaps"])
def test_merge_of_the_largest_k(kind: str) -> None:
    check_merge(*candidates(1, 20_000, kind), 16_384)
    check_merge(*candidates(1, 9_000, kind), 16_384)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["random", "equal"])
def test_merge_where_shared_memory_is_small(kind: str) -> None:
    call(load().emulate_set_shared_limit, 99 * 1024)
    try:
        check_merge(*candidates(2, 16_384, kind), 12_000)
    finally:
        call(load().emulate_set_shared_limit, 227 * 1024)


def test_merge_of_nothing() -> None:
    check_merge(torch.empty(2, 0), torch.empty(2, 0, dtype=torch.int64), 5)
    check_merge(torch.empty(0, 3), torch.empty(0, 3, dtype=torch.int64), 5)
    check_merge(torch.rand(2, 3000), torch.full((2, 3000), -1), 5)


def test_merge_of_strided_rows() -> None:
    distances, indices = candidates(4, 50, "random")
    check_merge(distances[::2, 3:40], indices[::2, 5:42], 20)


DIMS = [1, 7, 8, 15, 16, 64, 65, 128, 257, 1000]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", DIMS)
def test_key_sqnorms(dim: int, dtype: torch.dtype) -> None:
    keys = torch.randn(37, dim).to(dtype)
    expected = reference.key_sqnorms(keys, torch.float64).float()
    torch.testing.assert_close(ops.key_sqnorms(keys), expected, rtol=1e-6, atol=1e-6)
    # Rows that begin anywhere.
    wide = torch.randn(37, dim + 3).to(dtype)[:, 1 : dim + 1]
    expected = reference.key_sqnorms(wide, torch.float64).float()
    torch.testing.assert_close(ops.key_sqnorms(wide), expected, rtol=1e-6, atol=1e-6)


def test_key_sqnorms_past_the_range_of_half() -> None:
    keys = torch.full((2, 4096), 65504.0).half()
    torch.testing.assert_close(ops.key_sqnorms(keys), keys.double().square().sum(1).float())
    assert ops.key_sqnorms(torch.empty(0, 5)).shape == (0,)
    assert (ops.key_sqnorms(torch.zeros(3, 0)) == 0).all()


@pytest.mark.parametrize("metric", ["l2", "ip"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", DIMS)
def test_rescore(dim: int, dtype: torch.dtype, metric: str) -> None:
    queries, keys = torch.randn(3, dim).to(dtype), torch.randn(50, dim).to(dtype)
    indices = torch.randint(-1, 50, (3, 21))
    keys[indices[0, 0]] = queries[0]
    got = ops.rescore(queries, keys, indices, metric)
    expected = reference.rescore(queries, keys, indices, metric, torch.float64).float()
    torch.testing.assert_close(got, expected, rtol=2e-6, atol=1e-5)
    if metric == "l2" and indices[0, 0] >= 0:
        assert got[0, 0] == 0


def test_rescore_of_padding_and_of_nothing() -> None:
    queries = torch.randn(2, 5)
    assert (ops.rescore(queries, torch.empty(0, 5), torch.full((2, 3), -1)) == INF).all()
    none = torch.empty(2, 0, dtype=torch.int64)
    assert ops.rescore(queries, torch.randn(4, 5), none).shape == (2, 0)


@pytest.mark.parametrize("index", [-2, 4, 1 << 40])
def test_rescore_stops_at_an_index_that_is_none(index: int) -> None:
    with pytest.raises(RuntimeError, match="an index is not in"):
        ops.rescore(torch.randn(1, 5), torch.randn(4, 5), torch.tensor([[0, index]]))
