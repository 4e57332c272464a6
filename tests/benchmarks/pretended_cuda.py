"""A pytest plugin that lets the benchmarks take a CPU for a GPU: their CUDA branches run anywhere.

Tensors asked for on "cuda" lie on the CPU; events, graphs, streams and memory figures are made up;
of FAISS's GPU interface and of cuVS there is as much as the benchmarks call. Every pair of events
is half a millisecond apart, so the times are known, say nothing, and do not depend on the machine;
neither does how much is run.

    pytest -p tests.benchmarks.pretended_cuda benchmarks
"""

from __future__ import annotations

import ctypes
import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType, SimpleNamespace
from typing import Any

import faiss
import faiss.contrib.torch_utils  # tensors for arrays, as on a GPU
import pytest
import torch
from torch.overrides import TorchFunctionMode

MILLISECONDS_APART = 0.5  # below a millisecond, so that what can be captured is
L2_BYTES = 1 << 18
STREAM = 7


class OnCpu(TorchFunctionMode):
    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = {name: _cpu(value) for name, value in (kwargs or {}).items()}
        if func is torch.mm and "out_dtype" in kwargs:  # CUDA alone has it
            dtype = kwargs.pop("out_dtype")
            args = tuple(matrix.to(dtype) for matrix in args)
        return func(*map(_cpu, args), **kwargs)


def _cpu(value: Any) -> Any:
    return "cpu" if isinstance(value, str) and value == "cuda" else value


class Generator(torch.Generator):
    def __new__(cls, device: str = "cpu") -> Generator:
        return super().__new__(cls, _cpu(device))


class Event:
    def __init__(self, enable_timing: bool) -> None:
        assert enable_timing, "an event without timing cannot be asked for the time"

    def record(self) -> None:
        pass

    def synchronize(self) -> None:
        pass

    def elapsed_time(self, end: Event) -> float:
        return MILLISECONDS_APART


class CUDAGraph:
    captured = replayed = 0

    def replay(self) -> None:
        CUDAGraph.replayed += 1


@contextmanager
def graph(target: CUDAGraph) -> Iterator[None]:
    yield
    CUDAGraph.captured += 1


class ClonerOptions:
    """As much as is set; SWIG's class takes any other name too and does nothing with it."""

    __slots__ = ("useFloat16",)


class FlatConfig:
    __slots__ = ("useFloat16",)


class Flat:
    """GpuIndexFlatL2: takes float32 queries only, as the real one does through this interface."""

    def __init__(self, resources: Any, dim: int, config: Any) -> None:
        self.index = faiss.IndexFlatL2(dim)
        self.add = self.index.add

    def search(self, queries: torch.Tensor, k: int) -> Any:
        assert queries.dtype == torch.float32
        return self.index.search(queries, k)


class Resources:
    def getDefaultStream(self, device: int) -> int:
        return STREAM


def knn_gpu(resources: Any, queries: torch.Tensor, keys: torch.Tensor, k: int) -> Any:
    assert queries.dtype == keys.dtype
    return tuple(map(torch.from_numpy, faiss.knn(queries.float().numpy(), keys.float().numpy(), k)))


class CuvsResources:
    """Takes no stream: the real one would take the address of a number for it."""

    def get_c_obj(self) -> int:
        return 11

    def sync(self) -> None:
        pass


def set_stream(resources: int, stream: int) -> int:
    return int((resources, stream) == (11, STREAM))  # 1 is success


CuvsLibrary = SimpleNamespace(cuvsStreamSet=set_stream)


def cuvs_search(
    index: Any, queries: Any, k: int, *, neighbors: Any, distances: Any, resources: Any
):
    found = knn_gpu(resources, queries, index, k)
    distances.copy_(found[0])
    neighbors.copy_(found[1])


def _pretend_torch() -> None:
    torch.Generator = Generator  # type: ignore[misc]
    torch.compile = lambda step, **_: step  # type: ignore[assignment]
    torch.compiler.reset = lambda: None  # it would load the compiler to do so
    stream = SimpleNamespace(cuda_stream=STREAM)
    made_up = {
        "is_available": lambda: True,
        "get_device_properties": lambda _: SimpleNamespace(L2_cache_size=L2_BYTES),
        "get_device_name": lambda *_: "a pretended GPU",
        "mem_get_info": lambda *_: (40 << 30, 80 << 30),
        "memory_reserved": lambda *_: 0,
        "memory_allocated": lambda *_: 1000,
        "max_memory_allocated": lambda *_: 1234,
        "current_stream": lambda *_: stream,
        "current_device": lambda: 0,
        "Stream": lambda *_: stream,
        "Event": Event,
        "CUDAGraph": CUDAGraph,
        "graph": graph,
    }
    nothing = ("set_stream", "synchronize", "empty_cache", "reset_peak_memory_stats")
    for name, value in (made_up | dict.fromkeys(nothing, lambda *_: None)).items():
        setattr(torch.cuda, name, value)
    OnCpu().__enter__()


def _pretend_rivals() -> None:
    faiss.StandardGpuResources = Resources
    faiss.GpuClonerOptions, faiss.GpuIndexFlatConfig = ClonerOptions, FlatConfig
    faiss.get_num_gpus = lambda: 1
    faiss.GpuIndexFlatL2, faiss.knn_gpu = Flat, knn_gpu
    faiss.index_cpu_to_gpu = lambda resources, device, index, options: index
    names = ("cuvs", "cuvs.neighbors", "cuvs.neighbors.brute_force", "cuvs.common", "rmm", "rmm.mr")
    for name in names:
        sys.modules[name] = ModuleType(name)
    for name in names:
        package, _, attribute = name.rpartition(".")
        if package:
            setattr(sys.modules[package], attribute, sys.modules[name])
    memory = sys.modules["rmm.mr"]
    memory.CudaAsyncMemoryResource = object  # type: ignore[attr-defined]
    memory.set_current_device_resource = lambda resource: None  # type: ignore[attr-defined]
    force = sys.modules["cuvs.neighbors.brute_force"]
    force.build = lambda keys, metric, resources: keys  # type: ignore[attr-defined]
    force.search = cuvs_search  # type: ignore[attr-defined]
    common = sys.modules["cuvs.common"]
    common.Resources = CuvsResources  # type: ignore[attr-defined]
    open_library = ctypes.CDLL
    ctypes.CDLL = lambda name, *args, **options: (  # type: ignore[assignment,misc]
        CuvsLibrary if name == "libcuvs_c.so" else open_library(name, *args, **options)
    )


_pretend_torch()
_pretend_rivals()


@pytest.hookimpl(tryfirst=True)
def pytest_configure() -> None:
    """Small shapes under the name of the short list, and limits that take no time."""
    from benchmarks.data import cases
    from benchmarks.timing import gpu, limits

    cases.profile = lambda device, full, smoke: "smoke"
    gpu.WARM_UP_SECONDS = 1e-3 * MILLISECONDS_APART
    gpu.MEASURED_SECONDS = 0.0  # the fewest rounds
    gpu.spin_up = lambda: None
    limits.GPU_BYTES, limits.GPU_PRODUCT, limits.CPU_BYTES = 1 << 20, 64, 1 << 20


def pytest_collection_finish() -> None:
    """What was imported needs no look at each of the benchmarks' collections."""
    gc.freeze()
