"""Two builds of one index at once: one builds, the other is told; readers never wait."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from knnext.datastore import Datastore, DatastoreLockedError
from knnext.index import FaissIndex, faiss_build
from tests.index.stores import clustered, make_datastore

pytest.importorskip("faiss")


@pytest.fixture
def store(tmp_path: Path) -> Datastore:
    return make_datastore(tmp_path / "s", clustered(600))


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_second_build_is_refused_and_changes_nothing(
    store: Datastore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, overwrite: bool
) -> None:
    folder, real, left = tmp_path / "ix", faiss_build._merge, []

    def in_the_middle(*arguments: Any) -> Any:
        before = {p.name: p.read_bytes() for p in folder.iterdir()}
        with pytest.raises(DatastoreLockedError, match="another process is building this index"):
            FaissIndex.build(store, folder, "Flat", overwrite=overwrite)
        left.append(before == {p.name: p.read_bytes() for p in folder.iterdir()})
        return real(*arguments)

    monkeypatch.setattr(faiss_build, "_merge", in_the_middle)
    FaissIndex.build(store, folder, "Flat", overwrite=True)
    assert left == [True]
    monkeypatch.undo()
    # The lock goes with the build; a finished index is opened without one.
    FaissIndex.build(store, folder, "Flat", overwrite=True)
    lock = faiss_build._lock(folder)
    try:
        assert FaissIndex.build(store, folder, "Flat").num_bytes > 0
    finally:
        lock.release()


def test_a_failed_build_lets_go(
    store: Datastore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*arguments: Any) -> None:
        raise OSError("no")

    with monkeypatch.context() as patch, pytest.raises(OSError, match="no"):
        patch.setattr(faiss_build, "_merge", fail)
        FaissIndex.build(store, tmp_path / "ix", "Flat")
    assert FaissIndex.build(store, tmp_path / "ix", "Flat").search(store.keys[0:1], 1)[1] == 0
