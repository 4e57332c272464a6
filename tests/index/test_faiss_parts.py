"""A FAISS index that several processes build: the bytes of one, whoever made which segment."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from knnext.datastore import Datastore, DatastoreLockedError, UnfinishedDatastoreError, claims
from knnext.index import FaissIndex, IndexMismatchError, faiss_build, faiss_parts
from tests.index.stores import ROWS, clustered

faiss = pytest.importorskip("faiss")
pytestmark = pytest.mark.usefixtures("one_thread")

FACTORIES = ["IVF16,PQ16x4", "Flat", "IVF8,SQ8", "HNSW8", "PCA16,IVF8,SQ8"]


@pytest.fixture
def store(stores: dict[str, Datastore]) -> Datastore:
    return stores["l2"]


@pytest.fixture(scope="module")
def queries() -> Tensor:
    return clustered(20, seed=7, dtype=torch.float32)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def build_all(store: Datastore, folder: Path, factory: str, order: Any, count: int) -> FaissIndex:
    for number in order:
        index = FaissIndex.build_part(store, (number, count), folder, factory)
        assert (index is None) == (number != order[-1]) or factory == "HNSW8"
    assert index is not None
    return index


@pytest.mark.parametrize("factory", FACTORIES)
@pytest.mark.parametrize("alone", [True, False])
def test_the_index_of_one_process(
    store: Datastore, tmp_path: Path, factory: str, alone: bool
) -> None:
    """Of the same segments: the same file, to the byte; a graph is one segment."""
    rows = -(-ROWS // 4)
    want = FaissIndex.build(store, tmp_path / "one", factory, segment_rows=rows, nprobe=5)
    if alone:
        got = build_all(store, tmp_path / "got", factory, [3, 1, 4, 2], 4)
    else:
        got = FaissIndex.build(store, tmp_path / "got", factory, parts=4)
    assert names(got.path) == [".lock", "index.faiss", "index.json"]
    assert (got.path / "index.faiss").read_bytes() == (want.path / "index.faiss").read_bytes()
    assert got.sidecar.recipe == want.sidecar.recipe
    # It is what one process opens, whatever the number of its segments, and is not built again.
    before = (got.path / "index.faiss").stat().st_mtime_ns
    FaissIndex.build(store, got.path, factory)
    FaissIndex.build(store, got.path, factory, parts=7)
    assert FaissIndex.build_part(store, (9, 9), got.path, factory) is not None
    assert (got.path / "index.faiss").stat().st_mtime_ns == before


def test_the_default_segments_give_the_same_index_too(
    store: Datastore, tmp_path: Path, queries: Tensor
) -> None:
    want = FaissIndex.build(store, tmp_path / "one", "IVF16,PQ16x4")
    got = FaissIndex.build(store, tmp_path / "two", "IVF16,PQ16x4", rank=(1, 2))
    assert got.sidecar.recipe.segment_rows == ROWS // 4
    assert all(map(torch.equal, got.search(queries, 9), want.search(queries, 9)))


class Die(BaseException):
    """Stands for a kill."""


@pytest.mark.parametrize("where", ["train_into", "add_segment", "_merge", "_finish"])
def test_a_death_is_gone_on_from(
    store: Datastore, tmp_path: Path, where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the same call, and by one process; segments that were made are not made again."""
    want = FaissIndex.build(store, tmp_path / "one", "IVF16,PQ16x4", segment_rows=750)
    for name, parts in (("same", 4), ("alone", None)):
        real, calls = getattr(faiss_build, where), [0]

        def dying(*arguments: Any, real: Any = real, calls: list[int] = calls) -> Any:
            calls[0] += 1
            if calls[0] == (3 if where == "add_segment" else 1):
                raise Die
            return real(*arguments)

        with monkeypatch.context() as patch, pytest.raises(Die):
            patch.setattr(faiss_build, where, dying)
            FaissIndex.build(store, tmp_path / name, "IVF16,PQ16x4", parts=4)
        with pytest.raises(FileNotFoundError):
            FaissIndex.open(tmp_path / name, store)
        if where == "add_segment":
            with pytest.raises(UnfinishedDatastoreError, match=r"of its 4 segments 3-4 are miss"):
                faiss_parts.join(store, tmp_path / name)
        made = [path.stat().st_mtime_ns for path in sorted((tmp_path / name).glob("segment-*"))]
        assert len(made) == {"train_into": 0, "add_segment": 2}.get(where, 4)
        got = FaissIndex.build(store, tmp_path / name, "IVF16,PQ16x4", parts=parts)
        assert names(got.path) == [".lock", "index.faiss", "index.json"]
        assert (got.path / "index.faiss").read_bytes() == (want.path / "index.faiss").read_bytes()


def test_join_says_what_is_missing_and_merges_what_is_whole(
    store: Datastore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "ix"
    FaissIndex.build_part(store, (2, 3), folder, "Flat")
    assert faiss_parts.is_planned(folder)
    with pytest.raises(UnfinishedDatastoreError, match=r"of its 3 segments 1, 3 are missing"):
        faiss_parts.join(store, folder)
    with monkeypatch.context() as patch:
        patch.setattr(faiss_parts, "join", lambda *_: None)
        for number in (1, 3):
            faiss_parts.build_parts(
                store,
                folder,
                faiss_build.read_recipe(folder),
                nprobe=3,
                add_chunk=100,
                gpu=False,
                part=(number, 3),
            )
    faiss_parts.join(store, folder)
    faiss_parts.join(store, folder)  # once more changes nothing
    assert FaissIndex.open(folder, store).sidecar.recipe.num_entries == ROWS


def test_refusals(store: Datastore, stores: dict[str, Datastore], tmp_path: Path) -> None:
    folder = tmp_path / "ix"
    FaissIndex.build_part(store, (1, 3), folder, "IVF16,PQ16x4")
    with pytest.raises(IndexMismatchError, match="factory is 'IVF16,PQ16x4', wanted 'Flat'"):
        FaissIndex.build_part(store, (2, 3), folder, "Flat")
    with pytest.raises(IndexMismatchError, match="metric is 'l2', wanted 'ip'; datastore is"):
        FaissIndex.build_part(stores["ip"], (2, 3), folder, "IVF16,PQ16x4")
    with pytest.raises(IndexMismatchError, match="of another datastore"):
        faiss_parts.join(stores["ip"], folder)
    with pytest.raises(ValueError, match=r"part: got 4/3, want 1/3 to 3/3"):
        FaissIndex.build_part(store, (4, 3), folder, "IVF16,PQ16x4")
    with pytest.raises(ValueError, match="overwrite is for one process"):
        FaissIndex.build(store, folder, "Flat", overwrite=True, rank=(0, 2))
    with pytest.raises(ValueError, match="does not suit"):
        FaissIndex.build(store, tmp_path / "bad", "IVF16,PQ7", parts=2)
    held = claims.WriterLock(folder, ".piece-segment-00001.lock")
    try:
        with pytest.raises(DatastoreLockedError, match="at its segment-00001"):
            FaissIndex.build(store, folder, "Flat", overwrite=True)
    finally:
        held.release()
    index = FaissIndex.build(store, folder, "Flat", overwrite=True)
    assert names(index.path) == [".lock", "index.faiss", "index.json"]
    assert json.loads((folder / "index.json").read_text())["recipe"]["factory"] == "Flat"


def test_a_claimed_segment_is_waited_for_and_taken_when_its_process_ends(
    store: Datastore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "ix"
    FaissIndex.build_part(store, (1, 3), folder, "Flat")
    held, looks = claims.WriterLock(folder, ".piece-segment-00001.lock"), []

    def sleep(seconds: float) -> None:
        looks.append(seconds)
        if len(looks) == 3:
            held.release()

    monkeypatch.setattr(claims.time, "sleep", sleep)
    with pytest.warns(UserWarning, match="waiting for segment 2, of other processes"):
        index = FaissIndex.build(store, folder, "Flat", parts=3)
    assert len(looks) == 3 and len(index.datastore) == ROWS
