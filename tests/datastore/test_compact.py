"""What comes after a compaction, and between two who change a datastore at once."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from knnext.datastore import Datastore, DatastoreError, IncompatibleDatastoreError
from tests.datastore.test_delete import DIM, SIZES, check, keys_of, left, make


@pytest.mark.parametrize("deleted", [["d7"], ["d5", "d6", "d7"], [f"d{d}" for d in range(8)]])
def test_the_last_documents_are_compacted_and_others_come_behind(
    tmp_path: Path, deleted: list[str]
) -> None:
    """Their numbers stay taken, by name and by number; deleting them again deletes nothing."""
    path = make(tmp_path / "s")
    store = Datastore.open(path)
    store.delete(deleted)
    rows = store.values[:].tolist()
    store.compact()
    content = (path / "meta.json").read_bytes()
    assert store.delete([*deleted, 7]) == 0 and (path / "meta.json").read_bytes() == content
    with pytest.raises(ValueError, match="none called ''"):
        store.delete([""])
    fresh, more = torch.arange(50, 53), torch.arange(60, 62)
    options = {"entries_per_shard": 16, "vocab_size": 99, "resume": True}
    with pytest.raises(ValueError, match="document 7, which is deleted"):
        Datastore.create(path, DIM, **options).append(keys_of(fresh), fresh, torch.full((3,), 7))
    with Datastore.create(path, DIM, **options) as writer:
        writer.append(keys_of(fresh), fresh, [("d7", 3)])
        writer.append(keys_of(more), more, torch.tensor([9, 9]))
    store = Datastore.open(path, verify=True)
    store.replace(keys_of(fresh), fresh, [("d7", 3)])
    names = ["" if f"d{d}" in deleted else f"d{d}" for d in range(8)]
    assert list(store.document_names) == [*names, "", "9", "d7"]
    assert store.values[:].tolist() == [*rows, 60, 61, 50, 51, 52]
    assert store.document_offsets.diff().tolist()[7:] == [0, 0, 2, 3]
    store.compact()
    assert list(store.document_names) == [*names, "", "9", "d7"]


@pytest.mark.parametrize("compacted", [False, True])
def test_documents_that_are_names_alone_are_deleted_and_replaced(
    tmp_path: Path, compacted: bool
) -> None:
    with Datastore.create(tmp_path / "s", DIM) as store:
        store.set_document_names(["a", "b", "c", "d"])
        store.append(torch.ones(2, DIM), torch.arange(2), [("a", 2)])
    options = {"resume": True}
    assert store.delete(["b", "d"]) == 0
    if compacted:
        store.compact()
    for gone in (1, 3):
        with pytest.raises(ValueError, match=r"which is deleted|after document 3"):
            writer = Datastore.create(tmp_path / "s", DIM, **options)
            writer.append(torch.ones(1, DIM), torch.arange(1), torch.tensor([gone]))
        writer._writer.release()
    store.replace(torch.ones(3, DIM), torch.arange(3), [("d", 1), ("e", 2)])
    assert list(store.document_names) == ["a", "", "c", "", "d", "e"]
    assert store.document_offsets.diff().tolist() == [2, 0, 0, 0, 1, 2]


def test_only_the_same_replacement_goes_on_with_one_that_was_interrupted(tmp_path: Path) -> None:
    path = make(tmp_path / "s")
    keys, values = keys_of(torch.arange(50, 54)), torch.arange(50, 54)
    store = Datastore.open(path)
    with Datastore.create(path, DIM, entries_per_shard=16, vocab_size=99, resume=True) as writer:
        writer.append(keys[:3], values[:3], [("d3", 3)])
        writer.commit()
        writer._writer.abandon()
        writer._writer = None
    for other in (
        (keys + 1, values, [("d3", 4)]),  # the same text by another model
        (keys, values, [("d4", 4)]),
        (keys, values, [("d3", 1), ("d4", 3)]),
        (keys[:2], values[:2], [("d3", 2)]),
    ):
        with pytest.raises(IncompatibleDatastoreError, match="another extension has begun"):
            store.replace(*other)
        check(Datastore.open(path))
    assert store.replace(keys, values, [("d3", 4)]) == SIZES[3]
    assert store.values[:].tolist() == [*left(3).tolist(), 50, 51, 52, 53]
    assert store.replace(keys[:0], values[:0], []) == 0


def test_a_replacement_does_not_take_over_the_rows_of_an_old_document(tmp_path: Path) -> None:
    path = make(tmp_path / "s")
    keys, values = keys_of(torch.arange(50, 54)), torch.arange(50, 54)
    writer = Datastore.create(path, DIM, entries_per_shard=16, vocab_size=99, resume=True)
    writer.append(keys[:3], values[:3], [("d7", 3)])  # of the last document, which goes on
    writer._writer.abandon()
    with pytest.raises(IncompatibleDatastoreError, match="another extension has begun"):
        Datastore.open(path).replace(keys, values, [("d7", 4)])


def test_a_reader_from_before_a_compaction_is_told_to_open_again(tmp_path: Path) -> None:
    path = make(tmp_path / "s", origin={"from": "here"})
    stale, again, third = (Datastore.open(path) for _ in range(3))
    store = Datastore.open(path)
    store.delete(["d3"])
    store.compact()
    for read in (
        lambda: stale.keys[:],
        lambda: stale.values[torch.tensor([1])],
        lambda: stale.document_names,
        lambda: stale.document_offsets,
        lambda: stale.document_hashes,
        lambda: stale.verify(),
    ):
        with pytest.raises(DatastoreError, match="open it again") as error:
            read()
        assert type(error.value) is DatastoreError  # nothing is damaged
    assert stale.delete(["d4"]) == SIZES[4]
    assert stale.values[:].tolist() == left(3, 4).tolist()
    fresh = torch.arange(50, 52)
    assert again.replace(keys_of(fresh), fresh, [("d0", 2)]) == SIZES[0]
    assert again.values[:].tolist() == [*left(0, 3, 4).tolist(), 50, 51]
    with pytest.raises(DatastoreError, match="open it again"):
        third.compact()


def test_a_datastore_that_is_compacted_while_it_is_opened_is_opened(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import knnext.datastore as module

    path = make(tmp_path / "s")
    store, read = Datastore.open(path), module.read_finished
    store.delete(["d3"])

    def slow(where: Path) -> object:
        found = read(where)
        monkeypatch.setattr(module, "read_finished", read)
        store.compact()
        return found

    monkeypatch.setattr(module, "read_finished", slow)
    check(Datastore.open(path), 3, compacted=True)
