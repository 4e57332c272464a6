"""cuVS brute force: the index keeps norms, the search writes distances tile by tile and selects."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch

from benchmarks.data.search import Data, Result

HINT = (
    "pip install cuvs-cu13==26.6.* rmm-cu13==26.6.* beside a torch for CUDA 13.0, which newer ones "
    "do not go with, or their cu12 fellows"
)


def brute_force(data: Data) -> Callable[[], Result]:
    module = _load()
    if data.keys.dtype == torch.bfloat16:
        pytest.skip("cuVS brute force takes float16 and float32")
    resources = _resources(torch.cuda.current_stream().cuda_stream)
    index = module.build(data.keys, metric="sqeuclidean", resources=resources)
    resources.sync()
    shape = (data.shape.queries, data.k)

    def run() -> Result:
        distances = torch.empty(shape, device=data.device)
        indices = torch.empty(shape, dtype=torch.int64, device=data.device)
        module.search(
            index, data.queries, data.k, neighbors=indices, distances=distances, resources=resources
        )
        return distances, indices

    return run


def _load() -> Any:
    """The module, with memory from a pool: its tiles would otherwise be allocated at each call."""
    try:
        import rmm.mr
        from cuvs.neighbors import brute_force
    except ImportError as error:  # also where a library that it wants is missing or too old
        pytest.skip(f"cuVS is not to be had ({error}): {HINT}")
    _use_pool(rmm.mr)
    return brute_force


@cache
def _use_pool(memory: Any) -> None:
    memory.set_current_device_resource(memory.CudaAsyncMemoryResource())


def _resources(stream: int) -> Any:
    """On this stream. `Resources(stream=...)` would take the address of the Python integer for the
    handle, in 26.06 and 26.10 (NVIDIA/cuvs#1863), so it is told through cuVS's C interface.
    """
    from cuvs.common import Resources

    resources = Resources()
    library = ctypes.CDLL("libcuvs_c.so")  # the import has loaded it
    library.cuvsStreamSet.argtypes = [ctypes.c_size_t, ctypes.c_void_p]
    if library.cuvsStreamSet(resources.get_c_obj(), stream) != 1:
        raise RuntimeError("cuVS did not take the stream")
    return resources
