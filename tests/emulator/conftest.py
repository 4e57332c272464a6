"""A kernel's threads run one by one here: of a test's cases the first is quick, the others slow.

What the first case alone takes a second for bears the mark itself.
"""

from __future__ import annotations

from pathlib import Path

import pytest


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    met = set()
    for item in items:
        if item.path.parent != Path(__file__).parent:
            continue
        test = item.nodeid.partition("[")[0]
        if test in met:
            item.add_marker(pytest.mark.slow)
        met.add(test)
