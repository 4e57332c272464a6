"""FAISS: flat and IVF-PQ, on the CPU and on the GPU; scalar quantizers on the CPU.

On the GPU flat search goes both ways that users take: `knn_gpu` on tensors as they are, and
`GpuIndexFlat`, which holds a copy of the keys and their norms. Each in every dtype that it has:
FAISS's float16 product runs without tensor cores on some versions, so the best of its dtypes is the
rival. Approximate are IVF-PQ and the quantizer of eight bits; beside their time stands their
recall. The quantizer of float16 is exact on float16 keys, which it keeps as they are.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.data.search import Data, Result, require_memory
from knnext.index.faiss_build import default_factory

GPU_MAX_K = 2048
NPROBE = 32  # the paper's number
TRAINED_ROWS = 1 << 18
ADDED_ROWS = 1 << 18
Run = Callable[[], Result]


def load(device: str) -> ModuleType:
    """The faiss module with what `device` needs, or a skip that says what to install."""
    try:
        import faiss
    except (ImportError, RuntimeError) as error:  # not there, or its libraries do not load
        pytest.skip(f"no FAISS ({error}): pip install faiss-cpu, or faiss-gpu")
    if device == "cpu":
        return faiss
    if not hasattr(faiss, "StandardGpuResources"):
        pytest.skip("this FAISS was built for the CPU: pip install faiss-gpu in its place")
    if faiss.get_num_gpus() == 0:
        pytest.skip("this FAISS sees no GPU: its CUDA libraries do not load beside this driver")
    import faiss.contrib.torch_utils  # tensors for arrays, and torch's stream

    return faiss


@cache
def _resources() -> Any:
    import faiss

    resources = faiss.StandardGpuResources()
    # It takes its memory at first use; one that failed there must not be used again.
    resources.getDefaultStream(torch.cuda.current_device())
    return resources


def warm_up() -> None:
    """Takes the memory that FAISS keeps for all its searches, so that none is charged with it."""
    load("cuda")
    _resources()


def _refuse_large_k(data: Data) -> None:
    if data.k > GPU_MAX_K:
        pytest.skip(f"FAISS on the GPU ends at k = {GPU_MAX_K}")


def flat(data: Data) -> Run:
    """IndexFlatL2 on the same vectors in float32: twice the memory of half-precision keys."""
    return _on_cpu(data, "faiss_flat", 4, lambda faiss, dim: faiss.IndexFlatL2(dim))


def quantizer(name: str, bytes_a_value: int) -> Callable[[Data], Run]:
    """IndexScalarQuantizer: QT_fp16, or QT_8bit with a range for each dimension."""

    def make(faiss: ModuleType, dim: int) -> Any:
        kind = getattr(faiss.ScalarQuantizer, name)
        return faiss.IndexScalarQuantizer(dim, kind, faiss.METRIC_L2)

    return lambda data: _on_cpu(data, f"faiss_{name}", bytes_a_value, make)


def _on_cpu(data: Data, name: str, size: int, make: Callable[[ModuleType, int], Any]) -> Run:
    faiss = load("cpu")
    faiss.omp_set_num_threads(torch.get_num_threads())

    def build() -> Any:
        require_memory(size * data.keys.numel(), "cpu", "the index")
        index = make(faiss, data.shape.dim)
        if not index.is_trained:
            index.train(_spread_rows(data.keys).numpy())
        _add(index, data.keys)
        return index

    index = data.key_set.kept(name, build)
    queries = data.queries.float().numpy()
    return lambda: _as_tensors(index.search(queries, data.k))


def _spread_rows(keys: Tensor) -> Tensor:
    """Rows to train on, in float32."""
    step = max(1, len(keys) // TRAINED_ROWS)
    return keys[::step][:TRAINED_ROWS].float().contiguous()


def _as_tensors(result: tuple[Any, Any]) -> Result:
    distances, indices = map(torch.as_tensor, result)
    return distances, indices


def knn_gpu(dtype: torch.dtype) -> Callable[[Data], Run]:
    """`faiss.knn_gpu` on keys of this dtype; nothing is kept between calls."""

    def prepare(data: Data) -> Run:
        _refuse_large_k(data)
        faiss = load("cuda")
        if data.keys.dtype != dtype:
            require_memory(dtype.itemsize * data.keys.numel() + (4 << 30), "cuda", "the keys")
        queries, keys = data.queries.to(dtype), data.keys.to(dtype)
        return lambda: faiss.knn_gpu(_resources(), queries, keys, data.k)

    return prepare


def gpu_flat(dtype: torch.dtype) -> Callable[[Data], Run]:
    """`GpuIndexFlatL2` in float16 or float32. Queries are float32, as its interface wants them."""

    def prepare(data: Data) -> Run:
        _refuse_large_k(data)
        faiss = load("cuda")
        # While it grows, the old and the new array stand side by side.
        size = 9 * dtype.itemsize * data.keys.numel() // 4 + (6 << 30)
        require_memory(size, "cuda", "the index")
        config = faiss.GpuIndexFlatConfig()
        config.useFloat16 = dtype == torch.float16
        index = faiss.GpuIndexFlatL2(_resources(), data.shape.dim, config)
        _add(index, data.keys)
        queries = data.queries.float()
        return lambda: index.search(queries, data.k)

    return prepare


def _add(index: Any, keys: Tensor) -> None:
    for part in keys.split(ADDED_ROWS):
        rows = part.float()
        index.add(rows if rows.is_cuda else rows.numpy())


def ivfpq(data: Data) -> Run:
    """IVF-PQ of the size that `knnext index` builds, 32 lists probed."""
    faiss = load(data.device)
    if data.device == "cuda":
        _refuse_large_k(data)
    index = _trained(data)
    faiss.omp_set_num_threads(torch.get_num_threads())
    queries = data.queries.float()
    given = queries if data.device == "cuda" else queries.numpy()
    return lambda: _as_tensors(index.search(given, data.k))


def _trained(data: Data) -> Any:
    """Built once for all shapes over the same keys."""
    built = data.key_set.derived
    if "ivfpq" not in built:
        built["ivfpq"] = _train(data.keys, data.device)
    return built["ivfpq"]


def _train(keys: Tensor, device: str) -> Any:
    import faiss

    factory = default_factory(*keys.shape)
    if "PQ" not in factory:
        pytest.skip(f"for {len(keys)} keys of {keys.shape[1]} the index would be {factory}")
    index = faiss.index_factory(keys.shape[1], factory)
    index.do_polysemous_training = False  # for Hamming filters, unused; takes most of the time
    if device == "cuda":
        index = _to_gpu(faiss, index)
    picked = _spread_rows(keys)
    index.train(picked if device == "cuda" else picked.numpy())
    _add(index, keys)
    index.nprobe = NPROBE
    return index


def _to_gpu(faiss: ModuleType, index: Any) -> Any:
    options = faiss.GpuClonerOptions()
    options.useFloat16 = True  # of an IVF-PQ the lookup tables: 64 bytes fit shared memory only so
    try:
        return faiss.index_cpu_to_gpu(_resources(), 0, index, options)
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[-1]
        pytest.skip(f"FAISS on the GPU has no such index: {reason}")
