"""ExactIndex against brute force in float64, over a datastore on disk."""

from __future__ import annotations

import weakref
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from knnext.datastore import Datastore
from knnext.index import ExactIndex, check_exactness
from knnext.index.exactness import rounding_of

DIM = 24


def make_datastore(
    path: Path,
    keys: Tensor,
    *,
    documents: list[tuple[str, int]] | None = None,
    metric: str = "l2",
    entries_per_shard: int = 1000,
) -> Datastore:
    """A finished datastore on disk whose value at row i is i % 97."""
    values = (torch.arange(keys.shape[0]) % 97).to(torch.int32)
    with Datastore.create(
        path,
        keys.shape[1],
        keys.dtype,
        metric=metric,
        key_layer="att",
        vocab_size=97,
        entries_per_shard=entries_per_shard,
    ) as store:
        store.append(keys, values, documents)
    return Datastore.open(path)


def brute_force(
    queries: Tensor, keys: Tensor, k: int, metric: str = "l2", banned: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Order by (distance, index) in float64; `banned` (Q, N) rows are not there."""
    q, x = queries.to(keys.dtype).double(), keys.double()
    scores = (q[:, None] - x).square().sum(-1) if metric == "l2" else -(q @ x.T)
    if banned is not None:
        scores = scores.masked_fill(banned, float("inf"))
    distances, indices = scores.sort(dim=1, stable=True)
    distances, indices = distances[:, :k], indices[:, :k]
    indices = indices.masked_fill(distances.isinf(), -1)
    pad = (0, k - distances.shape[1])
    return (
        torch.nn.functional.pad(distances, pad, value=float("inf")),
        torch.nn.functional.pad(indices, pad, value=-1),
    )


def grid_keys(rows: int, seed: int = 0, dtype: torch.dtype = torch.float16) -> Tensor:
    """Small integers: every distance is exact in float32, and ties are plenty."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-2, 3, (rows, DIM), generator=generator).to(dtype)


@pytest.mark.parametrize("metric", ["l2", "ip"])
@pytest.mark.parametrize("chunk_rows", [1, 7, 999, 1000, 1001, 10_000])
@pytest.mark.parametrize("resident", [True, False])
def test_equals_brute_force_for_any_chunking(
    tmp_path: Path, metric: str, chunk_rows: int, resident: bool
) -> None:
    rows = {1: 60, 7: 300}.get(chunk_rows, 2503)
    store = make_datastore(tmp_path / "ds", grid_keys(rows), metric=metric)
    queries = grid_keys(11, seed=1)
    index = ExactIndex(
        store,
        chunk_bytes=chunk_rows * DIM * 2,
        resident_bytes=1 << 30 if resident else 0,
        query_batch=4,
    )
    want_distances, want_indices = brute_force(queries, store.keys[:], 50, metric)
    for _ in range(2):  # the second call uses what the first one cached
        distances, indices = index.search(queries, 50)
        assert torch.equal(indices, want_indices)
        assert torch.equal(distances.double(), want_distances)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_queries_are_rounded_like_the_keys(tmp_path: Path, dtype: torch.dtype) -> None:
    keys = torch.randn(300, DIM, generator=torch.Generator().manual_seed(0))
    store = make_datastore(tmp_path / "ds", keys.to(dtype))
    index = ExactIndex(store)
    rounded, _ = index.search(keys.to(dtype), 5)
    unrounded, indices = index.search(keys.double(), 5)
    assert torch.equal(rounded, unrounded)
    assert torch.equal(indices[:, 0], torch.arange(300))
    assert unrounded[:, 0].max() < 1e-4


def test_more_neighbors_than_rows_is_padding(tmp_path: Path) -> None:
    store = make_datastore(tmp_path / "ds", grid_keys(5))
    distances, indices = ExactIndex(store, chunk_bytes=2 * DIM * 2).search(grid_keys(3, 1), 9)
    assert (indices[:, 5:] == -1).all() and distances[:, 5:].isinf().all()
    assert (indices[:, :5].sort().values == torch.arange(5)).all()
    tokens = ExactIndex(store).tokens(indices)
    assert tokens.dtype == torch.int32
    assert torch.equal(tokens.long(), torch.where(indices < 0, -1, indices % 97))


def test_no_queries(tmp_path: Path) -> None:
    store = make_datastore(tmp_path / "ds", grid_keys(5))
    distances, indices = ExactIndex(store).search(torch.zeros(0, DIM), 3)
    assert distances.shape == indices.shape == (0, 3)
    assert indices.dtype == torch.int64


@pytest.fixture
def documents(tmp_path: Path) -> Datastore:
    """Documents of 1 row, of most of the datastore, of no rows between, and a last one."""
    sizes = [("one", 1), ("huge", 1500), ("mid", 300), ("tiny", 2), ("last", 97)]
    return make_datastore(
        tmp_path / "docs", grid_keys(1900), documents=sizes, entries_per_shard=512
    )


@pytest.mark.parametrize("chunk_rows", [64, 500, 5000])
def test_excluded_documents_are_as_if_never_stored(documents: Datastore, chunk_rows: int) -> None:
    queries = grid_keys(40, seed=2)
    excluded = torch.arange(40) % 6 - 1  # -1, and each of the five documents
    rows_document = documents.document_of(torch.arange(1900))
    banned = (rows_document == excluded[:, None]) & (excluded[:, None] >= 0)
    # k is larger than what is left without the huge document: no over-fetching could do this.
    want = brute_force(queries, documents.keys[:], 450, banned=banned)
    index = ExactIndex(documents, chunk_bytes=chunk_rows * DIM * 2, query_batch=3)
    distances, indices = index.search(queries, 450, excluded)
    assert torch.equal(indices, want[1])
    assert torch.equal(distances.double(), want[0])


def test_documents_excluded_for_all_queries(documents: Datastore) -> None:
    queries = grid_keys(7, seed=3)
    rows_document = documents.document_of(torch.arange(1900))
    for ids in ([1], [0, 1], [0, 2, 4], [], [0, 1, 2, 3, 4]):
        banned = torch.isin(rows_document, torch.tensor(ids)).expand(7, -1)
        want = brute_force(queries, documents.keys[:], 20, banned=banned)
        index = ExactIndex(documents, chunk_bytes=200 * DIM * 2)
        distances, indices = index.search(queries, 20, ids)
        assert torch.equal(indices, want[1]), ids
        assert torch.equal(distances.double(), want[0])


def test_memory_holds_one_chunk_at_a_time(tmp_path: Path) -> None:
    """Streaming keeps no chunk: not two at once, and none after the call."""
    keys = torch.randn(4096, DIM).half()
    store = make_datastore(tmp_path / "ds", keys, entries_per_shard=100)  # every chunk a copy
    sizes: list[int] = []
    alive: list[weakref.ref[Tensor]] = []
    most = 0

    class Watched:
        def __getattr__(self, name: str) -> object:
            return getattr(store, name)

        def iter_chunks(self, rows: int):  # type: ignore[no-untyped-def]
            nonlocal most
            for start, chunk, values in store.iter_chunks(rows):
                sizes.append(chunk.numel() * 2)
                alive.append(weakref.ref(chunk))
                most = max(most, sum(ref() is not None for ref in alive))
                yield start, chunk, values

    limit = 256 * DIM * 2
    index = ExactIndex(Watched(), chunk_bytes=limit, resident_bytes=0)  # type: ignore[arg-type]
    for _ in range(2):
        index.search(keys[:9], 16)
    assert max(sizes) <= limit and len(sizes) == 2 * 16
    assert most <= 2  # the one searched, and the one being read while its name is rebound
    assert not any(ref() is not None for ref in alive)
    assert sum(norms.numel() for norms in index._chunks._sqnorms.values()) == 4096


def test_squared_norms_are_computed_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from knnext.index import chunk_reader

    calls = []
    real = chunk_reader.key_sqnorms
    monkeypatch.setattr(chunk_reader, "key_sqnorms", lambda keys: calls.append(1) or real(keys))
    store = make_datastore(tmp_path / "ds", grid_keys(1000))
    index = ExactIndex(store, chunk_bytes=100 * DIM * 2, resident_bytes=0)
    for _ in range(3):
        index.search(grid_keys(4), 3)
    assert len(calls) == 10


def test_metric_may_differ_from_the_datastore(tmp_path: Path) -> None:
    store = make_datastore(tmp_path / "ds", grid_keys(200))
    queries = grid_keys(4, 5)
    distances, indices = ExactIndex(store, metric="ip").search(queries, 10)
    want = brute_force(queries, store.keys[:], 10, "ip")
    assert torch.equal(indices, want[1]) and torch.equal(distances.double(), want[0])


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ((torch.zeros(2, DIM + 1), 3), ValueError, r"queries must be \(Q, 24\)"),
        ((torch.zeros(DIM), 3), ValueError, "queries must be"),
        ((torch.zeros(2, DIM, dtype=torch.int64), 3), TypeError, "floating point"),
        (([[0.0] * DIM], 3), TypeError, "must be a tensor"),
        ((torch.zeros(2, DIM), 0), ValueError, "k must be"),
        ((torch.zeros(2, DIM), 2.0), ValueError, "k must be"),
        ((torch.zeros(2, DIM), 3, torch.tensor([0])), ValueError, r"must be \(2,\)"),
        ((torch.zeros(2, DIM), 3, torch.tensor([0.0, 1.0])), TypeError, "integers"),
        ((torch.zeros(2, DIM), 3, torch.tensor([0, 5])), ValueError, "ids from -1 to 4, got 5"),
        ((torch.zeros(2, DIM), 3, [-1]), ValueError, "ids from 0 to 4, got -1"),
    ],
)
def test_bad_arguments_are_named(
    documents: Datastore, arguments: tuple, error: type[Exception], words: str
) -> None:
    with pytest.raises(error, match=words):
        ExactIndex(documents).search(*arguments)


def test_bad_settings_are_named(documents: Datastore) -> None:
    for settings, words in (
        ({"metric": "cosine"}, "metric must be one of"),
        ({"chunk_bytes": 0}, "chunk_bytes"),
        ({"query_batch": 0}, "query_batch"),
    ):
        with pytest.raises(ValueError, match=words):
            ExactIndex(documents, **settings)


def test_exclusion_needs_documents(tmp_path: Path) -> None:
    store = make_datastore(tmp_path / "ds", grid_keys(10))
    with pytest.raises(ValueError, match="no documents"):
        ExactIndex(store).search(torch.zeros(2, DIM), 3, [0])


class TestExactness:
    """check_exactness must pass a right index and catch a wrong one."""

    @pytest.fixture
    def store(self, tmp_path: Path) -> Datastore:
        keys = torch.randn(1500, DIM, generator=torch.Generator().manual_seed(3))
        return make_datastore(tmp_path / "ds", keys.half())

    @pytest.mark.parametrize("metric", ["l2", "ip"])
    def test_exact_search_passes(self, store: Datastore, metric: str) -> None:
        queries = torch.randn(64, DIM, generator=torch.Generator().manual_seed(4))
        report = check_exactness(ExactIndex(store, metric=metric), queries, 32, sample=20)
        assert report.exact and report.num_queries == 20 and report.k == 32
        assert report.recall == 1.0 and report.ties == 0
        assert 0 < report.min_gap <= report.median_gap
        assert report.max_distance_error < 1e-6

    @pytest.mark.parametrize("metric", ["l2", "ip"])
    def test_gap_is_the_one_of_brute_force(self, store: Datastore, metric: str) -> None:
        queries = torch.randn(5, DIM, generator=torch.Generator().manual_seed(5))
        distances, _ = brute_force(queries.half(), store.keys[:], 33, metric)
        report = check_exactness(ExactIndex(store, metric=metric), queries, 32, sample=5)
        gaps = distances[:, 32] - distances[:, 31]
        assert report.min_gap == pytest.approx(float(gaps.min()), rel=1e-6)

    def test_ties_are_counted(self, tmp_path: Path) -> None:
        store = make_datastore(tmp_path / "twice", grid_keys(40).repeat_interleave(2, 0))
        report = check_exactness(ExactIndex(store), grid_keys(40)[:8], 1, sample=8)
        assert report.ties == 8 and report.min_gap == 0 and report.exact

    def test_missing_and_wrong_rows_are_caught(self, store: Datastore) -> None:
        class Wrong(ExactIndex):
            def search(self, queries, k, exclude_documents=None):  # type: ignore[no-untyped-def]
                distances, indices = super().search(queries, k + 1, exclude_documents)
                return distances[:, 1:], indices[:, 1:]

        report = check_exactness(Wrong(store), torch.randn(16, DIM), 8, sample=4)
        assert not report.exact
        assert report.missing == 4 and report.wrong == 4
        assert report.recall == pytest.approx(7 / 8)

    def test_wrong_distances_show(self, store: Datastore) -> None:
        class Off(ExactIndex):
            def search(self, queries, k, exclude_documents=None):  # type: ignore[no-untyped-def]
                distances, indices = super().search(queries, k, exclude_documents)
                return distances.sqrt(), indices

        report = check_exactness(Off(store), torch.randn(16, DIM), 8)
        assert report.max_distance_error > 1e-2

    def test_padding_is_missing_but_not_wrong(self, store: Datastore) -> None:
        class Short(ExactIndex):
            def search(self, queries, k, exclude_documents=None):  # type: ignore[no-untyped-def]
                distances, indices = super().search(queries, k, exclude_documents)
                indices[:, -1], distances[:, -1] = -1, float("inf")
                return distances, indices

        report = check_exactness(Short(store), torch.randn(16, DIM), 8, sample=5)
        assert report.missing == 5 and report.wrong == 0


@pytest.mark.parametrize(
    ("device", "dtype", "refine", "want"),
    [
        ("cpu", torch.float16, False, 1e-6),
        ("cuda:1", torch.float32, False, 1e-6),
        ("cuda", torch.float16, True, 1e-6),
        ("cuda", torch.float16, False, 2e-5),
        ("cuda", torch.bfloat16, False, 2e-5),
    ],
)
def test_rounding_is_that_of_the_units_that_multiply(device, dtype, refine, want) -> None:
    for dim, factor in ((64, 1), (4096, 4 if want > 1e-6 else 1)):
        store = SimpleNamespace(dtype=dtype, dim=dim)
        index = SimpleNamespace(datastore=store, device=torch.device(device), refine=refine)
        assert rounding_of(index) == pytest.approx(want * factor)
