"""Pickles of datastores, views and indexes: they hold the place, and open it again."""

from __future__ import annotations

import copy
import io
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from knnext.datastore import Datastore, DatastoreError
from knnext.index import ExactIndex, FaissIndex
from tests.index.stores import clustered, make_datastore

ROWS = 3000


def through_pickle(value: Any) -> Any:
    return pickle.loads(pickle.dumps(value))


def through_torch(value: Any) -> Any:
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


WAYS = pytest.mark.parametrize("way", [through_pickle, through_torch, copy.deepcopy, copy.copy])

VIEWS: dict[str, Callable[[Datastore], Datastore]] = {
    "whole": lambda s: s,
    "shard": lambda s: s.shard(1, 3),
    "subsample": lambda s: s.subsample(0.3, seed=4),
    "shard of a subsample": lambda s: s.subsample(0.3).shard(1, 2),
    "subsample of a shard": lambda s: s.shard(1, 3).subsample(0.5),
    "shard of a shard": lambda s: s.shard(2, 3).shard(0, 2),
    "nothing": lambda s: s.subsample(0),
}


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Datastore:
    return make_datastore(tmp_path_factory.mktemp("stores") / "s", clustered(ROWS), num_documents=7)


@WAYS
@pytest.mark.parametrize("view", VIEWS.values(), ids=VIEWS)
def test_datastores_and_views(
    store: Datastore, view: Callable[[Datastore], Datastore], way: Callable[[Any], Any]
) -> None:
    want = view(store)
    got = way(want)
    assert got is not want and type(got) is Datastore
    assert got.num_entries == want.num_entries and got.row_offset == want.row_offset
    assert torch.equal(got.keys[:], want.keys[:]) and torch.equal(got.values[:], want.values[:])
    assert torch.equal(got.document_offsets, want.document_offsets)
    assert got.document_names == want.document_names and got.fingerprint == want.fingerprint
    rows = torch.arange(want.num_entries)
    assert torch.equal(got.stored_rows(rows), want.stored_rows(rows))


@pytest.mark.parametrize("view", VIEWS.values(), ids=VIEWS)
def test_documents_of_views(store: Datastore, view: Callable[[Datastore], Datastore]) -> None:
    seen = view(store)
    stored = seen.stored_rows(torch.arange(seen.num_entries))
    assert torch.equal(seen.document_of(torch.arange(seen.num_entries)), store.document_of(stored))
    assert seen.document_offsets[0] == 0 and seen.document_offsets[-1] == seen.num_entries


def test_a_pickle_is_small_and_holds_no_rows(store: Datastore) -> None:
    index = ExactIndex(store)
    index.tokens(index.search(store.keys[0:2], 3)[1])
    assert len(pickle.dumps(store)) < 3000 and len(pickle.dumps(index)) < 5000


@WAYS
def test_exact_index(store: Datastore, way: Callable[[Any], Any]) -> None:
    index = ExactIndex(store.shard(0, 2), metric="ip", chunk_bytes=10_000)
    want = index.search(store.keys[0:5], 4)
    got = way(index).search(store.keys[0:5], 4)
    assert all(map(torch.equal, got, want))


@WAYS
def test_faiss_index(store: Datastore, way: Callable[[Any], Any], tmp_path: Path) -> None:
    pytest.importorskip("faiss")
    index = FaissIndex.build(store.shard(1, 2), tmp_path / "ix", "IVF8,SQ8", gpu=False)
    index = index.with_options(nprobe=3, rescore=True)
    other = way(index)
    assert other.nprobe == 3 and other.rescore and other.factory == "IVF8,SQ8"
    assert all(map(torch.equal, other.search(store.keys[0:9], 4), index.search(store.keys[0:9], 4)))


def test_relative_paths_are_found_from_elsewhere(
    store: Datastore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(store.path.parent)
    relative = Datastore.open("s")
    pickled, rows = pickle.dumps(relative), pickle.dumps(relative.keys)
    monkeypatch.chdir(tmp_path)
    assert torch.equal(pickle.loads(pickled).keys[:], store.keys[:])
    assert torch.equal(pickle.loads(rows)[:], store.keys[:])


def test_another_datastore_in_the_place_is_refused(tmp_path: Path) -> None:
    pickled = pickle.dumps(make_datastore(tmp_path / "s", clustered(50)))
    (tmp_path / "s").rename(tmp_path / "old")
    with pytest.raises(DatastoreError):
        pickle.loads(pickled)
    make_datastore(tmp_path / "s", clustered(50, seed=1))
    with pytest.raises(DatastoreError, match="another datastore"):
        pickle.loads(pickled)


def test_a_datastore_being_written_is_refused(tmp_path: Path) -> None:
    with (
        Datastore.create(tmp_path / "s", 4) as writing,
        pytest.raises(DatastoreError, match="being written"),
    ):
        pickle.dumps(writing)


class Rows(torch.utils.data.Dataset[int]):
    """What a user's data set may look like: it holds a datastore and an index."""

    def __init__(self, store: Datastore) -> None:
        self.store, self.index = store, ExactIndex(store)

    def __len__(self) -> int:
        return 4

    def __getitem__(self, number: int) -> tuple[int, int, int]:
        torch.set_num_threads(1)
        found = self.index.search(self.store.keys[number : number + 1], 1)[1]
        return int(found), int(self.store.values[number]), os.getpid()


@pytest.mark.slow
def test_spawned_workers(store: Datastore) -> None:
    loader = torch.utils.data.DataLoader(
        Rows(store.shard(1, 2)), batch_size=None, num_workers=1, multiprocessing_context="spawn"
    )
    found = list(loader)
    assert [row for row, _, _ in found] == [0, 1, 2, 3]
    assert [value for _, value, _ in found] == store.shard(1, 2).values[0:4].tolist()
    assert os.getpid() not in {process for _, _, process in found}
