"""Every CUDA op once, small, on data that comes from the CPU and goes back to it: on the GPU run
copies and knnext's own kernels alone. This is what compute-sanitizer runs over, so that each of its
reports is about a kernel of ours.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import knnext
from knnext.testing import assert_close, assert_equal_results

pytestmark = pytest.mark.gpu
OPS = torch.ops.knnext
DTYPES = [torch.float16, torch.bfloat16, torch.float32]
FORCED = {
    "as planned": "",
    "too tight": "stride=4,rank=1",
    "no room": "stride=16,rank=60,capacity=20",
    "all fail": "stride=16,rank=60,fail=1",
}


def integers(*size: int, dtype: torch.dtype = torch.float16) -> Tensor:
    """On the CPU; every sum of their products is exact in float32."""
    return torch.randint(-4, 5, size).to(dtype)


def on_gpu(*values: object) -> tuple:
    return tuple(v.cuda() if isinstance(v, Tensor) else v for v in values)


def to_cpu(result: object) -> tuple[Tensor, ...]:
    return tuple(t.cpu() for t in ((result,) if isinstance(result, Tensor) else result))


def search(queries: Tensor, keys: Tensor, *args: object, **kwargs: object) -> None:
    """The same bits as on the CPU."""
    moved = {name: v.cuda() if isinstance(v, Tensor) else v for name, v in kwargs.items()}
    got = knnext.knn_search(queries.cuda(), keys.cuda(), *args, **moved)
    assert_equal_results(to_cpu(got), knnext.knn_search(queries, keys, *args, **kwargs))


@pytest.mark.parametrize("forced", FORCED)
@pytest.mark.parametrize("queries", [9, 40, 130])
def test_search(queries: int, forced: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KNNEXT_TEST_SEARCH", FORCED[forced])
    search(integers(queries, 72), integers(3001, 72), 100)


@pytest.mark.parametrize("metric", ["l2", "ip"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_search_in_every_dtype(dtype: torch.dtype, metric: str) -> None:
    for dim in (64, 71):  # copied sixteen bytes at a time, and element by element
        search(integers(20, dim, dtype=dtype), integers(20_000, dim, dtype=dtype), 65, metric)


def test_search_for_many_neighbors_and_on_from_others() -> None:
    queries, keys = integers(10, 24), integers(9000, 24)
    search(queries, keys, 2500)
    before = knnext.knn_search(queries, keys[:4000], 90)
    on = {"index_offset": 4000, "init_distances": before[0], "init_indices": before[1]}
    search(queries, keys[4000:].contiguous(), 90, **on)
    search(queries, keys[4000:].contiguous(), 90, refine=True, **on)
    search(queries, keys[:30], 40)
    search(queries, keys[:0], 3)


@pytest.mark.parametrize("m", [50, 2050, 9000])
def test_merge_topk(m: int) -> None:
    distances, indices = torch.randn(3, m).round(), torch.stack([torch.randperm(m)] * 3)
    indices[:, ::7] = -1
    got = knnext.merge_topk(*on_gpu(distances, indices), 40)
    assert_equal_results(to_cpu(got), knnext.merge_topk(distances, indices, 40))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_norms_and_real_scores(dtype: torch.dtype) -> None:
    for dim in (7, 136):
        queries, keys = integers(5, dim, dtype=dtype), integers(300, dim, dtype=dtype)
        indices = torch.randint(-1, 300, (5, 33))
        assert torch.equal(knnext.key_sqnorms(keys.cuda()).cpu(), knnext.key_sqnorms(keys))
        for metric in ("l2", "ip"):
            got = knnext.rescore(*on_gpu(queries, keys, indices), metric).cpu()
            assert torch.equal(got, knnext.rescore(queries, keys, indices, metric))
            order = indices.reshape(-1).sort(stable=True).indices
            args = (torch.randn(5, 33), queries, keys, indices, order, metric, True)
            compare_gradients(OPS._rescore_gradients, args)


def compare_gradients(op: object, args: tuple) -> None:
    for got, want in zip(to_cpu(op(*on_gpu(*args))), op(*args), strict=True):  # type: ignore[operator]
        largest = want.abs().max().item() if want.numel() else 0.0
        if want.dtype == torch.float32:
            assert_close(got, want, "gradient", 3 * max(largest, 1.0))
        else:
            torch.testing.assert_close(got, want, rtol=1e-2, atol=1e-2 * max(largest, 1.0))


def neighbors(rows: int, k: int, vocab_size: int) -> tuple[Tensor, Tensor]:
    distances = (torch.rand(rows, k) * 40).sort(1).values + 300
    tokens = torch.randint(0, vocab_size, (rows, k))
    tokens[torch.rand(rows, k) < 0.1] = -1
    tokens[0] = -1
    return distances, tokens


@pytest.mark.parametrize(
    ("rows", "k", "vocab_size"), [(3, 5, 7), (300, 65, 1001), (2, 1024, 50_257), (2, 2049, 600)]
)
def test_mixing(rows: int, k: int, vocab_size: int) -> None:
    """Forward and backward; few long rows go over many blocks, many short ones one a block."""
    distances, tokens = neighbors(rows, k, vocab_size)
    targets, logits = tokens[:, 1].contiguous(), torch.randn(rows, vocab_size).half()
    grad = torch.randn(rows, vocab_size)
    p = knnext.knn_softmax(*on_gpu(distances, tokens), 2.5, vocab_size).cpu()
    assert_close(p, knnext.knn_softmax(distances, tokens, 2.5, vocab_size), "probability")
    mixed = knnext.knn_interpolate(logits, distances, tokens, 2.5, 0.3)
    got = knnext.knn_interpolate(*on_gpu(logits, distances, tokens), 2.5, 0.3).cpu()
    assert_close(got, mixed, "log_probability")
    log_p = knnext.knn_target_log_prob(distances, tokens, targets, 2.5)
    got = knnext.knn_target_log_prob(*on_gpu(distances, tokens, targets), 2.5).cpu()
    assert_close(got, log_p, "log_probability")
    compare_gradients(OPS._knn_softmax_gradients, (grad, distances, tokens, 2.5))
    args = (grad, logits, distances, tokens, mixed, 2.5, 0.3, True, True)
    compare_gradients(OPS._knn_interpolate_gradients, args)
    args = (grad[:, 0].contiguous(), distances, tokens, targets, log_p, 2.5)
    compare_gradients(OPS._knn_target_log_prob_gradients, args)
