"""Markers `gpu` and `multi_gpu`: skipped without the devices. KNNEXT_REQUIRE_GPU says how many
there must be: with 1, no test of one device is skipped, and with 2, none of two.
"""

from __future__ import annotations

import os

import pytest
import torch

NEEDED = {"gpu": 1, "multi_gpu": 2}


def pytest_runtest_setup(item: pytest.Item) -> None:
    needed = max((n for name, n in NEEDED.items() if item.get_closest_marker(name)), default=0)
    found = torch.cuda.device_count()
    if found >= needed:
        return
    reason = f"needs {needed} CUDA device(s), found {found}"
    required = int(os.environ.get("KNNEXT_REQUIRE_GPU") or 0)
    if found < min(needed, required):
        pytest.fail(f"{reason}, and KNNEXT_REQUIRE_GPU={required}", pytrace=False)
    pytest.skip(reason)


@pytest.fixture(autouse=True)
def _seed() -> None:
    """Each test draws the same numbers, alone or in the whole run."""
    torch.manual_seed(0)
