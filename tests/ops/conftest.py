"""The library of code_bounds.py, built once for all who ask it."""

from __future__ import annotations

import ctypes

import pytest

from tests.ops import code_bounds


@pytest.fixture(scope="package")
def objects(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return code_bounds.compiled_all(tmp_path_factory.mktemp("codes"))


@pytest.fixture(scope="package")
def library(objects: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    return code_bounds.linked(objects, tmp_path_factory.mktemp("linked") / "codes.so")
