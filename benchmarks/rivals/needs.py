"""Rivals are optional: what is not installed is skipped, with a word on what to install."""

from __future__ import annotations

from importlib import import_module
from typing import Any

import pytest


def load(module: str, package: str) -> Any:
    """The imported module, or a skip that names the package it comes from."""
    try:
        return import_module(module)
    except (ImportError, RuntimeError, OSError) as error:  # not there, or it does not load here
        pytest.skip(f"{package} is not installed ({error}): pip install {package}")
