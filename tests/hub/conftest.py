"""A hub for the tests of one file, and the real client pointed to it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from knnext.datastore import Datastore
from tests.datastore import small
from tests.hub.server import TOKEN, Hub, running
from tests.hub.stored import FIT, joined

hub_package = pytest.importorskip("huggingface_hub")


@pytest.fixture(scope="module")
def server() -> Iterator[Hub]:
    with running() as hub:
        yield hub


@pytest.fixture
def hub(server: Hub, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Hub:
    """Empty, and with a token that it knows."""
    from huggingface_hub import constants

    server.repos, server.blobs, server.log = {}, {}, []
    server.fault = lambda method, path: None
    monkeypatch.setenv("HF_ENDPOINT", server.url)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_PROGRESS_BARS", True)
    monkeypatch.setattr(constants, "HF_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "home" / "hub"))
    return server


@pytest.fixture(scope="session")
def stores(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Datastore]:
    """One of three shards with all that may lie beside it, and one of parts. Read only."""
    folder = tmp_path_factory.mktemp("stores")
    small.write(folder / "S", 40)
    store = Datastore.open(folder / "S")
    from knnext.index import FaissIndex, StoredCodes

    StoredCodes.build(store)
    pytest.importorskip("faiss")
    FaissIndex.build(store, factory="Flat")
    (folder / "S.tuning.json").write_text(json.dumps(FIT))
    return {"plain": store, "parts": joined(folder / "P")}
