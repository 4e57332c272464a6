"""merge_topk against its definition in Python."""

from __future__ import annotations

import math
import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import knnext
from knnext.testing import assert_equal_results, assert_order
from tests.ops.bad_arguments import assert_refused

INF, NAN = float("inf"), float("nan")


def by_definition(distances: torch.Tensor, indices: torch.Tensor, k: int):
    """Sorted pairs, row by row; -1 and NaN are no candidates."""
    rows = []
    for d, i in zip(distances.tolist(), indices.tolist(), strict=True):
        pairs = [(a, b) for a, b in zip(d, i, strict=True) if b >= 0 and not math.isnan(a)]
        rows.append((sorted(pairs) + [(INF, -1)] * k)[:k])
    shape = (distances.shape[0], k)
    return (
        torch.tensor([[a for a, _ in row] for row in rows]).reshape(shape),
        torch.tensor([[b for _, b in row] for row in rows], dtype=torch.int64).reshape(shape),
    )


@settings(max_examples=100, deadline=None)
@given(
    rows=st.integers(0, 5),
    m=st.integers(0, 300),
    k=st.integers(1, 200),
    few_values=st.booleans(),
    high=st.sampled_from([3, 1000, 1 << 31, 1 << 45]),
    seed=st.integers(0, 1 << 30),
)
def test_any_candidates(rows: int, m: int, k: int, few_values: bool, high: int, seed: int) -> None:
    torch.manual_seed(seed)
    distances = torch.randn(rows, m)
    if few_values:
        distances = torch.tensor([0.0, -1.0, 1.0, INF, -INF, NAN])[torch.randint(0, 6, (rows, m))]
    indices = torch.randint(-2, high, (rows, m))
    got = knnext.merge_topk(distances, indices, k)
    assert_order(*got)
    assert_equal_results(got, by_definition(distances, indices, k))


@pytest.mark.parametrize("m", [1023, 1024, 1025, 4096, 20_000])
@pytest.mark.parametrize("k", [1, 64, 65, 1024, 1025])
def test_sizes(m: int, k: int) -> None:
    distances, indices = torch.randn(7, m).round(decimals=1), torch.randint(-1, 1 << 40, (7, m))
    assert_equal_results(
        knnext.merge_topk(distances, indices, k), by_definition(distances, indices, k)
    )


def test_padding_loses_to_everything() -> None:
    distances = torch.tensor([[-5.0, 3.0, INF, 1.0]])
    indices = torch.tensor([[-1, 8, 4, -1]])
    got = knnext.merge_topk(distances, indices, 4)
    assert got[1].tolist() == [[8, 4, -1, -1]] and got[0].tolist() == [[3.0, INF, INF, INF]]


def test_negative_zero_ties_with_zero() -> None:
    distances = torch.tensor([[0.0, -0.0, 0.0, -0.0]])
    got = knnext.merge_topk(distances, torch.tensor([[3, 4, 1, 2]]), 4)
    assert got[1].tolist() == [[1, 2, 3, 4]]


def test_subnormal_and_extreme_distances() -> None:
    values = [1e-45, -1e-45, 0.0, 3.4e38, -3.4e38, INF, -INF, 1e-38]
    distances = torch.tensor([values])
    got = knnext.merge_topk(distances, torch.arange(8)[None], 8)
    assert got[0].tolist() == [sorted(distances[0].tolist())]


def test_strides() -> None:
    distances, indices = torch.randn(40, 6).T, torch.randint(-1, 90, (40, 12))[:, ::2].T
    got = knnext.merge_topk(distances, indices, 9)
    assert_equal_results(got, by_definition(distances, indices, 9))


D, I = torch.randn(3, 5), torch.zeros(3, 5, dtype=torch.int64)  # noqa: E741
BAD = {
    "distances dtype": (D.double(), I, 2, "distances must be a float32 tensor of shape (Q, m)"),
    "distances rank": (D[0], I, 2, "distances must be a float32 tensor of shape (Q, m), got"),
    "indices dtype": (
        D,
        I.int(),
        2,
        "indices must be an int64 tensor of shape (3, 5), got an",
    ),
    "indices shape": (D, I[:, 1:], 2, "got an int64 tensor of shape (3, 4)"),
    "k": (D, I, 0, "k must be at least 1, got 0"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_arguments_are_refused_alike_by_real_and_fake_tensors(name: str) -> None:
    distances, indices, k, match = BAD[name]
    assert_refused(knnext.merge_topk, match, distances, indices, k)


def test_opcheck_and_no_gradient() -> None:
    distances = torch.randn(3, 5, requires_grad=True)
    torch.library.opcheck(torch.ops.knnext.merge_topk, (distances, I, 2))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not knnext.merge_topk(distances, I, 2)[0].requires_grad


def test_compiles_as_one_graph() -> None:
    compiled = torch.compile(
        lambda d, i: knnext.merge_topk(2 * d, i, 3),
        fullgraph=True,
        dynamic=True,
        backend="aot_eager",
    )
    for m in (5, 8):
        d, i = torch.randn(3, m), torch.arange(m).expand(3, m)
        assert_equal_results(compiled(d, i), knnext.merge_topk(2 * d, i, 3))


def test_the_same_bits_whatever_the_threads() -> None:
    distances, indices = torch.randn(50, 3000), torch.randint(-1, 99, (50, 3000))
    before = torch.get_num_threads()
    want = knnext.merge_topk(distances, indices, 100)
    try:
        torch.set_num_threads(1)
        assert_equal_results(knnext.merge_topk(distances, indices, 100), want)
    finally:
        torch.set_num_threads(before)
