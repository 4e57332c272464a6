"""Codes that several processes make: the bytes of one, whoever made which part, and who died."""

from __future__ import annotations

import os
import random
import shutil
import zlib
from pathlib import Path
from typing import Any

import pytest

from knnext.datastore import (
    Datastore,
    DatastoreLockedError,
    UnfinishedDatastoreError,
    claims,
)
from knnext.datastore.file_range import combine_crc32
from knnext.index import IndexMismatchError, StoredCodes, codes_parts
from tests.index.test_codes import damage, hidden_states
from tests.index.test_codes_build import ROWS, Die, check, content, small_steps, store
from tests.index.test_exact import make_datastore

__all__ = ["small_steps", "store"]  # fixtures


@pytest.fixture
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(codes_parts, "_ROWS", 16)


def one_process(store: Datastore, folder: Path) -> dict[str, bytes]:
    return content(StoredCodes.build(store, folder).path)


def test_checksums_of_pieces_are_combined() -> None:
    draw = random.Random(0)
    for size in (0, 1, 7, 4096, 100_003):
        first, second = draw.randbytes(draw.randrange(50)), draw.randbytes(size)
        found = combine_crc32(zlib.crc32(first), zlib.crc32(second), size)
        assert found == zlib.crc32(first + second)


@pytest.mark.usefixtures("small_parts")
@pytest.mark.parametrize("count", [1, 3, 8, 50])
@pytest.mark.parametrize("alone", [True, False])
def test_parts_have_the_bytes_of_one_process(
    store: Datastore, tmp_path: Path, count: int, alone: bool
) -> None:
    """codes.json included. With 50 there are parts without rows."""
    want = one_process(store, tmp_path / "whole")
    if alone:
        for number in [*range(2, count + 1), 1]:
            codes = StoredCodes.build_part(store, (number, count))
            assert count == 50 or (codes is None) == (number != 1)
        assert codes is not None
    else:
        codes = StoredCodes.build(store, parts=count)
    assert content(codes.path) == want
    check(store)
    assert StoredCodes.build_part(store, (1, 1)) is not None  # finished: as it is


@pytest.mark.usefixtures("small_parts")
@pytest.mark.parametrize("name", ["pwrite", "fsync", "replace", "unlink"])
def test_a_death_at_every_operation_in_parts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """Of what is encoded, and of the joining; the same call goes on, by one or by several."""
    store = make_datastore(tmp_path / "small", hidden_states(150).half(), entries_per_shard=90)
    want = one_process(store, tmp_path / "whole")
    folder, at, died = tmp_path / "small.codes", 0, True
    owner = Path if name in ("replace", "unlink") else os
    while died:
        died, real, left = False, getattr(owner, name), [at]

        def failing(*arguments: Any, real: Any = real, left: list[int] = left, **more: Any) -> Any:
            left[0] -= 1
            if left[0] == -1:
                if name == "pwrite":
                    real(arguments[0], arguments[1][: len(arguments[1]) // 2], arguments[2])
                raise Die
            return real(*arguments, **more)

        shutil.rmtree(folder, ignore_errors=True)
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, failing)
            try:
                StoredCodes.build(store, parts=3)
            except Die:
                died = True
        StoredCodes.build(store, parts=3 if at % 2 else None)
        assert content(folder) == want
        at += 1
    assert at > 5


@pytest.mark.usefixtures("small_parts")
def test_committed_rows_of_a_part_are_not_encoded_again(
    store: Datastore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    want = one_process(store, tmp_path / "whole")
    encoded, real, die = [0], codes_parts.encode_keys, [6]

    def counting(keys: Any, center: Any) -> Any:
        die[0] -= 1
        if die[0] == 0:
            raise Die
        encoded[0] += len(keys)
        return real(keys, center)

    monkeypatch.setattr(codes_parts, "encode_keys", counting)
    with pytest.raises(Die):
        StoredCodes.build_part(store, (1, 2))
    with pytest.raises(UnfinishedDatastoreError, match=r"2 parts of the codes 0 are .*1-2.*1/2"):
        codes_parts.join(store, tmp_path / "ds.codes")
    with pytest.raises(FileNotFoundError):
        StoredCodes.open(store)
    assert StoredCodes.build_part(store, (1, 2)) is None
    lost = encoded[0] - codes_parts.read_plan(tmp_path / "ds.codes").rows[0]
    assert 0 < lost < 100  # since the last commit
    damage(tmp_path / "ds.codes" / "codes.bin")
    (tmp_path / "ds.codes" / "part-00001.json").write_text(
        (tmp_path / "ds.codes" / "part-00001.json").read_text().replace("304", "296")
    )
    with pytest.raises(IndexMismatchError, match=r"damaged.*--overwrite"):
        StoredCodes.build_part(store, (1, 2))
    StoredCodes.build(store, overwrite=True)
    assert content(tmp_path / "ds.codes") == want


@pytest.mark.usefixtures("small_parts")
def test_parts_of_other_codes_are_refused(store: Datastore, tmp_path: Path) -> None:
    StoredCodes.build_part(store, (1, 3))
    with pytest.raises(IndexMismatchError, match="begun in 3 parts, not in 4"):
        StoredCodes.build_part(store, (1, 4))
    with pytest.raises(ValueError, match=r"part: got 0/3.*task 0 of 3 makes part 1/3"):
        StoredCodes.build_part(store, (0, 3))
    with pytest.raises(ValueError, match=r"overwrite is for one process.*remove .*ds\.codes"):
        StoredCodes.build(store, overwrite=True, parts=3)
    claim = claims.WriterLock(tmp_path / "ds.codes", ".part-00002.lock")
    try:
        with pytest.raises(DatastoreLockedError, match="is encoding part-00002"):
            StoredCodes.build_part(store, (2, 3))
        with pytest.raises(DatastoreLockedError, match="is encoding part-00002"):
            StoredCodes.build(store, overwrite=True)
    finally:
        claim.release()
    other = make_datastore(tmp_path / "other", hidden_states(ROWS).half() + 1)
    with pytest.raises(IndexMismatchError, match="parts of codes of another datastore"):
        StoredCodes.build_part(other, (2, 3), tmp_path / "ds.codes")
    StoredCodes.build(store)  # as they were begun
    check(store)


def test_codes_of_one_process_are_gone_on_with_by_one(store: Datastore) -> None:
    folder = StoredCodes.build(store).path
    want = content(folder)
    (folder / "codes.json").rename(folder / "build.json")
    StoredCodes.build(store, rank=(1, 4))
    assert content(folder) == want
