"""merge_topk, key_sqnorms and rescore on a GPU, held to the reference."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import knnext
from knnext import reference
from knnext.testing import assert_equal_results
from tests.gpu.runs import (
    assert_kept_to_a_side_stream,
    assert_replays,
    assert_same_bits_a_hundred_times,
)

pytestmark = pytest.mark.gpu
INF, NAN = float("inf"), float("nan")
DTYPES = [torch.float16, torch.bfloat16, torch.float32]


@pytest.fixture(autouse=True)
def _needs_the_kernels() -> None:
    from knnext.ops._library import cuda_symbols

    assert {"merge_topk", "key_sqnorms", "rescore"} <= set(cuda_symbols())


def candidates(rows: int, m: int, kind: str) -> tuple[Tensor, Tensor]:
    distances = torch.randn(rows, m, device="cuda")
    indices = torch.stack([torch.randperm(m, device="cuda") for _ in range(rows)]) + (1 << 40)
    if kind == "ties":
        distances = distances.round()
    elif kind == "equal":
        distances.fill_(2.5)
    elif kind == "gaps":
        indices[torch.rand(rows, m, device="cuda") < 0.5] = -1
        for value in (NAN, INF, -INF, -0.0):
            distances[torch.rand(rows, m, device="cuda") < 0.1] = value
    return distances, indices


@pytest.mark.parametrize("kind", ["random", "ties", "equal", "gaps"])
@pytest.mark.parametrize(
    ("rows", "m", "k"),
    [
        (3, 1, 1),
        (5, 64, 65),
        (70_000, 16, 4),
        (500, 2048, 1024),
        (9, 2050, 1025),
        (9, 100_000, 2049),
        (2, 16_384, 16_384),
        (2, 200_000, 16_384),
        (3, 0, 4),
    ],
)
def test_merge(rows: int, m: int, k: int, kind: str) -> None:
    if rows * m > 0 and rows > 1000 and kind != "random":
        kind = "random"  # permutations by the row are slow to make
    distances, indices = candidates(rows, m, kind) if m and rows < 1000 else (
        torch.randn(rows, m, device="cuda"),
        torch.arange(m, device="cuda").expand(rows, m).contiguous(),
    )  # fmt: skip
    got = knnext.merge_topk(distances, indices, k)
    assert_equal_results(got, reference.merge_topk(distances, indices, k))


def test_k_past_the_limit_is_refused() -> None:
    with pytest.raises(RuntimeError, match="k must be at most 16384 on CUDA, got 16385"):
        knnext.merge_topk(*candidates(1, 5, "random"), 16_385)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", [1, 7, 64, 65, 768, 1600, 4096])
def test_key_sqnorms(dim: int, dtype: torch.dtype) -> None:
    keys = torch.randn(10_001, dim, device="cuda").to(dtype)
    want = reference.key_sqnorms(keys, torch.float64).float()
    torch.testing.assert_close(knnext.key_sqnorms(keys), want, rtol=2e-6, atol=1e-6)
    torch.testing.assert_close(knnext.key_sqnorms(keys[:, : dim // 2 + 1]), reference.key_sqnorms(
        keys[:, : dim // 2 + 1], torch.float64).float(), rtol=2e-6, atol=1e-6)  # fmt: skip


def test_key_sqnorms_of_more_than_two_to_the_31_elements() -> None:
    if torch.cuda.mem_get_info()[0] < 6 << 30:
        pytest.skip("needs 6 GB of free memory")
    keys = torch.zeros((1 << 31) // 1024 + 3, 1024, dtype=torch.float16, device="cuda")
    keys[-1] = 2.0
    got = knnext.key_sqnorms(keys)
    assert got[-1] == 4096 and got[:-1].sum() == 0


@pytest.mark.parametrize("metric", ["l2", "ip"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", [1, 7, 65, 768, 1024])
def test_rescore(dim: int, dtype: torch.dtype, metric: str) -> None:
    queries = torch.randn(33, dim, device="cuda").to(dtype)
    keys = torch.randn(500, dim, device="cuda").to(dtype)
    indices = torch.randint(-1, 500, (33, 70), device="cuda")
    keys[7] = queries[0]
    indices[0, 0] = 7
    got = knnext.rescore(queries, keys, indices, metric)
    want = reference.rescore(queries, keys, indices, metric, torch.float64).float()
    torch.testing.assert_close(got, want, rtol=3e-6, atol=1e-4)
    assert metric == "ip" or got[0, 0] == 0


def calls() -> list[Callable[[], tuple[Tensor, ...]]]:
    queries = torch.randn(33, 768, device="cuda").half()
    keys = torch.randn(500, 768, device="cuda").half()
    indices = torch.randint(-1, 500, (33, 70), device="cuda")
    short, long = candidates(300, 2048, "ties"), candidates(30, 20_000, "ties")
    return [
        lambda: knnext.merge_topk(*short, 1024),
        lambda: knnext.merge_topk(*long, 1024),
        lambda: (knnext.key_sqnorms(keys),),
        lambda: (knnext.rescore(queries, keys, indices),),
    ]


@pytest.mark.parametrize("which", range(4))
def test_same_bits_a_hundred_times_and_in_a_graph(which: int) -> None:
    run = calls()[which]
    assert_same_bits_a_hundred_times(run)
    assert_replays(run)


@pytest.mark.parametrize("which", range(4))
def test_side_stream(which: int) -> None:
    assert_kept_to_a_side_stream(calls()[which])


def test_rescore_gradients_and_opcheck() -> None:
    queries = torch.randn(3, 6, device="cuda", requires_grad=True)
    keys = torch.randn(9, 6, device="cuda", requires_grad=True)
    indices = torch.randint(-1, 9, (3, 4), device="cuda")
    for metric in ("l2", "ip"):
        out = knnext.rescore(queries, keys, indices, metric).masked_fill(indices < 0, 0.0)
        got = torch.autograd.grad(out.square().sum(), [queries, keys])
        plain = reference.rescore(queries, keys, indices, metric).masked_fill(indices < 0, 0.0)
        want = torch.autograd.grad(plain.square().sum(), [queries, keys])
        for g, w in zip(got, want, strict=True):
            torch.testing.assert_close(g, w, rtol=1e-4, atol=1e-4)
        torch.library.opcheck(torch.ops.knnext.rescore.default, (queries, keys, indices, metric))
    torch.library.opcheck(torch.ops.knnext.merge_topk.default, (*candidates(3, 8, "gaps"), 4))
    torch.library.opcheck(torch.ops.knnext.key_sqnorms.default, (keys.detach(),))
