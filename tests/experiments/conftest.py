"""One laboratory of the tiny preset for all tests of a session: its artifacts are made once.

A whole run of an experiment in it, which tests take as `result`, is slow.
"""

from __future__ import annotations

import pytest

from knnext.experiments.lab import Lab
from knnext.experiments.lab.presets import TINY


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if "tiny_lab" in (names := getattr(item, "fixturenames", ())) and "result" in names:
            item.add_marker(pytest.mark.slow)


@pytest.fixture(scope="session")
def tiny_lab(tmp_path_factory: pytest.TempPathFactory) -> Lab:
    pytest.importorskip("transformers", reason="needs knnext[lm]")
    pytest.importorskip("faiss", reason="needs knnext[faiss]")
    return Lab(TINY, tmp_path_factory.mktemp("lab"), say=lambda _line: None)
