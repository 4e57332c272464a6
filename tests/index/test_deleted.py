"""Searches of a datastore with deleted documents: those of one that never had them."""

from __future__ import annotations

import shutil
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from knnext.datastore import Datastore, DatastoreError
from knnext.index import ExactIndex, FaissIndex, Filter, IndexMismatchError, StoredCodes
from knnext.index.compact import compact
from tests.index.test_exact import grid_keys, make_datastore
from tests.index.test_filter import DOCUMENTS, ENDS, ROWS, assert_same

K = 30


def left(*deleted: int) -> torch.Tensor:
    owner = np.searchsorted(ENDS, np.arange(ROWS), side="right")
    return torch.from_numpy(np.flatnonzero(~np.isin(owner, deleted)))


@pytest.fixture
def path(tmp_path: Path) -> Path:
    make_datastore(tmp_path / "s", grid_keys(ROWS), documents=DOCUMENTS, entries_per_shard=512)
    return tmp_path / "s"


def bare(tmp_path: Path, rows: torch.Tensor) -> Datastore:
    """A datastore that holds the rows alone."""
    return make_datastore(tmp_path / f"bare-{len(rows)}", grid_keys(ROWS)[rows])


@pytest.mark.parametrize("coded", [False, True])
def test_exact_search_sees_at_once_what_is_left(path: Path, coded: bool, tmp_path: Path) -> None:
    store, queries = Datastore.open(path), grid_keys(5, seed=2)
    if coded:
        StoredCodes.build(store)
    index = ExactIndex(store, codes=coded)
    index.tokens(index.search(queries, K)[1])
    gone: list[int] = []
    for name, number in (("mid", 2), ("one", 0), ("last", 4)):
        store.delete([name])
        gone.append(number)
        rows = left(*gone)
        alone = ExactIndex(bare(tmp_path, rows), codes=False)
        want = alone.search(queries, K)
        later = Datastore.open(path)
        for one in (index, ExactIndex(later, codes=coded), ExactIndex(later.rows(0, len(rows)))):
            found = one.search(queries, K)
            assert_same(found, want)
            assert (one.codes is not None) == coded
            assert torch.equal(one.tokens(found[1]), (rows[found[1]] % 97).int())
        some = Filter(documents=["huge"])
        huge = ((rows >= ENDS[0]) & (rows < ENDS[1])).nonzero()[:, 0]
        want = alone.search(queries, K, filter=Filter(rows=huge))
        assert_same(index.search(queries, K, filter=some), want)
    if coded:
        assert StoredCodes.open(store).path == path.with_name("s.codes")  # still those
        store.compact()
        with pytest.raises(IndexMismatchError, match="another datastore"):
            index.search(queries, K)
        StoredCodes.renew(store)
        assert_same(ExactIndex(store, codes=True).search(queries, K), alone.search(queries, K))


def test_no_filter_names_what_is_deleted(path: Path) -> None:
    store = Datastore.open(path)
    store.delete(["mid"])
    for name in ("", "mid"):
        with pytest.raises(ValueError, match=f"no document called '{name}'"):
            ExactIndex(store).search(grid_keys(2), 3, filter=Filter(documents=[name]))
    assert (ExactIndex(store).search(grid_keys(2), 3, filter=Filter(documents=[2]))[1] < 0).all()


def test_codes_that_are_made_after_a_deletion_are_of_what_is_stored(path: Path) -> None:
    store = Datastore.open(path)
    store.delete(["mid"])
    codes = StoredCodes.build(store)
    assert len(codes) == len(store) == ROWS - 300 and codes.meta.num_entries == ROWS
    queries = grid_keys(4, seed=6)
    want = ExactIndex(store, codes=False).search(queries, K)
    assert_same(ExactIndex(store, codes=True).search(queries, K), want)


def test_given_codes_do_not_outlive_a_deletion(path: Path) -> None:
    from knnext import encode_keys

    store = Datastore.open(path)
    index = ExactIndex(store, codes=encode_keys(store.keys[:]))
    index.search(grid_keys(2), 3)
    store.delete(["mid"])
    for _ in range(2):
        with pytest.raises(ValueError, match="make a new one"):
            index.search(grid_keys(2), 3)


def test_an_index_of_a_view_says_that_it_is_of_no_use(path: Path) -> None:
    store = Datastore.open(path)
    index = ExactIndex(store.rows(0, 900))
    index.search(grid_keys(2), 3)
    store.delete(["one"])
    with pytest.raises(DatastoreError, match="make it again"):
        index.search(grid_keys(2), 3)


@pytest.mark.parametrize("factory", ["Flat", "IVF4,Flat", "HNSW8"])
def test_faiss_finds_nothing_that_is_deleted(one_thread: None, path: Path, factory: str) -> None:
    store, queries = Datastore.open(path), grid_keys(5, seed=2).float()
    index = FaissIndex.build(store, factory=factory, nprobe=4, gpu=False)
    everything: Any = index.search(queries, ROWS)
    store.delete(["mid", "one"])
    rows = left(0, 2)
    for one in (index, FaissIndex.open(None, Datastore.open(path), nprobe=4, gpu=False)):
        distances, indices = one.search(queries, 20)
        stored = rows[indices]
        for q in range(5):
            kept = torch.isin(everything[1][q], rows)
            assert torch.equal(distances[q], everything[0][q][kept][:20])
        real = (store.keys[indices].float() - queries[:, None]).square().sum(-1)
        assert torch.equal(real, distances)  # row numbers are those of the datastore as it is
        assert torch.equal(one.tokens(indices), (stored % 97).int())
        if factory == "Flat":
            assert torch.equal(one.decode(indices[0]), store.keys[indices[0]].float())
    inside = index.search(queries, 9, filter=Filter(documents=["last"]))[1]
    assert (store.document_of(inside[inside >= 0]) == 4).all() and (inside >= 0).any()
    again = FaissIndex.build(store, factory=factory, nprobe=4, gpu=False)  # is the same one
    assert torch.equal(again.search(queries, 20)[0], distances)
    store.compact()
    for _ in range(2):
        with pytest.raises(IndexMismatchError, match="written anew"):
            index.search(queries, 3)
    with pytest.raises(IndexMismatchError, match="another datastore"):
        FaissIndex.open(None, store)


def test_compacting_takes_along_what_lies_beside(one_thread: None, path: Path) -> None:
    store, queries = Datastore.open(path), grid_keys(5, seed=2).float()
    StoredCodes.build(store)
    FaissIndex.build(store, factory="IVF4,Flat", nprobe=3, gpu=False)
    FaissIndex.build(store.rows(0, 700), path.with_name("s.index-0-700"), "Flat", gpu=False)
    store.delete(["mid"])
    found = compact(path)
    assert (found.rows, found.left) == (300, ROWS - 300) and len(found.beside) == 3
    store = Datastore.open(path)
    assert len(StoredCodes.open(store)) == ROWS - 300
    index = FaissIndex.open(None, store, gpu=False)
    assert (index.factory, index.nprobe) == ("IVF4,Flat", 3)
    assert torch.equal(
        index.search(queries, 9, nprobe=4)[0], ExactIndex(store, codes=True).search(queries, 9)[0]
    )
    assert not list(path.with_name("s.index-0-700").glob("*.faiss"))
    assert compact(path) == (0, ROWS - 300, ())  # all is of it as it is
    store.delete(["one"])
    assert "removed" in compact(path, rebuild=False).beside[-1]
    assert not list(path.with_name("s.index").glob("*.faiss"))


def test_compacting_leaves_what_is_of_the_rows_as_they_are(path: Path) -> None:
    """Indexes of runs of rows, one that was begun, and those of datastores of like names."""
    other = path.with_name("a[s].index-0-700")
    shutil.copytree(path, path.with_name("a[s]"))
    store = Datastore.open(path)
    FaissIndex.build(store.rows(0, 700), path.with_name("s.index-0-700"), "Flat", gpu=False)
    FaissIndex.build(store.rows(0, 700), path.with_name("as.index-0-700"), "Flat", gpu=False)
    FaissIndex.build(store.rows(0, 700), path.with_name("s.index-0-700.bak"), "Flat", gpu=False)
    assert FaissIndex.build_part(store, (1, 2), factory="Flat", train_size=99, gpu=False) is None
    assert compact(path, rebuild=False) == (0, ROWS, ())
    assert "built again, Flat" in compact(path).beside[0]
    assert FaissIndex.open(None, store, gpu=False).sidecar.recipe.train_size == 99
    assert compact(path) == (0, ROWS, ())
    odd = Datastore.open(path.with_name("a[s]"))
    FaissIndex.build(odd.rows(0, 700), other, "Flat", gpu=False)
    odd.delete(["mid"])
    assert compact(odd.path).beside == (
        f"{other}: removed, as it held what was deleted; `knnext index` builds it again",
    )
    for name in ("s.index-0-700", "as.index-0-700", "s.index-0-700.bak"):
        assert FaissIndex.open(path.with_name(name), store.rows(0, 700), gpu=False).num_bytes


def codes_not_joined(store: Datastore) -> None:
    """All that two processes do before the last rename."""
    from knnext.index import codes_parts

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(codes_parts, "join", lambda *_: None)
        for number in (1, 2):
            with suppress(FileNotFoundError):
                StoredCodes.build_part(store, (number, 2))


def test_an_index_that_so_few_rows_cannot_train_is_built_by_the_default(tmp_path: Path) -> None:
    store = make_datastore(tmp_path / "s", grid_keys(300), documents=[("a", 100), ("b", 200)])
    FaissIndex.build(store, factory="PQ1", gpu=False)  # 256 centroids
    store.delete(["a"])
    assert "by the default" in compact(store.path).beside[0]
    index = FaissIndex.open(None, Datastore.open(store.path), gpu=False)
    assert (index.factory, len(index)) == ("Flat", 200)


@pytest.mark.parametrize("left", ["parts", "killed", "unreadable"])
def test_nothing_half_made_keeps_what_was_deleted(path: Path, left: str) -> None:
    store = Datastore.open(path)
    coded, index = path.with_name("s.codes"), path.with_name("s.index")
    if left == "parts":
        store.delete(["mid"])
        codes_not_joined(store)
        assert FaissIndex.build_part(store, (1, 2), factory="Flat", gpu=False) is None
    else:
        StoredCodes.build(store)
        FaissIndex.build(store, factory="Flat", gpu=False)
        store.delete(["mid"])
    if left == "killed":  # while they were discarded
        (coded / "codes.json").unlink()
        (index / "index.json").rename(index / "trained.faiss.00.part")
    if left == "unreadable":
        (index / "index.json").write_text("{")
        (coded / "codes.json").write_text("{")
    before = (coded / "codes.bin").read_bytes()
    compact(path)
    store = Datastore.open(path)
    assert len(StoredCodes.open(store)) == ROWS - 300
    assert (coded / "codes.bin").read_bytes() != before
    if left == "parts":
        assert len(FaissIndex.open(None, store, gpu=False)) == ROWS - 300
    else:
        assert [file.name for file in index.iterdir()] == [".lock"]


def test_parts_of_codes_are_joined_for_a_datastore_with_deleted_rows(path: Path) -> None:
    from knnext.index import codes_parts

    store = Datastore.open(path)
    store.delete(["mid"])
    codes_not_joined(store)
    codes_parts.join(store, path.with_name("s.codes"))
    assert len(StoredCodes.open(store)) == len(store)
