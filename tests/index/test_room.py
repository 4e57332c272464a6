"""Whether the disk has the room: asked before the first byte of codes, an index, or a copy."""

from __future__ import annotations

from collections import namedtuple
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from knnext.datastore import Datastore, DatastoreWriteError
from knnext.datastore.room import check_disk, row_bytes, taken_bytes
from knnext.index import FaissIndex, StoredCodes
from knnext.index.codes_meta import codes_bytes
from knnext.index.faiss_size import check_factory
from tests.index.stores import DIM, ROWS, clustered, make_datastore

Free = Callable[[int], None]
ROW = DIM * 2 + 4


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Datastore:
    return make_datastore(tmp_path_factory.mktemp("room") / "store", clustered(ROWS))


@pytest.fixture
def free(monkeypatch: pytest.MonkeyPatch) -> Free:
    """Makes a disk say that it has so many bytes."""
    usage = namedtuple("usage", "total used free")

    def set_to(size: int) -> None:
        monkeypatch.setattr("shutil.disk_usage", lambda _: usage(10**12, 0, size))

    return set_to


def refused(work: Callable[[], object], folder: Path, needed: int) -> None:
    """It says both numbers, and leaves nothing."""
    with pytest.raises(DatastoreWriteError, match=rf"\({needed:,} bytes\) and the disk has"):
        work()
    assert not folder.exists() or not [f for f in folder.iterdir() if f.stat().st_size]


def test_codes(store: Datastore, tmp_path: Path, free: Free) -> None:
    folder = tmp_path / "codes"
    needed = codes_bytes(ROWS, DIM)
    free(needed - 1)
    refused(lambda: StoredCodes.build(store, folder), folder, needed)
    free(needed)
    codes = StoredCodes.build(store, folder)
    assert sum((folder / f.file).stat().st_size for f in codes.meta.files()) == needed
    free(0)
    StoredCodes.build(store, folder)  # they are all there
    StoredCodes.build(store, folder, overwrite=True)  # in the place of what goes


@pytest.mark.parametrize("factory", ["Flat", "SQ8", "IVF16,PQ8", "HNSW8,SQ8"])
def test_an_index(store: Datastore, tmp_path: Path, free: Free, factory: str) -> None:
    pytest.importorskip("faiss")
    folder = tmp_path / "index"
    size = check_factory(factory, DIM)
    needed = size.build_bytes(ROWS, 1)
    free(needed - 1)
    refused(lambda: FaissIndex.build(store, folder, factory), folder, needed)
    free(needed)
    built = FaissIndex.build(store, folder, factory)
    assert built.num_bytes <= needed
    free(0)
    FaissIndex.build(store, folder, factory)  # finished


def test_an_index_whose_size_is_not_known_is_built(
    store: Datastore, tmp_path: Path, free: Free
) -> None:
    pytest.importorskip("faiss")
    free(0)
    assert FaissIndex.build(store, tmp_path / "index", "RQ1x4").factory == "RQ1x4"


def test_merged_rows(store: Datastore, tmp_path: Path, free: Free) -> None:
    target = tmp_path / "both"
    free(2 * ROWS * ROW - 1)
    refused(lambda: Datastore.merge([store, store], target), target, 2 * ROWS * ROW)
    free(2 * ROWS * ROW)
    Datastore.merge([store, store], target)


def test_sampled_rows(store: Datastore, tmp_path: Path, free: Free) -> None:
    target = tmp_path / "some"
    free(ROWS // 2 * ROW - 1)
    refused(lambda: store.subsample(0.5, path=target), target, ROWS // 2 * ROW)
    store.subsample(0.5)  # a view takes nothing


def test_imported_rows(tmp_path: Path, free: Free) -> None:
    keys = np.ones((50, 8), np.float16)
    keys.tofile(tmp_path / "dstore_gpt2_50_8_keys.npy")
    np.ones((50, 1), np.int32).tofile(tmp_path / "dstore_gpt2_50_8_vals.npy")
    target = tmp_path / "store"
    free(50 * 20 - 1)
    refused(lambda: Datastore.import_legacy(tmp_path, target), target, 50 * 20)
    free(50 * 20)
    assert Datastore.import_legacy(tmp_path, target).num_entries == 50


def test_holes_take_nothing(tmp_path: Path) -> None:
    """Of files that several processes fill: what is not written yet is not taken."""
    with (tmp_path / "holes").open("wb") as file:
        file.truncate(1 << 24)
    (tmp_path / "full").write_bytes(bytes(range(256)) * 64)
    assert 16_384 <= taken_bytes(tmp_path) < 1 << 20
    assert taken_bytes(tmp_path / "nowhere") == 0


def test_the_place_need_not_be_there_yet(tmp_path: Path, free: Free) -> None:
    free(10)
    check_disk(tmp_path / "not" / "yet", 10, "it", "hint")
    with pytest.raises(DatastoreWriteError, match=r"it needs 11 B .* hint$"):
        check_disk(tmp_path / "not" / "yet", 11, "it", "hint")


def test_a_row_is_its_key_and_its_token(store: Datastore) -> None:
    assert row_bytes(store.dim, store.dtype) == ROW
