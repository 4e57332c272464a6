"""Datastores that several tests of FaissIndex search, and FAISS on one thread."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from knnext.datastore import Datastore
from tests.index.stores import ROWS, clustered, make_datastore


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """FAISS's threads wait by spinning: on a busy machine two take many times as long as one."""
    faiss = pytest.importorskip("faiss")
    before = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(1)
    yield
    faiss.omp_set_num_threads(before)


@pytest.fixture(scope="module")
def stores(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Datastore]:
    folder = tmp_path_factory.mktemp("stores")
    return {m: make_datastore(folder / m, clustered(ROWS), m) for m in ("l2", "ip")}
