"""What the tests of the CUDA search share: data, the exact comparison, which kernels ran."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import knnext
from knnext import reference
from knnext.testing import assert_equal_results


def integers(*size: int, dtype: torch.dtype = torch.float16, high: int = 4) -> Tensor:
    return torch.randint(-high, high + 1, size, device="cuda").to(dtype)


def gaussian(*size: int, dtype: torch.dtype = torch.float16) -> Tensor:
    return torch.randn(size, device="cuda").to(dtype)


def assert_exact(queries: Tensor, keys: Tensor, k: int, metric: str = "l2", **kwargs: Any) -> None:
    got = knnext.knn_search(queries, keys, k, metric, **kwargs)
    want = reference.knn_search(queries, keys, k, metric, compute_dtype=torch.float64, **kwargs)
    assert_equal_results(got, want)


def kernels_of(run: Callable[[], Any]) -> set[str]:
    """Names of the CUDA kernels that a call launches."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as seen:
        run()
        torch.cuda.synchronize()
    return {event.key for event in seen.key_averages()}
