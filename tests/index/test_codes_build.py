"""Encoding a datastore: interrupted, extended, refused, at the same time, on a full disk."""

from __future__ import annotations

import errno
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

import knnext
from knnext.datastore import (
    Datastore,
    DatastoreError,
    DatastoreLockedError,
    DatastoreWriteError,
)
from knnext.index import ExactIndex, IndexMismatchError, StoredCodes, codes_build
from tests.index.test_codes import damage, hidden_states, queries
from tests.index.test_exact import make_datastore

ROWS = 600


@pytest.fixture(autouse=True)
def small_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Many chunks and commits of few rows (40 x 2 bytes each)."""
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1700000000")
    monkeypatch.setattr(codes_build, "_CHUNK_BYTES", 37 * 80)
    monkeypatch.setattr(codes_build, "_COMMIT_BYTES", 100 * 80)


@pytest.fixture
def store(tmp_path: Path) -> Datastore:
    return make_datastore(tmp_path / "ds", hidden_states(ROWS).half(), entries_per_shard=250)


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def check(store: Datastore) -> None:
    """The codes are whole, agree with their checksums, and belong to the keys."""
    codes = StoredCodes.open(store)
    want = knnext.encode_keys(store.keys[:], codes.center)
    got = codes[0 : len(codes)]
    assert torch.equal(got.codes, want.codes) and torch.equal(got.stats, want.stats)
    names = {"center.bin", "codes.bin", "stats.bin", "codes.json", ".lock"}
    assert {path.name for path in codes.path.iterdir()} == names


def test_the_center_is_the_mean_of_a_stated_sample(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(codes_build, "_CHUNK_BYTES", 64 << 20)
    monkeypatch.setattr(codes_build, "CENTER_ROWS", 128)
    keys = hidden_states(1000).half()
    store = make_datastore(tmp_path / "ds", keys, entries_per_shard=300)
    rows = torch.cat([torch.arange(2) + i * 998 // 63 for i in range(64)])
    codes = StoredCodes.build(store)
    assert codes.meta.center_rows == 128 and rows.max() == 999
    torch.testing.assert_close(codes.center, keys[rows].double().mean(0).float())
    check(store)


class Die(BaseException):
    """Stands for a kill: nothing of the build's own catches it and goes on."""


@pytest.mark.parametrize("name", ["pwrite", "fsync"])
def test_a_death_at_every_operation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """Half a write is left behind; what is opened before the end is no codes; the end is one."""
    store = make_datastore(tmp_path / "small", hidden_states(250).half(), entries_per_shard=150)
    folder = StoredCodes.build(store).path
    reference, at, died = content(folder), 0, True
    while died:
        died, real, left = False, getattr(os, name), [at]

        def failing(*arguments: Any, real: Any = real, left: list[int] = left) -> Any:
            left[0] -= 1
            if left[0] == -1:
                if name == "pwrite":
                    real(arguments[0], arguments[1][: len(arguments[1]) // 2], arguments[2])
                raise Die
            return real(*arguments)

        codes_build.discard(folder)
        with monkeypatch.context() as patch:
            patch.setattr(os, name, failing)
            try:
                StoredCodes.build(store)
            except Die:
                died = True
        if died and not (folder / "codes.json").exists():
            with pytest.raises(FileNotFoundError):
                StoredCodes.open(store)
        StoredCodes.build(store)
        assert content(folder) == reference
        at += 1
    assert at > 12
    check(store)


def test_a_killed_process_is_gone_on_from(store: Datastore) -> None:
    """SIGKILL after some commits, in a process of its own; committed rows are not encoded again."""
    child = os.fork()
    if child == 0:
        real, calls = codes_build.encode_keys, [0]

        def dying(*arguments: Any) -> Any:
            calls[0] += 1
            if calls[0] == 9:
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*arguments)

        codes_build.encode_keys = dying
        torch.set_num_threads(1)
        try:
            StoredCodes.build(store)
        finally:
            os._exit(3)
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL
    folder = store.path.with_name("ds.codes")
    committed = codes_build.read_meta(folder / "build.json").num_entries
    assert 200 < committed < 300
    encoded, real = [], codes_build.encode_keys

    def counting(keys: Any, center: Any) -> Any:
        encoded.append(len(keys))
        return real(keys, center)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(codes_build, "encode_keys", counting)
        StoredCodes.build(store)
        assert sum(encoded) == ROWS - committed
        StoredCodes.build(store)  # finished: nothing is done
        assert sum(encoded) == ROWS - committed
    check(store)


@pytest.mark.parametrize(
    ("name", "code"), [("pwrite", errno.ENOSPC), ("fsync", errno.EIO), ("pwrite", errno.EDQUOT)]
)
def test_a_full_disk_is_named(
    store: Datastore, monkeypatch: pytest.MonkeyPatch, name: str, code: int
) -> None:
    calls, real = [0], getattr(os, name)

    def failing(*arguments: Any) -> Any:
        calls[0] += 1
        if calls[0] > 22:
            raise OSError(code, os.strerror(code))
        return real(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(os, name, failing)
        with pytest.raises(DatastoreWriteError, match="bytes free on this disk") as caught:
            StoredCodes.build(store)
    text = str(caught.value)
    assert os.strerror(code) in text and "ds.codes" in text and f"of {ROWS} rows" in text
    StoredCodes.build(store)
    check(store)


@pytest.mark.parametrize("more", [1, 100, 700])
def test_rows_appended_later(store: Datastore, more: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Old codes are refused; building again encodes the new rows with the old center."""
    old = StoredCodes.build(store)
    center = old.center.clone()
    keys = hidden_states(ROWS + more)[ROWS:].half() + 1
    with Datastore.create(store.path, 40, key_layer="att", vocab_size=97, resume=True) as growing:
        growing.append(keys, torch.zeros(more, dtype=torch.int32))
    grown = Datastore.open(store.path)
    with pytest.raises(IndexMismatchError, match=f"600 rows, now {ROWS + more:,}.*--kind codes"):
        StoredCodes.open(grown)
    with pytest.warns(UserWarning, match="searching without codes: .* an earlier state"):
        assert ExactIndex(grown).codes is None
    encoded, real = [], codes_build.encode_keys

    def counting(keys: Any, center: Any) -> Any:
        encoded.append(len(keys))
        return real(keys, center)

    monkeypatch.setattr(codes_build, "encode_keys", counting)
    codes = StoredCodes.build(grown)
    assert sum(encoded) == more and torch.equal(codes.center, center)
    check(grown)
    got, want = (ExactIndex(grown, codes=c).search(queries(), 9) for c in (True, False))
    assert torch.equal(got[0], want[0]) and torch.equal(got[1], want[1])
    # Whoever searches by the old ones, of the old rows, is not disturbed.
    assert torch.equal(old[0:ROWS].codes, codes[0:ROWS].codes)


@pytest.mark.parametrize("finished", [True, False])
@pytest.mark.parametrize("other", ["values", "start", "shorter", "dim"])
def test_another_datastore_in_its_place(
    tmp_path: Path, other: str, finished: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys = hidden_states(ROWS).half()
    store = make_datastore(tmp_path / "ds", keys, entries_per_shard=250)
    folder = StoredCodes.build(store).path
    if not finished:
        (folder / "codes.json").rename(folder / "build.json")
    for path in store.path.iterdir():
        path.unlink()
    changed = {
        "values": keys + 1,
        "start": torch.cat([keys[:1] + 1, keys[1:], keys]),
        "shorter": keys[:400],
        "dim": keys[:, :20],
    }[other]
    new = make_datastore(tmp_path / "ds", changed, entries_per_shard=250)
    before = content(folder)
    with pytest.raises(IndexMismatchError, match=r"codes of another datastore than .*--overwrite"):
        StoredCodes.build(new)
    if finished:
        with pytest.warns(UserWarning, match="codes of another datastore"):
            assert ExactIndex(new).codes is None
        with pytest.raises(IndexMismatchError):
            ExactIndex(new, codes=True)
    assert content(folder) == before
    StoredCodes.renew(new)
    check(new)


def test_damaged_codes_are_not_gone_on_from(store: Datastore) -> None:
    folder = StoredCodes.build(store).path
    (folder / "codes.json").rename(folder / "build.json")
    damage(folder / "codes.bin")
    with pytest.raises(IndexMismatchError, match=r"codes\.bin is damaged.*--overwrite"):
        StoredCodes.build(store)
    StoredCodes.build(store, overwrite=True)
    check(store)


def test_a_second_encoding_is_refused_and_changes_nothing(
    store: Datastore, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, seen = codes_build.encode_keys, []

    def in_the_middle(keys: Any, center: Any) -> Any:
        folder = store.path.with_name("ds.codes")
        before = content(folder)
        for overwrite in (False, True):
            with pytest.raises(DatastoreLockedError, match="another process is encoding there"):
                StoredCodes.build(store, overwrite=overwrite)
        seen.append(content(folder) == before)
        return real(keys, center)

    with monkeypatch.context() as patch:
        patch.setattr(codes_build, "encode_keys", in_the_middle)
        StoredCodes.build(store)
    assert all(seen) and len(seen) > 10
    lock = codes_build._lock(store.path.with_name("ds.codes"))
    try:
        assert len(StoredCodes.build(store)) == ROWS  # what is finished is opened without a lock
    finally:
        lock.release()


def test_folders_that_are_not_of_codes(store: Datastore, tmp_path: Path) -> None:
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / "note.txt").write_text("dear diary")
    for overwrite in (False, True):
        with pytest.raises(DatastoreError, match=r"holds 'note.txt'.*not of codes"):
            StoredCodes.build(store, folder, overwrite=overwrite)
    assert (folder / "note.txt").read_text() == "dear diary"
    with pytest.raises(ValueError, match="this is a view"):
        StoredCodes.build(store.shard(0, 2))


def test_a_copy_and_a_move_keep_their_codes(store: Datastore, tmp_path: Path) -> None:
    StoredCodes.build(store)
    for name in ("ds", "ds.codes"):
        (tmp_path / name).rename(tmp_path / name.replace("ds", "moved"))
    check(Datastore.open(tmp_path / "moved"))
    # A stored sample is a datastore of its own; rows of other numbers have no codes there.
    sample = Datastore.open(tmp_path / "moved").subsample(0.5, path=tmp_path / "half")
    with pytest.raises(FileNotFoundError):
        StoredCodes.open(sample)
    with pytest.raises(IndexMismatchError):
        StoredCodes.open(sample, tmp_path / "moved.codes")
