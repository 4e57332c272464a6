from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.explore import small


@pytest.fixture(scope="package")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("explore")
    small.make(folder)
    return folder


@pytest.fixture(scope="package")
def session(folder: Path) -> Any:
    return small.open_session(folder)
