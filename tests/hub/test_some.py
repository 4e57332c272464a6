"""Some files of a datastore, some of its shards, its codes: fetched and completed."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from knnext.datastore import (
    CorruptDatastoreError,
    Datastore,
    DatastoreError,
    UnfinishedDatastoreError,
)
from knnext.hub import open_partial
from knnext.index import ExactIndex, FaissIndex, StoredCodes
from tests.hub.server import Hub
from tests.hub.stored import REPO, ROWS, same_bytes


def test_some_files_now_and_the_rest_later(
    stores: dict[str, Datastore], hub: Hub, tmp_path: Path
) -> None:
    store = stores["plain"]
    store.push_to_hub(REPO, include="all")
    part = Datastore.from_hub(REPO, tmp_path / "T", only=["values", "documents", "index"])
    assert not hub.asked("GET", "keys-") and not hub.asked("GET", "codes.bin")
    assert torch.equal(part.values[:], store.values[:]) and part.fingerprint == store.fingerprint
    index = FaissIndex.open(None, part, rescore=False)
    queries = store.keys[0:3]
    assert torch.equal(
        index.tokens(index.search(queries, 4)[1]),
        store.values[FaissIndex.open(None, store, rescore=False).search(queries, 4)[1]],
    ), "without a key"
    with pytest.raises(CorruptDatastoreError, match="missing"):
        part.keys[0:1]
    with pytest.raises(UnfinishedDatastoreError, match="holds some files of a datastore, as `knn"):
        Datastore.open(tmp_path / "T")
    with pytest.raises(CorruptDatastoreError, match="missing"):
        part.verify()
    assert len(open_partial(tmp_path / "T")) == 40
    before = len(hub.log)
    whole = Datastore.from_hub(REPO, tmp_path / "T")
    assert same_bytes(whole, store)
    late = [path for method, path, _ in hub.log[before:] if method == "GET"]
    assert not any("values-" in path or "faiss" in path for path in late), "they were here"
    with pytest.raises(DatastoreError, match="nothing that was pulled"):
        open_partial(tmp_path)


def test_codes_alone_for_a_store_that_one_has(
    stores: dict[str, Datastore], hub: Hub, tmp_path: Path
) -> None:
    stores["plain"].push_to_hub(REPO)
    mine = Datastore.open(Datastore.from_hub(REPO, tmp_path / "T", only=list(ROWS)).path)
    assert not (tmp_path / "T.codes").exists() and len(mine) == 40
    before = len(hub.log)
    store = Datastore.from_hub(REPO, tmp_path / "T", only=["codes"])
    assert not any("keys-" in path for _, path, _ in hub.log[before:])
    assert len(StoredCodes.open(store)) == 40 and not (tmp_path / "T.pull").exists()
    distances, _ = ExactIndex(store).search(store.keys[0:2], 3)
    assert distances.shape == (2, 3)


@pytest.mark.parametrize("shards", [[0], [2], [0, 2], [1, 2], [0, 1, 2]])
def test_some_shards_are_a_datastore_of_their_rows(
    shards: list[int], stores: dict[str, Datastore], hub: Hub, tmp_path: Path
) -> None:
    store = stores["plain"]
    store.push_to_hub(REPO)
    found = Datastore.from_hub(REPO, tmp_path / "T", shards=shards)
    rows = torch.cat([torch.arange(16 * n, min(16 * n + 16, 40)) for n in shards])
    assert torch.equal(found.keys[:], store.keys[rows])
    assert torch.equal(found.values[:], store.values[rows])
    numbers = torch.arange(len(rows))
    assert torch.equal(found.document_of(numbers), store.document_of(rows))
    assert list(found.document_names) == list(store.document_names)
    assert found.meta.origin["shards"] == ",".join(map(str, shards))
    Datastore.open(tmp_path / "T", verify=True)
    asked = {int(path[-9:-4]) for path in hub.asked("GET", "keys-")}
    assert asked == set(shards)
    assert Datastore.from_hub(REPO, tmp_path / "T", shards=shards).fingerprint == found.fingerprint
    with pytest.raises(DatastoreError, match="something else than these shards"):
        Datastore.from_hub(REPO, tmp_path / "T", shards=[n for n in (0, 1) if [n] != shards][:1])


@pytest.mark.parametrize(("parts", "rows"), [([3], range(20, 40)), ([1, 2, 3], range(40))])
def test_some_parts(
    parts: list[int], rows: range, stores: dict[str, Datastore], hub: Hub, tmp_path: Path
) -> None:
    store, numbers = stores["parts"], torch.tensor(list(rows))
    store.push_to_hub(REPO)
    found = Datastore.from_hub(REPO, tmp_path / "T", parts=parts)
    assert torch.equal(found.keys[:], store.keys[numbers])
    ids = found.document_of(torch.arange(len(numbers)))
    assert torch.equal(ids, store.document_of(numbers))
    Datastore.open(tmp_path / "T", verify=True)
    with pytest.raises(ValueError, match="parts: got 4, want numbers from 1 to 3"):
        Datastore.from_hub(REPO, tmp_path / "no", parts=[4])
    with pytest.raises(ValueError, match="parts: got none that have rows"):
        Datastore.from_hub(REPO, tmp_path / "no", parts=[2])


def test_a_shard_of_a_part(stores: dict[str, Datastore], hub: Hub, tmp_path: Path) -> None:
    stores["parts"].push_to_hub(REPO)
    found = Datastore.from_hub(REPO, tmp_path / "T", shards=[1, 2])  # of two parts
    assert found.values[:].tolist() == [n % 11 for n in range(16, 36)]
    Datastore.open(tmp_path / "T", verify=True)
