"""Deleting documents: every reader sees a datastore without them, whatever it does."""

from __future__ import annotations

import json
import random
from pathlib import Path

import numpy as np
import pytest
import torch

from knnext.datastore import (
    Datastore,
    DatastoreError,
    DatastoreLockedError,
    FormatVersionError,
    IncompatibleDatastoreError,
)
from knnext.datastore.deletion import name_digest
from knnext.datastore.export import export_rows
from knnext.datastore.files import WriterLock
from knnext.datastore.kept import KeptRows

DIM = 3
SIZES = (5, 1, 0, 9, 12, 2, 7, 4)  # of documents "d0" to "d7": rows 0 to 40, in files of 16
BOUNDS = np.cumsum([0, *SIZES])


def keys_of(rows: torch.Tensor) -> torch.Tensor:
    return (rows[:, None] * 7 % 50 + torch.arange(DIM)).half()


def make(path: Path, **options: object) -> Path:
    rows = torch.arange(40)
    with Datastore.create(path, DIM, entries_per_shard=16, vocab_size=99, **options) as store:
        hashes = (np.arange(8, dtype=np.uint8)[:, None] + 1).repeat(16, 1)
        store.set_document_names([f"d{d}" for d in range(8)], hashes)
        ids = torch.from_numpy(np.searchsorted(BOUNDS, rows.numpy(), side="right") - 1)
        store.append(keys_of(rows), rows, ids)
    return path


def left(*deleted: int) -> torch.Tensor:
    """Stored rows of what is not deleted; a row's value is its number."""
    rows = [range(BOUNDS[d], BOUNDS[d + 1]) for d in range(8) if d not in deleted]
    return torch.tensor([row for run in rows for row in run], dtype=torch.int64)


def check(store: Datastore, *deleted: int, compacted: bool = False) -> None:
    rows = left(*deleted)
    assert len(store) == store.num_entries == len(rows)
    assert torch.equal(store.values[:].long(), rows)
    assert torch.equal(store.keys[:], keys_of(rows))
    chunks = [row for _, _, values in store.iter_chunks(7) for row in values.tolist()]
    assert chunks == rows.tolist()
    some = torch.tensor([len(rows) - 1, 0, len(rows) // 2, 0])[: 4 * len(rows)]
    assert torch.equal(store.values[some].long(), rows[some])
    stored = torch.arange(len(rows)) if compacted else rows
    assert torch.equal(store.stored_rows(torch.arange(len(rows))), stored)
    cuts = [0, *(b for _, b in store.keys.pieces(5))]
    assert cuts[-1] == len(rows) and max(np.diff(cuts), default=0) <= 5
    assert store.num_documents == 8
    sizes = [0 if d in deleted else SIZES[d] for d in range(8)]
    assert store.document_offsets.diff().tolist() == sizes
    names = ["" if d in deleted else f"d{d}" for d in range(8)]
    assert list(store.document_names) == names
    gone = [not row.any() for row in store.document_hashes]
    assert gone == [d in deleted for d in range(8)]
    owner = np.searchsorted(BOUNDS, rows.numpy(), side="right") - 1
    assert store.document_of(torch.arange(len(rows))).tolist() == owner.tolist()


@pytest.mark.parametrize(
    "deleted", [[0], [7], [3, 4], [1, 5], range(8), [0, 1, 2, 3, 4, 5, 6], [2]]
)
def test_readers_see_what_is_left(tmp_path: Path, deleted: list[int]) -> None:
    path = make(tmp_path / "s")
    store = Datastore.open(path)
    other = Datastore.open(path)
    assert store.is_current and store.delete([f"d{d}" for d in deleted]) == 40 - len(left(*deleted))
    check(store, *deleted)
    check(Datastore.open(path, verify=True), *deleted)
    assert not other.is_current
    assert store.delete([*deleted]) == store.delete([f"d{d}" for d in deleted]) == 0  # again
    assert len(json.loads((path / "meta.json").read_bytes())["audit"]) == 1


@pytest.mark.parametrize("few", [0, 64])
def test_runs_are_read_one_by_one_or_gathered(tmp_path: Path, monkeypatch, few: int) -> None:
    monkeypatch.setattr("knnext.datastore.rows._FEW_ON_END", few)
    store = Datastore.open(make(tmp_path / "s"))
    for gone in ([1, 5], [1, 3, 5, 6], range(8)):
        store.delete(gone)
        check(store, *gone)
        rows = left(*gone)
        for first in range(len(rows) + 1):
            for last in range(first, len(rows) + 1):
                assert torch.equal(store.values[first:last].long(), rows[first:last])


def test_one_deletion_after_another_and_parts_of_what_is_left(tmp_path: Path) -> None:
    path = make(tmp_path / "s")
    store, gone = Datastore.open(path), []
    rng = random.Random(1)
    order = rng.sample(range(8), 8)
    for d in order:
        prints = {store.fingerprint}
        store.delete([d])
        gone.append(d)
        check(store, *gone)
        rows = left(*gone)
        if SIZES[d]:
            assert store.fingerprint not in prints
        assert store.stored_fingerprint == Datastore.open(path).undeleted().fingerprint
        a, b = sorted(rng.choices(range(len(rows) + 1), k=2))
        view = store.rows(a, b)
        assert torch.equal(view.values[:].long(), rows[a:b])
        assert torch.equal(view.keys[:], keys_of(rows[a:b])) and view.row_offset == a
        assert int(view.document_offsets[-1]) == b - a
        half = store.subsample(0.5, 3)
        assert torch.isin(half.values[:].long(), rows).all() and len(half) == round(len(rows) / 2)
    assert store.undeleted().num_entries == 40


def test_a_view_of_before_is_not_read_any_more(tmp_path: Path) -> None:
    store = Datastore.open(make(tmp_path / "s"))
    views = [store.rows(0, 40), store.shard(1, 2), store.subsample(0.5)]
    store.delete(["d3"])
    for view in views:
        for read in (lambda v=view: v.keys, lambda v=view: v.values, lambda v=view: v.generation):
            with pytest.raises(DatastoreError, match="make it again"):
                read()
        with pytest.raises(DatastoreError):
            view.delete(["d1"])
    with pytest.raises(DatastoreError, match="delete of a view"):
        store.rows(3, 9).delete(["d1"])


def test_copies_hold_nothing_of_what_is_deleted(tmp_path: Path) -> None:
    store = Datastore.open(make(tmp_path / "s"))
    store.delete(["d4", "d0"])
    rows = left(0, 4)
    merged = Datastore.merge([store, Datastore.open(make(tmp_path / "t"))], tmp_path / "merged")
    assert merged.values[:].tolist() == [*rows.tolist(), *range(40)]
    assert list(merged.document_names)[:5] == ["", "d1", "d2", "d3", ""]
    sample = store.subsample(1.0, path=tmp_path / "sample")
    assert torch.equal(sample.values[:].long(), rows)
    files = export_rows(store, tmp_path / "out", "npy")
    assert np.load(tmp_path / "out" / "values.npy").tolist() == rows.tolist()
    for folder in (tmp_path / "sample", tmp_path / "out"):
        assert not any(b'"d4"' in file.read_bytes() for file in folder.iterdir())
    assert len(files) == 4
    assert str(len(rows)) in store.describe() and "knnext compact" in store.describe()


def test_info_says_how_much_is_deleted_and_when_it_slows_down(tmp_path: Path, monkeypatch) -> None:
    store = Datastore.open(make(tmp_path / "s"))
    store.delete(["d3", "d5"])
    assert "2 of the documents, with 11 of 40 entries, which nobody reads" in store.describe()
    monkeypatch.setattr("knnext.datastore.describe._MANY_RUNS", 4)
    assert "(in 4 runs, which slow down opening)" in store.describe()


def test_bad_requests_delete_nothing(tmp_path: Path) -> None:
    path = make(tmp_path / "s")
    store = Datastore.open(path)
    content = (path / "meta.json").read_bytes()
    for documents, error, words in (
        (["d1", "no"], ValueError, "none called 'no'"),
        ([0, 8], ValueError, "ids from 0 to 7"),
        ([-1], ValueError, "ids from 0 to 7"),
        ("d1", TypeError, "a list"),
        (3, TypeError, "a list"),
        ([1.7], TypeError, "ids or names"),  # which is no document, and not 1
        ([b"2"], TypeError, "ids or names"),
        ([True], TypeError, "ids or names"),
        ([None], TypeError, "ids or names"),
        ([""], ValueError, "none called ''"),  # as those that are deleted are called
    ):
        with pytest.raises(error, match=words):
            store.delete(documents)
    lock = WriterLock(path)
    try:
        with pytest.raises(DatastoreLockedError):
            store.delete(["d1"])
    finally:
        lock.release()
    (path / "build.json").write_bytes(content)
    with pytest.raises(DatastoreError, match="has not ended"):
        store.delete(["d1"])
    (path / "build.json").unlink()
    assert store.delete([]) == 0 and (path / "meta.json").read_bytes() == content
    with Datastore.create(tmp_path / "bare", DIM) as bare:
        bare.append(torch.zeros(2, DIM), torch.zeros(2).int())
    with pytest.raises(DatastoreError, match="without documents"):
        bare.delete([0])


def test_meta_tells_who_was_deleted_by_hash_alone(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "0")
    path = make(tmp_path / "s")
    Datastore.open(path).delete(["d3", "d5"])
    body = json.loads((path / "meta.json").read_text())
    assert body["format_version"] == 3  # earlier readers would read what is deleted
    assert body["deleted"] == {"documents": [[3, 4], [5, 6]], "rows": [[6, 15], [27, 29]]}
    (entry,) = body["audit"]
    assert entry["names"] == [name_digest("d3"), name_digest("d5")]
    assert (entry["when"], entry["documents"], entry["rows"]) == ("1970-01-01T00:00:00Z", 2, 11)
    assert '"d3"' not in (path / "meta.json").read_text()


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("rows", [[6, 5]]),
        ("rows", [[0, 41]]),
        ("rows", [[3, 9], [9, 12]]),
        ("documents", [[-1, 2]]),
        ("documents", [[0, 9]]),
    ],
)
def test_a_list_that_cannot_be_is_refused(tmp_path: Path, field: str, value: object) -> None:
    from knnext.datastore.meta_file import _self_checksum

    path = make(tmp_path / "s")
    Datastore.open(path).delete(["d3"])
    body = json.loads((path / "meta.json").read_text())
    body["deleted"][field] = value
    del body["checksum"]
    body["checksum"] = _self_checksum(body)
    (path / "meta.json").write_text(json.dumps(body))
    with pytest.raises(DatastoreError, match="deleted"):
        Datastore.open(path)
    body["format_version"] = 1
    del body["checksum"]
    body["checksum"] = _self_checksum(body)
    (path / "meta.json").write_text(json.dumps(body))
    with pytest.raises((DatastoreError, FormatVersionError)):
        Datastore.open(path)


def test_rows_are_appended_behind_what_is_deleted(tmp_path: Path) -> None:
    path = make(tmp_path / "s")
    Datastore.open(path).delete(["d7", "d1"])
    options = {"entries_per_shard": 16, "vocab_size": 99, "resume": True}
    store = Datastore.create(path, DIM, **options)
    with pytest.raises(ValueError, match="document 7, which is deleted"):
        store.append(keys_of(torch.arange(40, 42)), torch.arange(40, 42), torch.tensor([7, 8]))
    with store:
        store.append(keys_of(torch.arange(40, 43)), torch.arange(40, 43), [("d7", 3)])
    assert store.values[:].tolist() == [*left(1, 7).tolist(), 40, 41, 42]
    assert list(store.document_names)[-2:] == ["", "d7"]
    assert store.document_of(torch.tensor([len(store) - 1])).tolist() == [8]


@pytest.mark.parametrize("names", [["d3"], ["d7"], ["d7", "new"], ["new"], ["d0", "d6", "d0"]])
def test_documents_are_replaced_at_once(tmp_path: Path, names: list[str]) -> None:
    path = make(tmp_path / "s")
    store = Datastore.open(path)
    count = 2 * len(names)
    fresh = torch.arange(50, 50 + count)
    old = sorted({int(name[1:]) for name in names if name != "new"})
    lost = store.replace(keys_of(fresh), fresh, [(name, 2) for name in names])
    assert lost == 40 - len(left(*old))
    for one in (store, Datastore.open(path, verify=True)):
        assert one.values[:].tolist() == [*left(*old).tolist(), *fresh.tolist()]
        assert list(one.document_names)[8:] == names
        assert [one.document_names[d] for d in old] == [""] * len(old)
        assert int(one.document_offsets[-1]) == len(one)
    again = fresh + 20
    store.replace(keys_of(again), again, [(name, 2) for name in names])
    assert store.values[-count:].tolist() == again.tolist() and len(store) == len(one)


def test_a_replacement_that_fails_leaves_what_was(tmp_path: Path) -> None:
    path = make(tmp_path / "s")
    store = Datastore.open(path)
    before = {file.name: file.read_bytes() for file in path.iterdir()}
    with pytest.raises(ValueError, match="99"):
        store.replace(keys_of(torch.arange(2)), torch.tensor([1, 100]), [("d3", 2)])
    with pytest.raises(ValueError, match="the pairs cover"):
        store.replace(keys_of(torch.arange(2)), torch.arange(2), [("d3", 1)])
    after = {file.name: file.read_bytes() for file in path.iterdir()}
    assert before.keys() == after.keys()
    assert before["meta.json"] == after["meta.json"]
    check(store)


@pytest.mark.parametrize("deleted", [["d0", "d4"], ["d7"], [f"d{d}" for d in range(8)]])
def test_compacting_leaves_nothing_of_what_was_deleted(tmp_path: Path, deleted: list[str]) -> None:
    path = make(tmp_path / "s")
    store = Datastore.open(path)
    store.delete(deleted)
    rows, ids = store.values[:].long(), [int(name[1:]) for name in deleted]
    lost = 40 - len(rows)
    assert store.compact() == lost and len(store) == len(rows)
    for one in (store, Datastore.open(path, verify=True)):
        assert one.meta.deleted is None and one.is_whole and one.meta.num_entries == len(rows)
        if len(rows):
            check(one, *ids, compacted=True)
    found = {str(f.relative_to(path)) for f in path.rglob("*") if f.is_file()}
    assert not any(name.startswith("keys") for name in found)
    assert {f.partition("/")[0] for f in found} <= {".lock", "meta.json", "compact-00001"}
    content = b"".join(f.read_bytes() for f in path.rglob("*") if f.is_file())
    for name in deleted:
        assert f'"{name}"'.encode() not in content
    stored = [f.read_bytes() for f in sorted(path.rglob("values-*.bin"))]
    assert np.frombuffer(b"".join(stored), np.int32).tolist() == rows.tolist()
    assert store.compact() == 0  # and nothing is written anew for nothing
    assert [entry["what"] for entry in store.meta.audit] == ["deleted", "compacted"]


def test_what_an_interrupted_compacting_leaves_is_said_and_removed(tmp_path: Path) -> None:
    path = make(tmp_path / "s")
    assert "old files" not in Datastore.open(path).describe()
    (path / "compact-00003").mkdir()
    (path / "compact-00003" / "keys-00000.bin").write_bytes(b"old")
    store = Datastore.open(path)
    assert "old files" in store.describe()
    store.compact()
    assert "old files" not in store.describe() and not (path / "compact-00003").exists()
    check(store)


def test_a_compacted_datastore_goes_on(tmp_path: Path) -> None:
    path = make(tmp_path / "s")
    store = Datastore.open(path)
    store.delete(["d4"])
    store.compact()
    fresh = torch.arange(60, 80)
    store.replace(keys_of(fresh), fresh, [("d6", 20)])
    want = [*left(4, 6).tolist(), *fresh.tolist()]
    assert store.values[:].tolist() == want
    store.delete(["d0"])
    store.compact()
    want = want[SIZES[0] :]
    assert Datastore.open(path, verify=True).values[:].tolist() == want
    assert sorted(f.name for f in path.iterdir()) == [".lock", "compact-00002", "meta.json"]
    options = {"entries_per_shard": 16, "vocab_size": 99, "resume": True}
    with Datastore.create(path, DIM, **options) as more:
        more.append(keys_of(fresh), fresh, [("last", 20)])
    assert Datastore.open(path, verify=True).values[:].tolist() == [*want, *fresh.tolist()]


def test_what_was_built_of_a_text_is_not_gone_on_with_once_compacted(tmp_path: Path) -> None:
    """Its next row would not be the text's row of that number."""
    facts = {"text": {"corpus": "c", "documents": "0" * 16}, "origin": {"tokens": "x"}}
    path = make(tmp_path / "s", **facts)
    store = Datastore.open(path)
    store.delete(["d4"])
    store.compact()
    assert store.meta.text["documents"] is None and store.meta.text["corpus"] == "c"
    with pytest.raises(IncompatibleDatastoreError):
        Datastore.create(path, DIM, entries_per_shard=16, vocab_size=99, resume=True, **facts)


def test_joined_datastores_are_deleted_from_as_a_whole(tmp_path: Path) -> None:
    from dataclasses import replace

    from knnext.datastore.files import replace_file
    from knnext.datastore.meta import PartMeta, ShardMeta
    from knnext.datastore.meta_file import to_json

    path = make(tmp_path / "s")  # as a part of itself
    part = path / "part-00001"
    part.mkdir()
    meta = Datastore.open(path).meta
    shards = []
    for shard in meta.shards:
        files = [replace(f, file=f"part-00001/{f.file}") for f in (shard.keys, shard.values)]
        for file in (shard.keys, shard.values):
            (path / file.file).rename(part / file.file)
        shards.append(ShardMeta(shard.rows, *files))
    joined = replace(meta, shards=tuple(shards), parts=(PartMeta("part-00001", 40),))
    replace_file(path / "meta.json", to_json(joined))
    store = Datastore.open(path, verify=True)
    store.delete(["d3"])
    check(Datastore.open(path, verify=True), 3)
    with pytest.raises(DatastoreError, match="joined from 1 parts"):
        store.replace(keys_of(torch.arange(2)), torch.arange(2), [("d4", 2)])
    store.compact()
    check(Datastore.open(path, verify=True), 3, compacted=True)
    assert sorted(f.name for f in path.iterdir()) == [".lock", "compact-00001", "meta.json"]
    assert store.replace(keys_of(torch.arange(2)), torch.arange(2), [("d4", 2)]) == SIZES[4]


@pytest.mark.parametrize("seed", range(20))
def test_rows_are_numbered_without_gaps(seed: int) -> None:
    rng = random.Random(seed)
    cuts = sorted(rng.sample(range(60), 2 * rng.choice([0, 1, 3, 6])))
    deleted = list(zip(cuts[::2], cuts[1::2], strict=True))
    kept = [r for r in range(60) if not any(a <= r < b for a, b in deleted)]
    rows = KeptRows(60, deleted)
    assert rows.count == len(kept)
    assert rows.stored(torch.arange(len(kept))).tolist() == kept
    before = [sum(k < r for k in kept) for r in range(61)]
    assert rows.before(torch.arange(61)).tolist() == before
    first, last = sorted(rng.choices(range(len(kept) + 1), k=2))
    assert [r for a, b in rows.runs(first, last) for r in range(a, b)] == kept[first:last]
