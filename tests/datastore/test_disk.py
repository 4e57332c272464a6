"""A disk that fails: the append is undone, nothing before it is lost, and it may be repeated."""

from __future__ import annotations

import errno
import os
import resource
from pathlib import Path

import pytest
import torch

from knnext.datastore import (
    Datastore,
    DatastoreWriteError,
)
from tests.datastore.small import DIM, begin, folder_bytes, rows, write


@pytest.fixture
def path(tmp_path, monkeypatch) -> Path:
    """A finished datastore: 3 shards of 16, 16 and 8 rows, 4 documents."""
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1700000000")
    return write(tmp_path / "ds", 40)


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
