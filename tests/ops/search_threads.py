"""A few queries are swept over the keys as they lie. Where many are searched, the threads share
packed keys; the plan does so only where lists for each thread would take much memory, which with
few threads takes thousands of queries."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

SWEPT, FEW, MANY = 3, 20, 150


@pytest.fixture(autouse=True)
def threads_that_share(request: pytest.FixtureRequest) -> Iterator[None]:
    callspec = getattr(request.node, "callspec", None)
    if callspec is None or callspec.params.get("num_queries") != MANY:
        yield
        return
    before = torch.get_num_threads()
    torch.set_num_threads(24)
    yield
    torch.set_num_threads(before)
