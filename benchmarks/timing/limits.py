"""What a device does at its best, measured in the same run: the limits that ops are held against.

- copy: device-to-device copy of a buffer, bytes read plus bytes written.
- read: a reduction over a buffer many times the size of the last-level cache; the fastest of
  several reductions counts (`read_by` names it), since torch's sums are not all at the limit.
- product: a square matrix product, large enough to be bound by arithmetic, in the op's own dtype
  on a GPU and in float32 on a CPU, whose half-precision products torch converts.

Buffers hold random data: zeros draw less power, and a GPU then runs faster than in earnest.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from functools import cache
from typing import Any

import torch

from benchmarks.timing.gpu import GpuSampler

CPU_BYTES, GPU_BYTES = 256 << 20, 4 << 30
CPU_PRODUCT, GPU_PRODUCT = 2048, 8192


def seconds_of(run: Callable[[], Any], device: str, repeats: int = 5) -> float:
    """Median seconds of a call: the device's on a GPU, the host's on a CPU."""
    if device == "cuda":
        return GpuSampler([run]).prepare().seconds(max(repeats, 7))
    run()
    samples = []
    for _ in range(repeats):
        start = time.perf_counter()
        run()
        samples.append(time.perf_counter() - start)
    return statistics.median(samples)


@cache
def copy_gbps(device: str) -> float:
    source = _buffer(device)
    target = torch.empty_like(source)
    return 2e-9 * source.nbytes / seconds_of(lambda: target.copy_(source), device)


@cache
def read_limit(device: str) -> tuple[float, str]:
    """(GB/s, the reduction that reached it)."""
    buffer = _buffer(device)
    matrix = buffer.view(-1, 8192)
    vector = torch.randn(8192, device=device)
    reductions: dict[str, Callable[[], Any]] = {
        "sum": buffer.sum,
        "amax": buffer.amax,
        "matrix-vector product": lambda: matrix @ vector,
    }
    rates = {
        name: 1e-9 * buffer.nbytes / seconds_of(run, device) for name, run in reductions.items()
    }
    best = max(rates, key=rates.__getitem__)
    return rates[best], best


@cache
def product_tflops(device: str, dtype: torch.dtype) -> float:
    n = CPU_PRODUCT if device == "cpu" else GPU_PRODUCT
    a = torch.randn(n, n, device=device).to(torch.float32 if device == "cpu" else dtype)
    return 2e-12 * n**3 / seconds_of(lambda: a @ a, device)


@cache
def as_facts(device: str, dtype: torch.dtype) -> dict[str, Any]:
    read, by = read_limit(device)
    return {
        "limit_copy_gbps": copy_gbps(device),
        "limit_read_gbps": read,
        "limit_read_by": by,
        "limit_tflops": product_tflops(device, dtype),
    }


def _buffer(device: str) -> torch.Tensor:
    """float32, a multiple of 8192 values; less than the whole where the memory is small."""
    size = CPU_BYTES
    if device == "cuda":
        size = min(GPU_BYTES, torch.cuda.mem_get_info()[0] // 8)
    return torch.rand(size // 4 // 8192 * 8192, device=device)
