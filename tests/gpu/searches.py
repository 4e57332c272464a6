"""What the tests of the CUDA search share: data, the exact comparison, orders and machines that
put it to the test, which kernels ran."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from torch import Tensor

import knnext
from knnext import reference
from knnext.testing import assert_equal_results
from tests.gpu.runs import captured


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


ORDERS = ["near to far", "far to near", "equal", "cluster", "doubled"]


def keys_in_order(order: str) -> Tensor:
    """200,000 keys as they fill the lists of a search that expects them at random."""
    keys = integers(200_000, 16, high=20)
    by_distance = keys.float().square().sum(1).argsort(stable=True)
    if order == "near to far":
        return keys[by_distance]
    if order == "far to near":
        return keys[by_distance.flip(0)]
    if order == "equal":
        keys[:] = 3
    elif order == "cluster":
        keys[1000:190_000] = integers(1, 16)
    else:
        assert order == "doubled"
        return keys[:500].repeat(400, 1)
    return keys


def assert_replays_on_new_data(queries: Tensor, keys: Tensor, **kwargs: Any) -> None:
    """A captured search of 90 neighbors, replayed on other small integers in the same places."""

    def run() -> tuple[Tensor, Tensor]:
        return knnext.knn_search(queries, keys, 90, **kwargs)

    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        run()
    side.synchronize()
    graph, got = captured(run)
    for _ in range(3):
        queries.copy_(integers(*queries.shape))
        keys.copy_(integers(*keys.shape))
        graph.replay()
        want = reference.knn_search(queries, keys, 90, compute_dtype=torch.float64)
        assert_equal_results(got, want)


def assert_late_keys_are_waited_for() -> None:
    """On a side stream whose keys arrive long after the call."""
    queries, keys = integers(64, 64), integers(50_000, 64)
    want = knnext.knn_search(queries, keys, 100)
    torch.cuda.synchronize()
    for _ in range(5):
        side = torch.cuda.Stream()
        with torch.cuda.stream(side):
            late = torch.zeros_like(keys)
            torch.cuda._sleep(20_000_000)
            late.copy_(keys)
            got = knnext.knn_search(queries, late, 100)
        side.synchronize()
        assert_equal_results(got, want)


def needs_hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    """Skips elsewhere; lets Hopper's own kernels run however few the keys."""
    from knnext._host import build_info

    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("needs compute capability 9.0")
    if "9.0a" not in build_info()["cuda_archs"]:
        pytest.skip("the build has no code for 9.0a")
    monkeypatch.setenv("KNNEXT_SM90", "all")


def assert_runs_where_the_plan_says(
    kernel: str, cases: Iterable[tuple[str, int, int, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Cases of KNNEXT_SM90, queries, keys and dim."""
    from knnext._host import SearchPlan

    for switch, q, n, dim in cases:
        monkeypatch.setenv("KNNEXT_SM90", switch)
        plan = SearchPlan(queries=q, entries=n, dim=dim, k=50, capability=(9, 0), num_units=132)
        queries, keys = integers(q, dim), integers(n, dim)
        names = kernels_of(lambda q=queries, x=keys: knnext.knn_search(q, x, 50))
        ran = any(f"{kernel}_kernel" in name for name in names)
        assert ran == (plan.kernel == f"cuda_{kernel}"), (switch, q, n, dim, plan.kernel, names)
