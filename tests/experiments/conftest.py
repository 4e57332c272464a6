"""One laboratory of the tiny preset for all tests of a session: its artifacts are made once."""

from __future__ import annotations

import pytest

from knnext.experiments.lab import Lab
from knnext.experiments.lab.presets import TINY


@pytest.fixture(scope="session")
def tiny_lab(tmp_path_factory: pytest.TempPathFactory) -> Lab:
    pytest.importorskip("transformers", reason="needs knnext[lm]")
    pytest.importorskip("faiss", reason="needs knnext[faiss]")
    return Lab(TINY, tmp_path_factory.mktemp("lab"), say=lambda _line: None)
