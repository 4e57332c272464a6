"""rescore: values, padding, gradients, errors."""

from __future__ import annotations

import resource
import warnings

import pytest
import torch

import knnext
from knnext import reference
from knnext.testing import assert_close
from tests.ops.bad_arguments import assert_refused

DTYPES = [torch.float16, torch.bfloat16, torch.float32]
METRICS = ["l2", "ip"]
INF = float("inf")


def wanted(queries, keys, indices, metric: str) -> torch.Tensor:
    return reference.rescore(queries, keys, indices, metric, compute_dtype=torch.float64)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", [1, 7, 15, 16, 65, 1600, 4096])
def test_values(metric: str, dtype: torch.dtype, dim: int) -> None:
    queries, keys = torch.randn(6, dim).to(dtype), torch.randn(80, dim).to(dtype)
    indices = torch.randint(-1, 80, (6, 11))
    want = wanted(queries, keys, indices, metric)
    rows = keys.double()[indices.clamp_min(0)]
    scale = want if metric == "l2" else (queries.double()[:, None] * rows).abs().sum(-1)
    scale = scale.masked_fill(indices < 0, 0.0)
    assert_close(knnext.rescore(queries, keys, indices, metric), want, "direct", scale)


def test_identical_rows_are_at_zero() -> None:
    keys = torch.randn(30, 700).half() * 90
    assert (knnext.rescore(keys, keys, torch.arange(30)[:, None]) == 0).all()
    zero = knnext.rescore(torch.zeros(1, 3), torch.ones(1, 3), torch.zeros(1, 1).long(), "ip")
    assert zero.item() == 0 and not zero.signbit().item()


def test_near_identical_rows_of_large_norm() -> None:
    keys = torch.full((1, 1024), 100.0)
    queries = keys + 2.0**-10
    got = knnext.rescore(queries, keys, torch.zeros(1, 1, dtype=torch.int64))
    assert got.item() == 1024 * 2.0**-20  # the expanded form would be off by 10


def test_padding_and_emptiness() -> None:
    queries, keys = torch.randn(2, 4), torch.randn(5, 4)
    assert (knnext.rescore(queries, keys, torch.full((2, 3), -1)) == INF).all()
    assert (knnext.rescore(queries, keys[:0], torch.full((2, 3), -1)) == INF).all()
    assert knnext.rescore(queries, keys, torch.zeros(2, 0).long()).shape == (2, 0)
    assert knnext.rescore(queries[:0], keys, torch.zeros(0, 3).long()).shape == (0, 3)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_strides(metric: str, dtype: torch.dtype) -> None:
    queries = torch.randn(9, 5).to(dtype).T
    indices = torch.randint(-1, 20, (7, 10)).T[::2]
    for keys in (torch.randn(9, 20).to(dtype).T, torch.randn(40, 30).to(dtype)[::2, 3:12]):
        got = knnext.rescore(queries, keys, indices, metric)
        want = knnext.rescore(*(t.contiguous() for t in (queries, keys, indices)), metric)
        assert torch.equal(got, want)


@pytest.mark.parametrize("bad", [-2, 20, 1 << 40, -(1 << 60)])
def test_an_index_out_of_range_is_named(bad: int) -> None:
    indices = torch.randint(-1, 20, (300, 100))
    indices[70, 3] = bad
    indices[200, 3] = 99
    with pytest.raises(RuntimeError, match=rf"indices must lie in \[-1, 20\), got {bad}"):
        knnext.rescore(torch.randn(300, 4), torch.randn(20, 4), indices)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_gradients_are_those_of_the_formula(metric: str, dtype: torch.dtype) -> None:
    queries = torch.randn(5, 9).to(dtype).requires_grad_()
    keys = torch.randn(8, 9).to(dtype).requires_grad_()
    indices = torch.randint(-1, 8, (5, 12))  # keys come more than once a row
    upstream = torch.randn(5, 12)
    upstream[0, 0] = 0.0

    def grads(run) -> tuple[torch.Tensor, ...]:
        out = run(queries, keys, indices, metric).masked_fill(indices < 0, 0.0)
        return torch.autograd.grad((out * upstream).sum(), (queries, keys))

    want = grads(lambda *a: reference.rescore(*a, compute_dtype=torch.float64))
    for got, w in zip(grads(knnext.rescore), want, strict=True):
        assert got.dtype == dtype
        if dtype == torch.float32:
            assert_close(got, w, "gradient", w.abs().max().item())
        else:
            torch.testing.assert_close(got, w, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("metric", ["l2", "ip"])
def test_gradcheck_in_float64(metric: str) -> None:
    queries = torch.randn(4, 5, dtype=torch.float64, requires_grad=True)
    keys = torch.randn(7, 5, dtype=torch.float64, requires_grad=True)
    indices = torch.randint(-1, 7, (4, 6))

    def scores(q: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        return knnext.rescore(q, x, indices, metric).masked_fill(indices < 0, 0.0)

    assert torch.autograd.gradcheck(scores, (queries, keys))
    got = knnext.rescore(queries, keys.detach(), indices, metric)
    want = reference.rescore(queries, keys, indices, metric)
    assert got.dtype == want.dtype == torch.float64
    torch.testing.assert_close(got, want)


def test_gradient_of_infinite_padding_is_zero() -> None:
    queries, keys = torch.randn(2, 3, requires_grad=True), torch.randn(4, 3, requires_grad=True)
    indices = torch.tensor([[-1, -1], [2, -1]])
    weights = torch.softmax(-knnext.rescore(queries, keys, indices)[1], 0)
    weights[0].backward()
    assert queries.grad.isfinite().all() and keys.grad.isfinite().all()
    assert (keys.grad[[0, 1, 3]] == 0).all()


def test_backward_is_bounded_in_memory() -> None:
    # The rows named are 240 MB in float32; before the bound they were held several times over.
    queries = torch.randn(120, 512).half().requires_grad_()
    keys = torch.randn(900, 512).half().requires_grad_()
    out = knnext.rescore(queries, keys, torch.randint(0, 900, (120, 1024)))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    out.sum().backward()
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert (after - before) * 1024 < 450 << 20


@pytest.mark.parametrize("metric", ["l2", "ip"])
def test_second_derivatives(metric: str) -> None:
    queries = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    keys = torch.randn(5, 4, dtype=torch.float64, requires_grad=True)
    indices = torch.tensor([[0, -1, 4], [2, 2, 1], [3, 0, -1]])

    def scores(q: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        return knnext.rescore(q, x, indices, metric).masked_fill(indices < 0, 0.0)

    assert torch.autograd.gradgradcheck(scores, (queries, keys))


Q, X, I = torch.randn(3, 4), torch.randn(9, 4), torch.zeros(3, 5, dtype=torch.int64)  # noqa: E741
BAD = {
    "queries dtype": (Q.int(), X, I, "l2", "queries must be a float16, bfloat16, float32"),
    "no dimension": (Q[:, :0], X[:, :0], I, "l2", "queries must have D >= 1"),
    "keys dtype": (Q, X.half(), I, "l2", "keys must be a float32 tensor of shape (N, 4)"),
    "keys width": (Q, X[:, 1:], I, "l2", "got a float32 tensor of shape (9, 3)"),
    "indices dtype": (Q, X, I.int(), "l2", "indices must be an int64 tensor of shape (3, m)"),
    "indices rows": (Q, X, I[1:], "l2", "got an int64 tensor of shape (2, 5)"),
    "metric": (Q, X, I, "L2", 'metric must be "l2" or "ip", got "L2"'),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_arguments_are_refused_alike_by_real_and_fake_tensors(name: str) -> None:
    queries, keys, indices, metric, match = BAD[name]
    assert_refused(knnext.rescore, match, queries, keys, indices, metric)


@pytest.mark.parametrize("metric", METRICS)
def test_opcheck(metric: str) -> None:
    indices = torch.tensor([[0, -1, 3], [2, 2, 1], [8, 0, -1]])
    args = (Q.clone().requires_grad_(), X.clone().requires_grad_(), indices, metric)
    torch.library.opcheck(torch.ops.knnext.rescore, args)


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_as_one_graph_with_its_gradient(dynamic: bool) -> None:
    def loss(queries: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
        indices = knnext.knn_search(queries, keys, 4)[1]
        return torch.logsumexp(-knnext.rescore(queries, keys, indices), 1).sum()

    compiled = torch.compile(loss, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for rows in (3, 6):
        queries, keys = torch.randn(rows, 5, requires_grad=True), torch.randn(20, 5)
        keys.requires_grad_()
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message=".*autograd.*")
            got = torch.autograd.grad(compiled(queries, keys), (queries, keys))
        want = torch.autograd.grad(loss(queries, keys), (queries, keys))
        assert all(torch.allclose(g, w, atol=1e-6) for g, w in zip(got, want, strict=True))
