"""What can be wrong with the files, the disk or the caller: each has an error that says so."""

from __future__ import annotations

import errno
import json
import os
import resource
import zlib
from pathlib import Path

import pytest
import torch

from knnext.datastore import (
    CorruptDatastoreError,
    Datastore,
    DatastoreError,
    DatastoreLockedError,
    DatastoreWriteError,
    FormatVersionError,
    IncompatibleDatastoreError,
    UnfinishedDatastoreError,
)

DIM = 4


def rows(first: int, last: int):
    index = torch.arange(first, last)
    return (index[:, None] + torch.arange(DIM)).half(), index % 11, index // 10


@pytest.fixture
def path(tmp_path, monkeypatch) -> Path:
    """A finished datastore: 3 shards of 16, 16 and 8 rows, 4 documents."""
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1700000000")
    return write(tmp_path / "ds", 40)


def begin(path: Path, **options) -> Datastore:
    defaults = {"entries_per_shard": 16, "vocab_size": 11, "commit_seconds": 1e9, "model_id": "m"}
    return Datastore.create(path, DIM, **{**defaults, **options})


def write(path: Path, last: int) -> Path:
    with begin(path) as store:
        store.append(*rows(0, last))
    return path


def folder_bytes(path: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted(path.iterdir())}


def edit_meta(path: Path, **changes) -> None:
    """Change fields as a forger would: with a checksum that fits."""
    body = json.loads((path / "meta.json").read_text())
    del body["checksum"]
    body.update(changes)
    canonical = json.dumps(body, sort_keys=True, separators=(",", ":"))
    body["checksum"] = f"crc32:{zlib.crc32(canonical.encode()):08x}"
    (path / "meta.json").write_text(json.dumps(body))


DATA_FILES = [
    "keys-00000.bin",
    "keys-00002.bin",
    "values-00001.bin",
    "document-starts.bin",
    "document-names.jsonl",
]


@pytest.mark.parametrize("name", DATA_FILES)
def test_truncated_and_missing_files_are_noticed_when_opening(path, name):
    file = path / name
    with file.open("r+b") as content:
        content.truncate(file.stat().st_size - 1)
    with pytest.raises(CorruptDatastoreError, match=rf"{name}: truncated: .* bytes, want"):
        Datastore.open(path)
    file.unlink()
    with pytest.raises(CorruptDatastoreError, match=rf"{name}: missing"):
        Datastore.open(path)


@pytest.mark.parametrize("name", DATA_FILES)
def test_every_flipped_byte_is_found_by_verify(path, name):
    good = (path / name).read_bytes()
    for place in range(len(good)):
        bad = bytearray(good)
        bad[place] ^= 0x10
        (path / name).write_bytes(bad)
        with pytest.raises(CorruptDatastoreError, match=rf"1 of 8 files .*{name}: its content"):
            Datastore.open(path).verify()
    (path / name).write_bytes(good)
    Datastore.open(path, verify=True)


def test_verify_lists_all_bad_files_and_reports_progress(path):
    for name in DATA_FILES[:3]:
        content = bytearray((path / name).read_bytes())
        content[5] ^= 1
        (path / name).write_bytes(content)
    seen = []
    with pytest.raises(CorruptDatastoreError) as caught:
        Datastore.open(path).verify(lambda done, total: seen.append((done, total)))
    assert len(caught.value.problems) == 3
    assert all(any(name in problem for problem in caught.value.problems) for name in DATA_FILES[:3])
    total = sum(len(data) for name, data in folder_bytes(path).items() if name != "meta.json")
    assert seen[-1] == (total, total) and seen == sorted(seen)


def test_every_flipped_byte_of_meta_json_is_noticed(path):
    good = (path / "meta.json").read_bytes()
    for place in range(len(good)):
        bad = bytearray(good)
        bad[place] ^= 0x10 if good[place] not in b" \n" else 0x40
        (path / "meta.json").write_bytes(bad)
        with pytest.raises(DatastoreError):
            Datastore.open(path)


def test_shards_exchanged_between_datastores_are_found(path, tmp_path):
    with begin(tmp_path / "other") as other:
        keys, values, ids = rows(0, 40)
        other.append(keys + 1, values, ids)
    (path / "keys-00001.bin").write_bytes((other.path / "keys-00001.bin").read_bytes())
    with pytest.raises(CorruptDatastoreError, match=r"keys-00001\.bin"):
        Datastore.open(path, verify=True)


def test_other_programs_and_versions(path):
    edit_meta(path, format_version=2)
    with pytest.raises(FormatVersionError, match="format version 2; this knnext reads 1"):
        Datastore.open(path)
    edit_meta(path, magic="something")
    with pytest.raises(FormatVersionError, match="magic is 'something', want 'knnext-datastore'"):
        Datastore.open(path)
    for content in (b"[1]", b"\x00\xff", b"", b'{"magic": "knnext-datastore"', b"null"):
        (path / "meta.json").write_bytes(content)
        with pytest.raises(DatastoreError, match=r"meta\.json"):
            Datastore.open(path)


def test_an_edited_meta_is_refused(path):
    text = (path / "meta.json").read_text()
    (path / "meta.json").write_text(text.replace('"model_id": "m"', '"model_id": "n"'))
    with pytest.raises(CorruptDatastoreError, match="damaged or edited by hand"):
        Datastore.open(path)


@pytest.mark.parametrize(
    "changes",
    [
        {"num_entries": 41},
        {"dim": 5},
        {"dim": -4},
        {"dim": "4"},
        {"dtype": "float8"},
        {"dtype": "float32"},
        {"metric": "cosine"},
        {"entries_per_shard": 8},
        {"shards": []},
        {"shards": None},
        {"vocab_size": 0},
        {"documents": {"count": 4}},
        {"documents": {"count": 4, "starts": 1, "names": 2}},
    ],
)
def test_numbers_that_contradict_each_other(path, changes):
    edit_meta(path, **changes)
    with pytest.raises(CorruptDatastoreError, match=r"meta\.json"):
        Datastore.open(path)


@pytest.mark.parametrize(
    "name", ["/etc/passwd", "../secret", "a/../../secret", "sub/keys-00000.bin", "..", "", ".lock"]
)
def test_paths_in_the_meta_cannot_lead_out(path, tmp_path, name):
    (tmp_path / "secret").write_bytes(bytes(1000))
    shards = json.loads((path / "meta.json").read_text())["shards"]
    shards[0]["keys"]["file"] = name
    edit_meta(path, shards=shards)
    with pytest.raises(DatastoreError, match=r"is not a plain name"):
        Datastore.open(path)


def test_other_names_inside_the_folder_are_refused_too(path):
    shards = json.loads((path / "meta.json").read_text())["shards"]
    shards[0]["keys"]["file"] = "values-00000.bin"
    edit_meta(path, shards=shards)
    with pytest.raises(CorruptDatastoreError, match=r"want keys-00000\.bin"):
        Datastore.open(path)


def test_links_and_special_files_are_not_followed(path, tmp_path):
    outside = tmp_path / "outside"
    file = path / "keys-00001.bin"
    file.rename(outside)
    file.symlink_to(outside)
    with pytest.raises(DatastoreError, match="links out of the datastore's folder"):
        Datastore.open(path)
    file.unlink()
    os.mkfifo(file)
    with pytest.raises(DatastoreError, match="not a regular file"):
        Datastore.open(path)
    # A link that appears after opening is caught at the first read.
    file.unlink()
    file.write_bytes(outside.read_bytes())
    store = Datastore.open(path)
    file.unlink()
    file.symlink_to(outside)
    with pytest.raises(DatastoreError, match="links out"):
        store.keys[16:20]


def test_what_is_not_a_datastore(tmp_path):
    with pytest.raises(DatastoreError, match="the folder does not exist"):
        Datastore.open(tmp_path / "none")
    (tmp_path / "file").write_text("x")
    with pytest.raises(DatastoreError, match="not a datastore"):
        Datastore.open(tmp_path / "file")
    with pytest.raises(DatastoreError, match=r"has no meta\.json"):
        Datastore.open(tmp_path)
    with pytest.raises(DatastoreError, match="not empty"):
        Datastore.create(tmp_path, 4, resume=True)


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


class Disk:
    """Makes one call of ``name`` in os, the ``fail_at``-th, fail with ``code``."""

    def __init__(self, monkeypatch, name: str, fail_at: int, code: int) -> None:
        self.calls, self.fail_at, self.code = 0, fail_at, code
        self.real = getattr(os, name)
        monkeypatch.setattr(os, name, self)

    def __call__(self, *arguments):
        self.calls += 1
        if self.calls - 1 == self.fail_at:
            if len(arguments) == 3:  # pwrite: a full disk takes a part first
                self.real(arguments[0], arguments[1][: len(arguments[1]) // 2], arguments[2])
            raise OSError(self.code, os.strerror(self.code))
        return self.real(*arguments)


@pytest.mark.parametrize(("name", "code"), [("pwrite", errno.ENOSPC), ("fsync", errno.EIO)])
def test_a_disk_that_fails_once_loses_nothing(path, tmp_path, monkeypatch, name, code):
    """At every write and every sync: the append is undone, tried again, and the bytes are right."""
    reference, fail_at, failed = folder_bytes(path), 0, True
    while failed:
        failed = False
        with monkeypatch.context() as patch:
            disk = Disk(patch, name, 10**9, code)
            store = begin(tmp_path / f"ds{fail_at}", commit_seconds=0.0)
            disk.fail_at = disk.calls + fail_at
            for first in (0, 12, 24, 36):
                part = rows(first, min(first + 12, 40))
                try:
                    store.append(*part)
                except DatastoreWriteError as error:
                    assert os.strerror(code) in str(error) and "bytes free" in str(error)
                    failed = True
                    assert store.num_entries == first
                    store.append(*part)
            try:
                store.close()
            except DatastoreWriteError:
                failed = True
                store.close()
        assert folder_bytes(store.path) == reference
        fail_at += 1
    assert fail_at > 10


def test_after_a_failed_append_a_shorter_build_leaves_no_residue(tmp_path, monkeypatch):
    store = begin(tmp_path / "ds")
    store.append(*rows(0, 4))
    with monkeypatch.context() as patch:
        Disk(patch, "pwrite", 5, errno.ENOSPC)
        with pytest.raises(DatastoreWriteError):
            store.append(*rows(4, 40))
    store.close()
    write(tmp_path / "short", 4)
    names = [file.name for file in (tmp_path / "short").iterdir()]
    assert sorted(names) == sorted(file.name for file in store.path.iterdir())
    for name in set(names) - {"meta.json"}:
        assert (store.path / name).read_bytes() == (tmp_path / "short" / name).read_bytes()


def test_when_undoing_fails_too_the_last_commit_stands(tmp_path, monkeypatch):
    store = begin(tmp_path / "ds")
    store.append(*rows(0, 20))
    store.commit()
    with monkeypatch.context() as patch:
        Disk(patch, "pwrite", 1, errno.ENOSPC)
        Disk(patch, "ftruncate", 0, errno.EIO)
        with pytest.raises(DatastoreWriteError):
            store.append(*rows(20, 30))
    for use in (lambda: store.append(*rows(20, 30)), store.commit, store.close):
        with pytest.raises(DatastoreWriteError, match="could not undo a failed write"):
            use()
    with begin(tmp_path / "ds", resume=True) as store:
        assert store.num_entries == 20
        store.append(*rows(20, 40))
    assert torch.equal(Datastore.open(store.path, verify=True).keys[:], rows(0, 40)[0])


def test_a_real_file_size_limit(tmp_path):
    """The kernel itself refuses, half-way through a write."""
    store = begin(tmp_path / "ds", entries_per_shard=10**6)
    store.append(*rows(0, 40))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, hard))
    try:
        with pytest.raises(DatastoreWriteError, match="File too large after 40 entries"):
            store.append(torch.ones(10**4, DIM), torch.zeros(10**4, dtype=torch.int32), [3] * 10**4)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    store.append(*rows(40, 50))
    store.close()
    assert torch.equal(Datastore.open(store.path, verify=True).keys[:], rows(0, 50)[0])


@pytest.mark.parametrize(("name", "code"), [("pwrite", errno.ENOSPC), ("fsync", errno.EIO)])
def test_after_a_failed_append_earlier_rows_are_still_synced(tmp_path, monkeypatch, name, code):
    """What undoing has reopened must not count as clean."""
    synced = set()
    real = os.fsync

    def fsync(fd: int) -> None:
        synced.add(Path(f"/proc/self/fd/{fd}").readlink().name)
        real(fd)

    store = begin(tmp_path / "ds")
    store.append(*rows(0, 10))
    with monkeypatch.context() as patch:
        Disk(patch, name, 0, code)
        with pytest.raises(DatastoreWriteError):
            store.append(*rows(10, 20))
    assert store.num_entries == 10
    monkeypatch.setattr(os, "fsync", fsync)
    store.commit()
    assert {"keys-00000.bin", "values-00000.bin"} <= synced
