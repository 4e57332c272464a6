"""Filters of every kind in every index: the bits of a search of the kept rows alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from knnext import knn_search
from knnext.datastore import Datastore
from knnext.index import ExactIndex, FaissIndex, Filter, StoredCodes, row_set
from knnext.index.row_set import AnyOf
from tests.index.test_exact import DIM, grid_keys, make_datastore

ROWS, K = 1900, 40
DOCUMENTS = [("one", 1), ("huge", 1500), ("mid", 300), ("tiny", 2), ("last", 97)]
ENDS = np.cumsum([rows for _, rows in DOCUMENTS])


def layout(name: str) -> Tensor:
    """(ROWS,) bool of rows that may be found."""
    generator = torch.Generator().manual_seed(5)
    rows = torch.arange(ROWS)
    shapes = {
        "random": torch.rand(ROWS, generator=generator) < 0.5,
        "rare": torch.rand(ROWS, generator=generator) < 0.01,
        "most": torch.rand(ROWS, generator=generator) < 0.99,
        "runs": rows // 150 % 2 == 0,
        "a long run": (rows > 300) & (rows < 1700),  # across files
        "none": torch.zeros(ROWS, dtype=torch.bool),
        "all": torch.ones(ROWS, dtype=torch.bool),
        "one row": rows == 1234,
        "the last": rows == ROWS - 1,
    }
    return shapes[name]


LAYOUTS = ["random", "rare", "most", "runs", "a long run", "none", "all", "one row", "the last"]


def wanted(queries: Tensor, keys: Tensor, kept: Tensor, metric: str, **options: Any) -> Any:
    """The search of the kept rows, with their numbers."""
    rows = kept.nonzero().squeeze(1)
    rounded = queries.to(keys.dtype)
    distances, places = knn_search(rounded, keys[rows], K, metric, **options)
    if not len(rows):
        return distances, places
    return distances, torch.where(places >= 0, rows[places.clamp_min(0)], places)


def assert_same(found: Any, want: Any) -> None:
    assert torch.equal(found[1], want[1])
    assert torch.equal(found[0], want[0])


@pytest.fixture(scope="module")
def stores(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Datastore]:
    folder = tmp_path_factory.mktemp("filters")
    generator = torch.Generator().manual_seed(2)
    found = {}
    for metric in ("l2", "ip"):
        # No ties for one, nothing but ties for the other.
        keys = (
            torch.randn(ROWS, DIM, generator=generator).half()
            if metric == "l2"
            else grid_keys(ROWS)
        )
        found[metric] = make_datastore(
            folder / metric, keys, documents=DOCUMENTS, metric=metric, entries_per_shard=512
        )
    StoredCodes.build(found["l2"])
    return found


@pytest.fixture(params=[64, row_set.LONG_RUN], ids=["short runs count", "as it is"])
def long_run(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(row_set, "LONG_RUN", request.param)
    return request.param


KINDS: dict[str, dict[str, Any]] = {
    "plain": {"codes": False},
    "streamed": {"codes": False, "resident_bytes": 0, "chunk_bytes": 700 * DIM * 2},
    "unrefined": {"codes": False, "refine": False},
    "coded": {"codes": True},
    "coded, in pieces": {"codes": True, "resident_bytes": 0, "chunk_bytes": 700 * (DIM + 12)},
}


@pytest.mark.parametrize("kind", KINDS)
def test_exact_search_gives_the_bits_of_the_kept_rows(
    stores: dict[str, Datastore], kind: str, long_run: int
) -> None:
    queries = torch.randn(13, DIM, generator=torch.Generator().manual_seed(3))
    for metric, store in stores.items():
        if "codes" in KINDS[kind] and KINDS[kind]["codes"] and metric == "ip":
            continue
        index = ExactIndex(store, query_batch=5, **KINDS[kind])
        keys, refine = store.keys[:], KINDS[kind].get("refine", True)
        for name in LAYOUTS:
            kept = layout(name)
            want = wanted(queries, keys, kept, metric, refine=refine)
            rows = kept.nonzero().squeeze(1)
            given = (
                Filter(mask=kept),
                Filter(rows=rows.flip(0)),
                Filter(exclude_rows=(~kept).nonzero().squeeze(1).numpy()),
            )[LAYOUTS.index(name) % 3]
            assert_same(index.search(queries, K, filter=given), want)
        index.search(queries, K)  # what stays in memory serves filters too
        assert_same(
            index.search(queries, K, filter=Filter(mask=layout("runs"))),
            wanted(queries, keys, layout("runs"), metric, refine=refine),
        )


@pytest.mark.parametrize("make", ["exact", "coded"])
def test_indexes_of_tensors_are_filtered(make: str) -> None:
    keys = grid_keys(700)
    index = ExactIndex.from_tensors(
        keys[:300], codes=make == "coded", documents=np.arange(300) // 50
    )
    index.add(keys[300:], documents=np.arange(300, 700) // 50)
    queries, kept = keys[:9].float(), layout("random")[:700]
    assert_same(
        index.search(queries, K, filter=Filter(mask=kept)),
        wanted(queries, keys, kept, "l2", refine=True),
    )
    some = torch.isin(torch.arange(700) // 50, torch.tensor([3, 7]))
    assert_same(
        index.search(queries, K, filter=Filter(documents=[7, 3])),
        wanted(queries, keys, some, "l2", refine=True),
    )
    with pytest.raises(ValueError, match="no names of documents"):
        index.search(queries, K, filter=Filter(documents=["a"]))


def of_documents(*ids: int) -> Tensor:
    return torch.isin(
        torch.from_numpy(np.searchsorted(ENDS, np.arange(ROWS), "right")), torch.tensor(ids)
    )


def test_documents_are_kept_or_left_out_by_id_and_by_name(stores: dict[str, Datastore]) -> None:
    store = stores["l2"]
    index, queries = ExactIndex(store), grid_keys(6, seed=4).float()
    for given, kept in (
        (Filter(documents=["mid", 0]), of_documents(0, 2)),
        (Filter(documents=[]), layout("none")),
        (Filter(exclude_documents=["huge", "last"]), of_documents(0, 2, 3)),
        (Filter(documents=["huge", "tiny"], exclude_documents=[3], mask=layout("random")),
         of_documents(1) & layout("random")),
    ):  # fmt: skip
        want = wanted(queries, store.keys[:], kept, "l2", refine=True)
        assert_same(index.search(queries, K, filter=given), want)
        assert_same(index.restricted(given).search(queries, K), want)
        both = wanted(queries, store.keys[:], kept & ~of_documents(2), "l2", refine=True)
        assert_same(index.restricted(given).search(queries, K, [2]), both)
    assert index.filter is None


def each_of_its_own(index: Any, queries: Tensor, filters: list[Filter | None]) -> Any:
    found = [index.search(queries[i : i + 1], K, filter=one) for i, one in enumerate(filters)]
    return torch.cat([d for d, _ in found]), torch.cat([i for _, i in found])


@pytest.mark.parametrize("kind", ["plain", "coded, in pieces"])
def test_each_query_may_have_its_own(
    stores: dict[str, Datastore], kind: str, long_run: int
) -> None:
    store = stores["l2"]
    index, queries = ExactIndex(store, **KINDS[kind]), grid_keys(6, seed=8).float()
    masks = torch.stack([layout(name) for name in LAYOUTS[:6]])
    want = each_of_its_own(index, queries, [Filter(mask=mask) for mask in masks])
    assert_same(index.search(queries, K, filter=Filter(mask=masks)), want)
    assert_same(index.search(queries, K, filter=[Filter(mask=mask) for mask in masks]), want)
    one = Filter(rows=[5, 9, 1200])
    mixed = [None, one, one, Filter(exclude_documents=["huge"]), None, one]
    assert_same(index.search(queries, K, filter=mixed), each_of_its_own(index, queries, mixed))
    ids = torch.tensor([0, -1, 2, 2, 4, 1])
    apart = [None if d < 0 else Filter(documents=[d]) for d in ids.tolist()]
    assert_same(
        index.search(queries, K, filter=Filter(documents=ids)),
        each_of_its_own(index, queries, apart),
    )
    both = Filter(documents=ids, exclude_documents=ids.flip(0), mask=layout("random"))
    apart = [
        Filter(
            documents=None if a < 0 else [a],
            exclude_documents=[] if b < 0 else [b],
            mask=layout("random"),
        )
        for a, b in zip(ids.tolist(), ids.flip(0).tolist(), strict=True)
    ]
    assert_same(index.search(queries, K, filter=both), each_of_its_own(index, queries, apart))


@pytest.mark.parametrize(("kind", "k"), [*((kind, K) for kind in KINDS), ("plain", 2040)])
def test_a_document_left_out_for_each_query_costs_no_search_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, k: int
) -> None:
    """The bits of one search a query, in one search for all of them."""
    generator, documents = torch.Generator().manual_seed(6), [("long", 900)]
    documents += [(f"d{d}", 5 + d) for d in range(20)]
    keys = torch.randn(sum(rows for _, rows in documents), DIM, generator=generator).half()
    keys[1000:1100] = keys[1000]  # those that are equally far, in several documents
    store = make_datastore(tmp_path / "s", keys, documents=documents)
    if KINDS[kind]["codes"]:
        StoredCodes.build(store)
    index = ExactIndex(store, query_batch=16, **KINDS[kind])
    own = torch.cat([torch.arange(20), torch.tensor([-1, 12, 0, 12])])
    queries = store.keys[store.document_offsets[own.clamp_min(0)]]
    queries = queries + 0.1 * torch.randn(queries.shape, generator=generator).half()
    searches: list[int] = []

    def counted(queries: Tensor, *arguments: Any, **options: Any) -> Any:
        searches.append(len(queries))
        return knn_search(queries, *arguments, **options)

    monkeypatch.setattr("knnext.index.exact.knn_search", counted)
    for more in (None, Filter(rows=torch.arange(0, len(keys), 3))):
        searches.clear()
        found = index.search(queries, k, own, filter=more)
        assert more or k != K or "resident_bytes" in KINDS[kind] or len(searches) < 12
        for place, document in enumerate(own.tolist()):
            without = [] if document < 0 else [document]
            want = index.search(queries[place : place + 1], k, without, filter=more)
            assert_same((found[0][place], found[1][place]), (want[0][0], want[1][0]))


@pytest.mark.parametrize("kind", ["plain", "coded"])
def test_a_row_does_not_find_itself(stores: dict[str, Datastore], kind: str) -> None:
    for store in stores.values():
        if KINDS[kind]["codes"] and store is not stores["l2"]:
            continue
        own = torch.tensor([3, 1899, -1, 700, 0])
        queries = store.keys[own.clamp_min(0)]
        index = ExactIndex(store, **KINDS[kind])
        without = [Filter(exclude_rows=[] if r < 0 else [r]) for r in own.tolist()]
        want = each_of_its_own(index, queries, without)
        assert_same(index.search(queries, K, filter=Filter(own_rows=own)), want)
        few = Filter(rows=[0, 3, 5], own_rows=own)
        apart = [Filter(rows=[0, 3, 5], exclude_rows=[] if r < 0 else [r]) for r in own.tolist()]
        assert_same(index.search(queries, K, filter=few), each_of_its_own(index, queries, apart))


def test_what_is_filtered_is_not_read(stores: dict[str, Datastore], long_run: int) -> None:
    """Of sparse rows only these are read, and of blocks that nobody wants nothing."""
    store, read = stores["l2"], []

    class Watched:
        selected = False

        def __len__(self) -> int:
            return len(store.keys)

        def pieces(self, rows: int) -> Any:
            return store.keys.pieces(rows)

        def __getitem__(self, index: Any) -> Tensor:
            rows = range(*index.indices(ROWS)) if isinstance(index, slice) else index.tolist()
            read.extend(rows)
            return store.keys[index]

    class Store:
        keys = Watched()

        def __getattr__(self, name: str) -> Any:
            return getattr(store, name)

    index = ExactIndex(Store(), codes=False, chunk_bytes=200 * DIM * 2)  # type: ignore[arg-type]
    for name in LAYOUTS:
        read.clear()
        index.search(store.keys[:2], 3, filter=Filter(mask=layout(name)))
        assert sorted(read) == layout(name).nonzero().squeeze(1).tolist(), name
    per_query = torch.tensor([0, 4])
    read.clear()
    index.search(store.keys[:2], 3, filter=Filter(documents=per_query))
    assert sorted(read) == of_documents(0, 4).nonzero().squeeze(1).tolist()


FACTORIES = ["Flat", "IVF4,Flat", "PCA16,IVF4,PQ8", "HNSW8", "IVF4,RQ2x4"]


@pytest.mark.parametrize("factory", FACTORIES)
def test_faiss_finds_among_the_kept_rows(one_thread: None, tmp_path: Path, factory: str) -> None:
    """The best of what it finds among all rows; of equal ones FAISS takes any."""
    store = make_datastore(tmp_path / "ds", grid_keys(ROWS), documents=DOCUMENTS)
    index = FaissIndex.build(store, factory=factory, nprobe=4, gpu=False)
    queries = grid_keys(5, seed=7).float()
    everything = index.search(queries, ROWS)
    for name in LAYOUTS:
        kept = layout(name)
        allowed = torch.zeros(everything[1].shape, dtype=torch.bool)
        real = everything[1] >= 0
        allowed[real] = kept[everything[1][real]]
        for given in (Filter(mask=kept), Filter(rows=kept.nonzero().squeeze(1))):
            distances, indices = index.search(queries, 20, filter=given)
            for q in range(5):
                want, size = everything[0][q][allowed[q]][:20], int((indices[q] >= 0).sum())
                assert kept[indices[q, :size]].all(), name
                if "HNSW" not in factory:  # which looks further the more is asked of it
                    assert torch.equal(distances[q, :size], want), name
                assert distances[q, size:].isinf().all(), (name, q)
    own = torch.tensor([7, 3, -1, 1000, 1])
    found = index.search(store.keys[own.clamp_min(0)], 9, filter=Filter(own_rows=own), rescore=True)
    assert not (found[1] == own[:, None]).any()
    both = index.search(queries, 9, [1], filter=Filter(documents=["huge", "mid"]))
    inside = both[1][both[1] >= 0]
    assert len(inside) and of_documents(2)[inside].all()


def test_the_union_asks_no_more_than_it_must() -> None:
    class Never(row_set.RowSet):
        def window(self, start: int, stop: int) -> Any:
            raise AssertionError("was asked")

    assert AnyOf([row_set.ALL_ROWS, Never()]).window(0, 5) is True


@pytest.mark.parametrize(
    ("make", "error", "words"),
    [
        (lambda: Filter(mask=[1, 0]), TypeError, "tensor or a numpy array"),
        (lambda: Filter(mask=torch.zeros(ROWS)), TypeError, "mask must be bool"),
        (lambda: Filter(rows=torch.zeros(ROWS, dtype=torch.bool)), TypeError, "a mask is mask="),
        (lambda: Filter(rows=[0.5]), TypeError, "rows must be row numbers"),
        (lambda: Filter(documents="mid"), TypeError, "got the one name 'mid'"),
        (lambda: Filter(documents=3), TypeError, "a list of ids or names"),
        (lambda: Filter(documents=[3.7]), TypeError, "ids or names of documents, got 3.7"),
        (lambda: Filter(exclude_documents=[True]), TypeError, "ids or names"),
        (lambda: Filter(exclude_documents=[b"2"]), TypeError, "ids or names"),
        (lambda: Filter(documents=np.array([0.5])), TypeError, "ids or names"),
        (lambda: Filter(documents=[""]), ValueError, "no document called ''"),
        (lambda: Filter(mask=torch.ones(5, dtype=torch.bool)), ValueError, "1,900 rows"),
        (lambda: Filter(mask=torch.ones(3, ROWS, dtype=torch.bool)), ValueError, r"\(2,\)"),
        (lambda: Filter(rows=[0, ROWS]), ValueError, r"rows must lie in \[0, 1900\)"),
        (lambda: Filter(exclude_rows=[-1]), ValueError, "exclude_rows must lie"),
        (lambda: Filter(own_rows=[0, -2]), ValueError, "own_rows must lie"),
        (lambda: Filter(own_rows=[0, 1, 2]), ValueError, r"own_rows .* must be \(2,\)"),
        (lambda: Filter(documents=[5]), ValueError, "documents must hold ids from 0 to 4, got 5"),
        (lambda: Filter(documents=torch.tensor([0, 7])), ValueError, "ids from -1 to 4, got 7"),
        (lambda: Filter(exclude_documents=["mid", "no"]), ValueError, "no document called 'no'"),
        (lambda: [Filter()], ValueError, "one for each of 2 queries, got 1"),
        (lambda: [Filter(own_rows=[1]), None], ValueError, "takes no own_rows"),
        (lambda: torch.ones(ROWS, dtype=torch.bool), TypeError, "must be a Filter"),
    ],
)  # fmt: skip
def test_bad_filters_are_named(
    stores: dict[str, Datastore], make: Any, error: type[Exception], words: str
) -> None:
    index = ExactIndex(stores["l2"], codes=False)
    with pytest.raises(error, match=words):
        index.search(torch.zeros(2, DIM), 3, filter=make())


def test_an_index_is_restricted_by_a_filter_for_all(stores: dict[str, Datastore]) -> None:
    index = ExactIndex(stores["l2"], codes=False)
    with pytest.raises(ValueError, match="takes no own_rows of each"):
        index.restricted(Filter(own_rows=[1]))
    with pytest.raises(ValueError, match="no document called"):
        index.restricted(Filter(documents=["no"]))
    with pytest.raises(TypeError, match="must be a Filter"):
        index.restricted([0])  # type: ignore[arg-type]
    narrow = index.restricted(Filter(documents=["tiny"]))
    assert (narrow.search(torch.zeros(1, DIM), 3)[1] >= 1801).sum() == 2
    assert narrow.restricted(None).search(torch.zeros(1, DIM), 3)[1].min() >= 0


def test_no_queries(stores: dict[str, Datastore]) -> None:
    index = ExactIndex(stores["l2"], codes=False)
    for given in (Filter(rows=[3]), [], Filter(own_rows=[])):
        assert index.search(torch.zeros(0, DIM), 3, filter=given)[0].shape == (0, 3)
