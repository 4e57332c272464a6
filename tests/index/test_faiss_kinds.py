"""Factories: what FAISS makes but cannot search is refused before the work, the rest answers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from knnext.datastore import Datastore
from knnext.index import FaissIndex, faiss_build, faiss_library
from tests.index.stores import clustered, make_datastore

faiss = pytest.importorskip("faiss")

ROWS = 1200

#: Kinds that take no search parameters, or no filter, or want many rows.
ODD = ["RQ2x4", "PRQ2x2x4", "IVF16,RQ2x4", "PQ8x4fs", "IVF16,PQ8x4fs", "L2norm,Flat", "RaBitQ"]
ODD += ["PQ8", "IVF16,PQ4+4", "Flat,RFlat"]


@pytest.fixture(scope="module")
def stores(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Datastore]:
    folder = tmp_path_factory.mktemp("stores")
    return {m: make_datastore(folder / m, clustered(ROWS), m) for m in ("l2", "ip")}


@pytest.mark.parametrize(
    ("factory", "metric", "named"),
    [
        ("LSH", "l2", "differing bits"),
        ("LSHrt", "l2", "differing bits"),
        ("ITQ,LSH", "l2", "differing bits"),
        ("PCA16,LSH", "l2", "differing bits"),
        ("LSH", "ip", "metric"),
        ("IDMap,Flat", "l2", "ids of its own"),
        ("IDMap2,SQ8", "ip", "ids of its own"),
        ("ZnLattice4x10_6", "l2", "cannot read"),
        ("HNSW8,PQ8x4", "ip", "searches it by 'l2'"),
        ("NoSuchThing", "l2", "could not parse"),
    ],
)
def test_refused_before_the_build(
    stores: dict[str, Datastore], tmp_path: Path, factory: str, metric: str, named: str
) -> None:
    with pytest.raises(ValueError, match=named) as caught:
        FaissIndex.build(stores[metric], tmp_path / "ix", factory)
    assert repr(factory) in str(caught.value) and not (tmp_path / "ix").exists()


def test_an_unsearchable_kind_is_refused_before_the_rows_are_added(
    stores: dict[str, Datastore], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that nobody here knows of; another factory may be tried in the folder after it."""
    monkeypatch.setattr(faiss_library, "check_kind", lambda *_: None)
    monkeypatch.setattr(faiss_build, "add_segment", None)  # a call would fail
    for factory in ("IDMap,Flat", "ZnLattice4x10_6"):
        with pytest.raises(ValueError, match=f"{factory!r} cannot be searched"):
            FaissIndex.build(stores["l2"], tmp_path / "ix", factory)
    assert [p.name for p in (tmp_path / "ix").iterdir()] == [".lock"]


def test_too_few_rows_to_train_are_named(tmp_path: Path) -> None:
    store = make_datastore(tmp_path / "s", clustered(100))
    with pytest.raises(ValueError, match=r"100 rows of dim 32 cannot train .*'PQ8'"):
        FaissIndex.build(store, tmp_path / "ix", "PQ8")


@pytest.mark.parametrize("factory", ODD)
def test_odd_kinds_answer_also_without_a_document(
    stores: dict[str, Datastore], tmp_path: Path, factory: str
) -> None:
    store = stores["l2"]
    index = FaissIndex.build(store, tmp_path / "ix", factory, gpu=False)
    queries = store.keys[0:40].float() + 0.01
    _, indices = index.search(queries, 10, nprobe=16)
    assert ((indices >= 0) & (indices < ROWS)).all()
    assert (indices == torch.arange(40)[:, None]).any(1).float().mean() > 0.8
    _, others = index.search(queries, 10, [0], nprobe=16)  # document 0: rows 0 to 199
    assert (others >= 200).all()


def test_packed_codes_are_not_decoded(stores: dict[str, Datastore], tmp_path: Path) -> None:
    index = FaissIndex.build(stores["l2"], tmp_path / "ix", "IVF16,PQ8x4fs", gpu=False)
    with pytest.raises(ValueError, match="cannot be decoded"):
        index.decode(torch.tensor([1]))
