"""Going on with a build: after an exception, from any row, with the same parameters, alone."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from knnext.datastore import (
    CorruptDatastoreError,
    Datastore,
    DatastoreError,
    DatastoreLockedError,
    DatastoreWriteError,
    IncompatibleDatastoreError,
    UnfinishedDatastoreError,
)
from tests.datastore.small import DIM, begin, folder_bytes, rows, write


@pytest.fixture
def path(tmp_path, monkeypatch) -> Path:
    """A finished datastore: 3 shards of 16, 16 and 8 rows, 4 documents."""
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1700000000")
    return write(tmp_path / "ds", 40)


def test_an_existing_datastore_is_not_overwritten(path):
    before = folder_bytes(path)
    with pytest.raises(DatastoreError, match=r"holds a datastore already \(40 entries\)"):
        begin(path)
    assert folder_bytes(path) == before


def test_an_unfinished_build_opens_only_when_asked(tmp_path):
    store = begin(tmp_path / "ds")
    store.append(*rows(0, 20))
    store.commit()
    store.append(*rows(20, 30))
    with pytest.raises(UnfinishedDatastoreError, match=r"20 entries committed.*resume=True"):
        Datastore.open(store.path)
    part = Datastore.open(store.path, allow_unfinished=True, verify=True)
    assert part.unfinished and part.num_entries == 20 and "unfinished" in part.describe()
    assert torch.equal(part.keys[:], rows(0, 20)[0])
    store.close()
    assert Datastore.open(store.path, allow_unfinished=True).unfinished is False


def test_an_exception_leaves_a_build_to_resume(tmp_path):
    with pytest.raises(KeyboardInterrupt), begin(tmp_path / "ds") as store:
        store.append(*rows(0, 20))
        raise KeyboardInterrupt
    with pytest.raises(UnfinishedDatastoreError):
        Datastore.open(store.path)
    with pytest.raises(DatastoreWriteError, match="left after an error"):
        store.append(*rows(20, 40))
    with begin(store.path, resume=True) as again:
        assert again.num_entries == 20
        again.append(*rows(20, 40))
    assert torch.equal(Datastore.open(store.path, verify=True).keys[:], rows(0, 40)[0])


def test_resuming_with_other_parameters_names_each(path):
    with pytest.raises(IncompatibleDatastoreError) as caught:
        begin(path, resume=True, model_id="n", metric="ip", entries_per_shard=5)
    message = str(caught.value)
    assert "model_id: datastore has 'm', asked for 'n'" in message
    assert "metric: datastore has 'l2', asked for 'ip'" in message
    assert "entries_per_shard: datastore has 16, asked for 5" in message and "dim" not in message
    before = folder_bytes(path)
    begin(path, resume=True, entries_per_shard=None).close()
    assert folder_bytes(path) == before


def test_a_replayed_build_skips_what_is_there(path, tmp_path):
    store = begin(tmp_path / "replay")
    store.append(*rows(0, 25), start=0)
    for first in (0, 7, 25, 13):
        store.append(*rows(first, min(first + 18, 40)), start=first)
    with pytest.raises(ValueError, match="start: got 41, want at most 40"):
        store.append(*rows(41, 42), start=41)
    keys, values, ids = rows(30, 40)
    with pytest.raises(IncompatibleDatastoreError, match="row 33 is stored with another value"):
        store.append(keys, values.index_fill(0, torch.tensor([3]), 10), ids, start=30)
    store.close()
    assert folder_bytes(store.path) == folder_bytes(path)


def test_replayed_runs_of_documents(tmp_path):
    keys, values, _ = rows(0, 12)
    with Datastore.create(tmp_path / "ds", DIM) as store:
        store.append(keys[:7], values[:7], [("a", 5), ("b", 2)])
        store.append(keys[3:], values[3:], [("a", 2), ("b", 4), ("c", 3)], start=3)
    assert store.document_names == ("a", "b", "c")
    assert store.document_offsets.tolist() == [0, 5, 9, 12]


def test_named_documents_may_get_their_rows_in_an_extension(tmp_path):
    names = ["a", "b", "c", "d"]
    keys, values, _ = rows(0, 6)
    with begin(tmp_path / "ds") as store:
        store.set_document_names(names)
        store.append(keys[:3], values[:3], [0, 0, 1])
    assert store.document_offsets.tolist() == [0, 2, 3, 3, 3]
    with begin(store.path, resume=True) as store:
        store.append(keys[3:], values[3:], [1, 3, 3])
    assert store.document_names == tuple(names)
    assert store.document_offsets.tolist() == [0, 2, 4, 4, 6]
    with begin(store.path, resume=True) as store, pytest.raises(ValueError, match="document 1"):
        store.set_document_names(["a", "x"])


def test_two_writers(tmp_path):
    store = begin(tmp_path / "ds")
    with pytest.raises(DatastoreLockedError, match="another process is writing"):
        begin(store.path, resume=True)
    store.append(*rows(0, 20))
    store.close()
    begin(store.path, resume=True).close()
    dropped = begin(store.path, resume=True)
    del dropped  # a writer that was merely forgotten holds no lock
    begin(store.path, resume=True).close()


def test_resuming_notices_a_changed_part(tmp_path):
    store = begin(tmp_path / "ds")
    store.append(*rows(0, 20))
    store.commit()
    del store
    file = tmp_path / "ds" / "keys-00001.bin"
    content = bytearray(file.read_bytes())
    content[3] ^= 1
    file.write_bytes(content)
    with pytest.raises(CorruptDatastoreError, match="has changed since it was written"):
        begin(tmp_path / "ds", resume=True)
