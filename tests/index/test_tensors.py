"""Indexes of plain tensors and arrays: what is found, what is copied, what is refused."""

from __future__ import annotations

import pickle
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from knnext.index import ExactIndex, FaissIndex, Filter
from knnext.index.base import Index

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
N, D, K = 700, 24, 9


def rows(count: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(count, D, generator=generator) * 2 + 1).to(dtype)


def plain(queries: Tensor, keys: Tensor, metric: str, k: int = K) -> tuple[Tensor, Tensor]:
    """By every distance in float64."""
    q, x = queries.double(), keys.double()
    if metric == "l2":
        distances = (q[:, None] - x[None]).square().sum(dim=-1)
    elif metric == "ip":
        distances = -q @ x.T
    else:
        distances = 1 - cosine_similarity(q[:, None], x[None], dim=-1)
    found = distances.sort(dim=1, stable=True)
    return found.values[:, :k].float(), found.indices[:, :k]


def close(found: tuple[Tensor, Tensor], wanted: tuple[Tensor, Tensor], off: float) -> None:
    assert found[0].dtype == torch.float32 and found[1].dtype == torch.int64
    torch.testing.assert_close(found[0], wanted[0], atol=off, rtol=off)
    assert (found[1] == wanted[1]).float().mean() > (0.99 if off < 1e-3 else 0.5)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("metric", ["l2", "ip", "cosine"])
@pytest.mark.parametrize("codes", [False, True])
def test_the_nearest(metric: str, dtype: torch.dtype, codes: bool) -> None:
    keys, queries = rows(N, dtype=dtype), rows(20, 1, dtype)
    index = ExactIndex.from_tensors(keys, metric=metric, codes=codes)
    assert isinstance(index, Index) and len(index) == index.ntotal == N
    rounding = 1e-4 if metric != "cosine" or dtype == torch.float32 else 8 * torch.finfo(dtype).eps
    close(index.search(queries, K), plain(queries, keys, metric), rounding)
    distances, indices = index.search(keys[:5], 1)
    if metric != "ip":
        assert indices.flatten().tolist() == [0, 1, 2, 3, 4]
        assert distances.min() >= 0 and distances.max() <= rounding


@pytest.mark.parametrize("metric", ["l2", "ip", "cosine"])
@pytest.mark.parametrize("codes", [False, True])
@pytest.mark.parametrize("sizes", [(0, N), (300, 400), (650, *[1] * 50), (1, 1, 2, 3, 693)])
def test_added_is_as_given_at_once(metric: str, codes: bool, sizes: tuple[int, ...]) -> None:
    keys, values = rows(N), torch.arange(N) % 50
    queries = torch.cat([rows(10, 1), keys[-4:]])
    first = sizes[0]
    index = ExactIndex.from_tensors(keys[:first], values[:first], metric=metric, codes=codes)
    index.search(queries, 2)  # what it keeps must not outlive an addition
    for size in sizes[1:]:
        index.add(keys[first : first + size], values[first : first + size])
        first += size
    assert len(index) == N == first
    whole = ExactIndex.from_tensors(keys, values, metric=metric)
    found, wanted = index.search(queries, K), whole.search(queries, K)
    assert torch.equal(found[1], wanted[1])
    torch.testing.assert_close(found[0], wanted[0], atol=1e-6, rtol=1e-6)
    assert torch.equal(index.tokens(found[1]), (found[1] % 50).int())


@pytest.mark.parametrize("made", ["keys", "codes", "faiss"])
def test_a_restricted_index_sees_what_is_added(made: str) -> None:
    """To the index that it is of; as one does that is restricted afterwards."""
    keys, values, queries = rows(N), torch.arange(N), rows(4, 1)
    if made == "faiss":
        pytest.importorskip("faiss")
        index: Any = FaissIndex.from_tensors(keys[:500], values[:500], factory="Flat", gpu=False)
    else:
        index = ExactIndex.from_tensors(keys[:500], values[:500], codes=made == "codes")
    some = Filter(exclude_rows=[0, 3])
    early = index.restricted(some)
    early.tokens(early.search(queries, K)[1])
    index.add(keys[500:], values[500:])
    for one, of in ((early, index.restricted(some)), (early.restricted(None), index)):
        found, wanted = one.search(queries, K), of.search(queries, K)
        assert torch.equal(found[0], wanted[0]) and torch.equal(found[1], wanted[1])
        assert found[1].max() >= 500 and torch.equal(one.tokens(found[1]), found[1].int())


def test_keys_are_not_copied() -> None:
    keys = rows(N)
    for given in (keys, keys.numpy()):
        store: Any = ExactIndex.from_tensors(given).datastore
        assert store.keys[0:N].data_ptr() == keys.data_ptr()
    index = ExactIndex.from_tensors(keys)
    index.add(rows(3, 5))
    assert index.datastore.keys[0:N].data_ptr() == keys.data_ptr()
    read_only = keys.numpy()
    read_only.flags.writeable = False
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        store = ExactIndex.from_tensors(read_only).datastore
    assert store.keys[0:N].data_ptr() == keys.data_ptr()
    cosine: Any = ExactIndex.from_tensors(keys, metric="cosine").datastore
    assert cosine.keys[0:N].data_ptr() != keys.data_ptr()
    assert torch.equal(keys, rows(N))
    assert "in memory" in index.describe()


def test_numpy() -> None:
    """What someone from FAISS has: float32 arrays in, (distances, indices) out."""
    keys, queries = rows(N), rows(6, 1)
    wanted = ExactIndex.from_tensors(keys).search(queries, K)
    for dtype in (np.float32, np.float64):
        values = np.arange(N, dtype=np.int64)
        index = ExactIndex.from_tensors(keys.numpy().astype(dtype), values)
        found = index.search(queries.numpy().astype(dtype), K)
        assert torch.equal(found[1], wanted[1]) and torch.equal(found[0], wanted[0])
        index.add(keys[:3].numpy(), np.arange(3))
        assert len(index) == N + 3
    mirrored = keys.numpy()[::-1]
    assert torch.equal(
        ExactIndex.from_tensors(mirrored).search(keys[:1], 1)[1], torch.tensor([[N - 1]])
    )


def test_zeros_have_a_cosine_of_zero() -> None:
    keys = torch.eye(4)[:3].repeat(1, 1)
    keys = torch.cat([keys, torch.zeros(1, 4), -keys[:1]])
    index = ExactIndex.from_tensors(keys, metric="cosine")
    distances, indices = index.search(torch.stack([keys[0] * 7, torch.zeros(4)]), 5)
    assert indices.tolist() == [[0, 1, 2, 3, 4], [0, 1, 2, 3, 4]]
    assert distances.tolist() == [[0, 1, 1, 1, 2], [1, 1, 1, 1, 1]]
    padded = index.search(keys[:1], 7)
    assert padded[0][0, 5:].tolist() == [float("inf")] * 2 and padded[1][0, 5:].tolist() == [-1, -1]


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_cosine_of_tiny_and_huge_rows(scale: float) -> None:
    keys, queries = rows(50) * scale, rows(4, 1) * scale
    found = ExactIndex.from_tensors(keys, metric="cosine").search(queries, 3)
    close(found, plain(rows(4, 1), rows(50), "cosine", 3), 1e-5)


@pytest.mark.parametrize("metric", ["l2", "cosine"])
def test_documents_are_excluded(metric: str) -> None:
    keys, documents = rows(N), torch.arange(N) // 100
    index = ExactIndex.from_tensors(keys[:650], metric=metric, documents=documents[:650])
    index.add(keys[650:], documents=documents[650:])
    for exclude in ([2, 6], torch.tensor([0, 6, -1])):
        found = index.search(keys[[5, 660, 230]], 4, exclude)
        out = [[2, 6]] * 3 if isinstance(exclude, list) else [[0], [6], []]
        for row, (query, gone) in enumerate(zip(keys[[5, 660, 230]], out, strict=True)):
            kept = (~torch.isin(documents, torch.tensor(gone))).nonzero().flatten()
            assert torch.equal(found[1][row], kept[plain(query[None], keys[kept], metric, 4)[1][0]])
    with pytest.raises(ValueError, match="has no documents"):
        ExactIndex.from_tensors(keys).search(keys[:1], 1, [0])


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: ExactIndex.from_tensors(rows(4)[0]), ValueError, r"keys must be \(N, D\)"),
        (lambda: ExactIndex.from_tensors(rows(4).int()), TypeError, "keys must be floating point"),
        (
            lambda: ExactIndex.from_tensors([[1.0]]),
            TypeError,
            "a tensor or a numpy array, got list",
        ),
        (lambda: ExactIndex.from_tensors(rows(4) / 0), ValueError, "finite numbers, and row 0"),
        (
            lambda: ExactIndex.from_tensors(rows(4), metric="l1"),
            ValueError,
            "metric must be one of",
        ),
        (
            lambda: ExactIndex.from_tensors(rows(4), torch.arange(3)),
            ValueError,
            r"values must be \(4,\)",
        ),
        (
            lambda: ExactIndex.from_tensors(rows(4), torch.ones(4)),
            TypeError,
            "values must be integers",
        ),
        (
            lambda: ExactIndex.from_tensors(rows(2), torch.tensor([0, -1])),
            ValueError,
            r"lie in \[0",
        ),
        (
            lambda: ExactIndex.from_tensors(rows(2), documents=torch.tensor([1, 0])),
            ValueError,
            "never go back",
        ),
        (lambda: ExactIndex.from_tensors(rows(2)).add(rows(2)[:, :3]), ValueError, r"\(n, 24\)"),
        (lambda: ExactIndex.from_tensors(rows(2)).add(rows(1), [1]), ValueError, "has no values"),
        (
            lambda: ExactIndex.from_tensors(rows(2), torch.arange(2)).add(rows(1)),
            ValueError,
            "needs values",
        ),
        (
            lambda: ExactIndex.from_tensors(rows(2).half()).add(rows(1) * 1e5),
            ValueError,
            "finite numbers",
        ),
        (
            lambda: ExactIndex.from_tensors(rows(2)).search(rows(1)[:, :3], 1),
            ValueError,
            r"\(Q, 24\)",
        ),
        (
            lambda: ExactIndex.from_tensors(rows(2)).search([[1.0]], 1),
            TypeError,
            "numpy array, got list",
        ),
        (lambda: ExactIndex.from_tensors(rows(2)).search(rows(1), 0), ValueError, "k must be"),
        (
            lambda: ExactIndex.from_tensors(rows(2)).tokens(torch.tensor([[0]])),
            ValueError,
            r"has no values.*from_tensors\(keys, values\)",
        ),
    ],
)
def test_what_is_refused(make: Callable[[], Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        make()


def test_a_refused_addition_leaves_all_as_it_was() -> None:
    index = ExactIndex.from_tensors(rows(5), torch.arange(5))
    with pytest.raises(ValueError, match="values must be"):
        index.add(rows(2, 1), torch.arange(3))
    assert len(index) == 5
    index.add(rows(2, 1), torch.arange(2))
    assert index.tokens(torch.tensor([[5, 6, -1]])).tolist() == [[0, 1, -1]]


def test_a_pickle() -> None:
    index = ExactIndex.from_tensors(rows(60), torch.arange(60), metric="cosine")
    again = pickle.loads(pickle.dumps(index))
    found, wanted = again.search(rows(3, 1), 4), index.search(rows(3, 1), 4)
    assert torch.equal(found[0], wanted[0]) and torch.equal(found[1], wanted[1])
    assert torch.equal(again.tokens(found[1]), index.tokens(wanted[1]))


# FAISS


@pytest.fixture(scope="module")
def faiss_index(one_thread: None) -> Any:
    pytest.importorskip("faiss")
    from knnext.index import FaissIndex

    return FaissIndex


@pytest.mark.parametrize("metric", ["l2", "ip", "cosine"])
def test_faiss_flat_is_exact(faiss_index: Any, metric: str) -> None:
    keys, values, queries = rows(N), torch.arange(N), rows(9, 1)
    index = faiss_index.from_tensors(keys[:600], values[:600], metric=metric, factory="Flat")
    assert isinstance(index, Index) and index.metric == metric
    index.add(keys[600:].numpy(), values[600:].numpy())
    assert len(index) == index.ntotal == N and index.num_bytes == 0
    found = index.search(queries.numpy(), K)
    close(found, plain(queries, keys, metric), 1e-4)
    assert torch.equal(index.tokens(found[1]), found[1].int())
    again = pickle.loads(pickle.dumps(index)).search(queries, K)
    assert torch.equal(again[0], found[0]) and torch.equal(again[1], found[1])


@pytest.mark.parametrize("metric", ["l2", "cosine"])
def test_faiss_lists_and_real_scores(faiss_index: Any, metric: str) -> None:
    keys, queries = rows(N), rows(9, 1)
    documents = torch.arange(N) // 100
    made = faiss_index.from_tensors(
        keys, metric=metric, factory="IVF8,SQ8", nprobe=8, documents=documents
    )
    near = made.search(queries, K)
    real = made.search(queries, K, rescore=True)
    wanted = plain(queries, keys, metric)
    assert not torch.equal(near[0], real[0])
    torch.testing.assert_close(near[0], wanted[0], atol=0.05, rtol=0.05)
    close(real, wanted, 1e-2)
    left = made.search(queries, K, [0, 3])[1] // 100
    assert not torch.isin(left, torch.tensor([0, 3])).any()


def test_what_faiss_refuses(faiss_index: Any) -> None:
    with pytest.raises(ValueError, match="metric must be one of"):
        faiss_index.from_tensors(rows(4), metric="l1")
    with pytest.raises(ValueError, match="asks for 64 lists"):
        faiss_index.from_tensors(rows(4), factory="IVF64,Flat")
    with pytest.raises(ValueError, match="no entries"):
        faiss_index.from_tensors(rows(0))
    with pytest.raises(ValueError, match=r"\(n, 24\)"):
        faiss_index.from_tensors(rows(4)).add(rows(4)[:, :3])


def test_datastores_take_nothing_in(stores: dict[str, Any], tmp_path: Path) -> None:
    index = ExactIndex(stores["l2"])
    with pytest.raises(TypeError, match="add is for an index from tensors"):
        index.add(rows(1))
    with pytest.raises(ValueError, match=r"ExactIndex\.from_tensors searches by it"):
        ExactIndex(stores["l2"], metric="cosine")
    assert len(index) == len(stores["l2"])


# What a first user found


@pytest.mark.parametrize("per_query", [True, False])
def test_ids_of_documents_may_be_far_larger_than_there_are_rows(per_query: bool) -> None:
    """The cost is the rows': an array by id would take 16 GiB here."""
    keys = torch.randn(4, 8)
    documents = torch.tensor([3, 2**31 - 5, 2**31 - 5, 2**31 - 2])
    index = ExactIndex.from_tensors(keys, documents=documents)
    assert index.search(keys[:1], 1)[1].tolist() == [[0]]
    left_out = torch.tensor([2**31 - 5]) if per_query else [2**31 - 5]
    assert index.search(keys[1:2], 4, left_out)[1].sort().values.tolist() == [[-1, -1, 0, 3]]
    with pytest.raises(ValueError, match="document"):
        index.search(keys[:1], 1, [2**31 - 1])


def test_an_empty_index_with_documents_is_searched() -> None:
    empty = torch.zeros(0, dtype=torch.int64)
    index = ExactIndex.from_tensors(torch.zeros(0, 8), documents=empty)
    assert index.search(torch.randn(2, 8), 3)[1].tolist() == [[-1] * 3] * 2
    index.add(torch.randn(2, 8), documents=torch.tensor([4, 9]))
    assert index.search(torch.randn(1, 8), 3, [4])[1].tolist() == [[1, -1, -1]]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_cosine_distances_lie_between_0_and_2(dtype: torch.dtype) -> None:
    keys = torch.randn(500, 16, generator=torch.Generator().manual_seed(0)).to(dtype)
    queries = torch.cat([keys[:100], -keys[:100]])
    found = ExactIndex.from_tensors(keys, metric="cosine").search(queries, 501)[0]
    assert found[:, :500].min() >= 0 and found[:, :500].max() <= 2
    assert found[:, 500].isinf().all()


@pytest.mark.parametrize("metric", ["l2", "ip", "cosine"])
@pytest.mark.parametrize("kind", ["tensor", "numpy"])
def test_one_buffer_may_be_added_from_again_and_again(metric: str, kind: str) -> None:
    rows, queries = torch.randn(400, 16), torch.randn(5, 16)
    buffer, values = torch.empty(100, 16), torch.empty(100, dtype=torch.int32)
    index = ExactIndex.from_tensors(rows[:0], torch.zeros(0, dtype=torch.int32), metric=metric)
    for first in range(0, 400, 100):
        buffer.copy_(rows[first : first + 100])
        values.copy_(torch.arange(first, first + 100))
        index.add(*((buffer, values) if kind == "tensor" else (buffer.numpy(), values.numpy())))
    whole = ExactIndex.from_tensors(rows, torch.arange(400), metric=metric)
    for ours, theirs in zip(index.search(queries, 9), whole.search(queries, 9), strict=True):
        assert torch.equal(ours, theirs)
    assert torch.equal(index.tokens(index.search(queries, 9)[1]), index.search(queries, 9)[1])


@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.uint16, np.uint32, np.uint64])
def test_values_and_documents_of_any_integers(dtype: type) -> None:
    numbers = np.arange(50).astype(dtype)
    index = ExactIndex.from_tensors(torch.randn(50, 8), numbers, documents=numbers)
    assert index.tokens(torch.arange(50)[None]).tolist() == [list(range(50))]
    if np.iinfo(dtype).max >= 2**31:
        with pytest.raises(ValueError, match="must lie in"):
            ExactIndex.from_tensors(torch.randn(1, 8), np.array([2**31], dtype=dtype))


def test_exactness_of_cosine_is_measured_as_cosine() -> None:
    from knnext.index import check_exactness

    keys = torch.randn(600, 16, generator=torch.Generator().manual_seed(3))
    index = ExactIndex.from_tensors(keys, metric="cosine")
    right = check_exactness(index, keys[:20] + 0.1, 5)
    assert right.exact and right.recall == 1 and right.max_distance_error < 1e-6

    class Wrong:
        datastore, metric, device = index.datastore, "cosine", "cpu"

        def search(self, queries: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
            distances, indices = index.search(queries, k + 50)
            return distances[:, 50:], indices[:, 50:]

    wrong = check_exactness(Wrong(), keys[:20] + 0.1, 5)  # type: ignore[arg-type]
    assert wrong.wrong > 50 and wrong.recall == 0
