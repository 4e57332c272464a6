"""Indexes that other programs built with FAISS: taken where they are of the same keys in order."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from knnext.cli import main
from knnext.datastore import Datastore
from knnext.errors import MissingFileError
from knnext.index import FaissIndex, IndexMismatchError
from knnext.index.faiss_slice import undivided
from tests.index.stores import DIM, ROWS, clustered

pytestmark = pytest.mark.usefixtures("one_thread")


def write(path: Path, keys: torch.Tensor, factory: str, metric: str = "l2") -> Path:
    import faiss

    kind = faiss.METRIC_L2 if metric == "l2" else faiss.METRIC_INNER_PRODUCT
    index = faiss.index_factory(DIM, factory, kind)
    array = keys.float().numpy()
    index.train(array)
    if "IDMap" in factory:
        import numpy as np

        index.add_with_ids(array, np.arange(len(array)))
    else:
        index.add(array)
    faiss.write_index(index, str(path))
    return path


@pytest.mark.parametrize(
    ("factory", "metric"),
    [("Flat", "l2"), ("IVF16,PQ8np", "ip"), ("HNSW8", "l2"), ("IDMap,SQ8", "ip")],
)
def test_what_is_of_the_same_keys_is_taken(
    stores: dict[str, Datastore], tmp_path: Path, factory: str, metric: str
) -> None:
    store = stores[metric]
    file = write(tmp_path / "theirs", store.keys[:], factory, metric)
    found = FaissIndex.adopt(store, file, tmp_path / "index", nprobe=4, gpu=False)
    adopted: Any = found.sidecar.adopted
    assert adopted["file"] == "theirs" and adopted["sampled"] == 256
    assert adopted["decoded"] is None or adopted["decoded"] > 0.9
    assert found.factory.startswith("adopted Index") and found.nprobe == 4
    again = FaissIndex.open(tmp_path / "index", store, gpu=False)
    queries = store.keys[:7]
    assert torch.equal(again.search(queries, 5)[1], found.search(queries, 5)[1])
    assert again.sidecar == found.sidecar
    if factory == "Flat" and metric == "l2":
        assert found.search(queries, 1)[1][:, 0].tolist() == list(range(7))
    assert bool(undivided(tmp_path / "index", store)) == ("HNSW" in factory)  # among ranks
    with pytest.raises(IndexMismatchError, match="holds an index already"):
        FaissIndex.adopt(store, file, tmp_path / "index")
    FaissIndex.adopt(store, file, tmp_path / "index", overwrite=True, gpu=False)


@pytest.mark.parametrize("factory", ["IVF16,PQ8np", "HNSW8"])
@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            lambda keys: keys[torch.randperm(ROWS, generator=torch.Generator().manual_seed(1))],
            "order",
        ),
        (lambda keys: keys.roll(1, 0), "order"),
        (lambda keys: torch.randn(ROWS, DIM, generator=torch.Generator().manual_seed(2)), "order"),
        (lambda keys: keys[:-1], "2,999 rows"),
        (lambda keys: torch.cat([keys, keys[:4]]), "3,004 rows"),
    ],
    ids=["shuffled", "moved by one", "others", "fewer", "more"],
)
def test_what_is_not_is_refused(
    stores: dict[str, Datastore], tmp_path: Path, factory: str, change: Any, words: str
) -> None:
    store = stores["l2"]
    file = write(tmp_path / "theirs", change(store.keys[:]), factory)
    with pytest.raises(IndexMismatchError, match=words):
        FaissIndex.adopt(store, file, tmp_path / "index")
    assert not (tmp_path / "index").exists()


def test_what_is_no_index_of_the_kind_is_refused(
    stores: dict[str, Datastore], tmp_path: Path
) -> None:
    store = stores["l2"]
    with pytest.raises(IndexMismatchError, match="metric is 'ip'"):
        FaissIndex.adopt(store, write(tmp_path / "ip", store.keys[:], "Flat", "ip"))
    with pytest.raises(MissingFileError, match="no such file"):
        FaissIndex.adopt(store, tmp_path / "nothing")
    (tmp_path / "text").write_text("no index")
    with pytest.raises(IndexMismatchError, match="cannot read"):
        FaissIndex.adopt(store, tmp_path / "text")
    import faiss
    import numpy as np

    mapped = faiss.index_factory(DIM, "IDMap,Flat")
    mapped.add_with_ids(store.keys[:].float().numpy(), np.arange(ROWS)[::-1].copy())
    faiss.write_index(mapped, str(tmp_path / "mapped"))
    with pytest.raises(IndexMismatchError, match="ids of their own"):
        FaissIndex.adopt(store, tmp_path / "mapped")
    # Which finds its keys all the same, but by distances that are none of them.
    with pytest.raises(IndexMismatchError, match="differing bits"):
        FaissIndex.adopt(store, write(tmp_path / "lsh", store.keys[:], "LSH"))


def test_a_kind_that_takes_no_filter_is_taken_and_filtered(
    one_thread: None, stores: dict[str, Datastore], tmp_path: Path
) -> None:
    store = stores["l2"]
    file = write(tmp_path / "theirs", store.keys[:], "PQ8np")
    index = FaissIndex.adopt(store, file, tmp_path / "index", gpu=False)
    everything = index.search(store.keys[:5], ROWS)
    distances, indices = index.search(store.keys[:5], 9, [0])
    for q in range(5):
        kept = store.document_of(everything[1][q]) != 0
        assert torch.equal(distances[q], everything[0][q][kept][:9])
    assert (store.document_of(indices) != 0).all()


def test_an_import_takes_its_index_along(tmp_path: Path) -> None:
    """Whose rows count the zeros at the end, which the import leaves out."""
    keys = torch.cat([clustered(ROWS), torch.zeros(100, DIM).half()])
    values = torch.cat([torch.arange(1, ROWS + 1), torch.zeros(100).long()]).int()
    keys.numpy().tofile(tmp_path / f"dstore_gpt2_{ROWS + 100}_{DIM}_keys.npy")
    values.numpy().tofile(tmp_path / f"dstore_gpt2_{ROWS + 100}_{DIM}_vals.npy")
    file = write(tmp_path / "index_gpt2.indexed", keys, "IVF16,PQ8np")
    line = ["import", str(tmp_path), str(tmp_path / "s"), "--faiss-index", str(file)]
    with pytest.warns(UserWarning, match="left out 100"):
        assert main([*line, "--debug"]) == 0
    found = FaissIndex.open(None, Datastore.open(tmp_path / "s"), gpu=False)
    assert found.sidecar.adopted is not None and found.sidecar.adopted["rows_left_out"] == 100
    assert found.search(torch.zeros(1, DIM), ROWS + 100, nprobe=16)[1].max() == ROWS - 1
    file = write(tmp_path / "flat", keys[:ROWS], "Flat")
    line = ["index", str(tmp_path / "s"), "--adopt", str(file)]
    assert main(line) == 1  # there is one
    assert main([*line, "--overwrite"]) == 0
    assert main([*line, "--overwrite", "--factory", "Flat"]) == 1
