"""Shared by the benchmarks: group = op and shape, implementation = parameter, so that peers stand
on adjacent lines.

    make bench                                  # the shapes that matter most, on what is there
    pytest benchmarks --full                    # every shape
    pytest benchmarks -k 'knn_search and cpu' --benchmark-json=benchmarks/out/cpu.json

A module offers SHAPES (dataclasses with a `full` field) and IMPLEMENTATIONS (name -> function of
the data that prepares and returns what is timed, or calls `pytest.skip` with the reason). Each
result is checked once before it is timed.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import pytest
import torch

DEVICES = ("cpu", "cuda")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--full", action="store_true", help="also the shapes that take long")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    full = metafunc.config.getoption("--full")
    if "shape" in metafunc.fixturenames:
        shapes = [s for s in metafunc.module.SHAPES if full or not s.full]
        metafunc.parametrize("shape", shapes, ids=str, scope="module")
    if "device" in metafunc.fixturenames:
        metafunc.parametrize("device", DEVICES, scope="module")
    if "implementation" in metafunc.fixturenames:
        metafunc.parametrize("implementation", metafunc.module.IMPLEMENTATIONS)


@pytest.fixture(autouse=True)
def _device_is_there(request: pytest.FixtureRequest) -> None:
    wanted = request.node.callspec.params.get("device") if hasattr(request.node, "callspec") else ""
    if wanted == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")


def _median_seconds(run: Callable[[], Any], repeats: int = 5) -> float:
    run()
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - start)
    return sorted(seconds)[repeats // 2]


@pytest.fixture(scope="session")
def limits() -> dict[str, dict[str, float]]:
    """What each device does at its best, measured here: GFLOP/s of torch.mm, GB/s of a read."""
    return {d: _limits(d) for d in DEVICES if d == "cpu" or torch.cuda.is_available()}


def _limits(device: str) -> dict[str, float]:
    n = 2048 if device == "cpu" else 8192
    a = torch.randn(n, n, device=device, dtype=torch.float32 if device == "cpu" else torch.float16)
    big = torch.zeros((256 << 20) // 4, device=device)

    def finished(run: Callable[[], Any]) -> Callable[[], None]:
        def wait() -> None:
            run()
            if device == "cuda":
                torch.cuda.synchronize()

        return wait

    return {
        "gflops": 2e-9 * n**3 / _median_seconds(finished(lambda: a @ a)),
        "gbps": 1e-9 * big.nbytes / _median_seconds(finished(big.sum)),
    }


@pytest.fixture
def measure(benchmark: Any, limits: dict[str, dict[str, float]]) -> Callable[..., None]:
    """Times `run`; writes work and bytes, rates, and the share of the nearer limit beside it."""

    def _measure(
        run: Callable[[], Any],
        *,
        group: str,
        device: str,
        flop: float = 0.0,
        bytes_moved: float = 0.0,
        rounds: int = 7,
        **facts: Any,
    ) -> None:
        def finished() -> None:
            run()
            if device == "cuda":
                torch.cuda.synchronize()

        benchmark.group = group
        benchmark.pedantic(finished, rounds=rounds, iterations=1, warmup_rounds=1)
        if benchmark.disabled:  # --benchmark-disable: run and checked, not timed
            return
        median = benchmark.stats.stats.median
        limit = limits[device]
        least = max(1e-9 * flop / limit["gflops"], 1e-9 * bytes_moved / limit["gbps"])
        benchmark.extra_info.update(
            facts,
            threads=torch.get_num_threads(),
            gflops=1e-9 * flop / median,
            gbps=1e-9 * bytes_moved / median,
            share_of_limit=least / median,
            limit_gflops=limit["gflops"],
            limit_gbps=limit["gbps"],
        )

    return _measure
