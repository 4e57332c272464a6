"""knn_search against torch, FAISS, SVS, usearch, ScaNN and cuVS, and the bare product.

On a CPU each row is timed in turns with `knnext`, round by round, at the same number of threads:
what else the machine does meanwhile slows both.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch

import knnext
from benchmarks.data.cases import Implementation
from benchmarks.data.search import Data, Result, assert_exact, make_data, recall
from benchmarks.data.search_shapes import SHAPES, Shape
from benchmarks.rivals import chunked, cuvs, faiss, scann, svs, usearch
from benchmarks.timing.limits import seconds_of
from benchmarks.timing.measure import Measure, Memory, Work

__all__ = ["SHAPES"]

HALF, BRAIN, SINGLE = torch.float16, torch.bfloat16, torch.float32
CPU, CUDA = ("cpu",), ("cuda",)
Run = Callable[[], Result | None]
LEAST_RECALL = 0.999


def search(data: Data) -> Callable[[], Result]:
    return lambda: knnext.knn_search(data.queries, data.keys, data.k)


def search_with_sqnorms(data: Data) -> Callable[[], Result]:
    """Norms given, as a datastore's user would: they are computed once, not at each call."""
    return lambda: knnext.knn_search(data.queries, data.keys, data.k, key_sqnorms=data.sqnorms)


def search_with_codes(data: Data) -> Callable[[], Result]:
    """Codes and norms given, as a datastore has them: made once, not at each call."""
    codes = data.key_set.kept("codes", lambda: knnext.encode_keys(data.keys))
    given = {"key_sqnorms": data.sqnorms, "codes": codes}
    return lambda: knnext.knn_search(data.queries, data.keys, data.k, **given)


def _cuvs(prepare: Callable[[Data], Callable[[], Result]]) -> Implementation:
    return Implementation(prepare, exact=False, own_memory=True, devices=CUDA)


def _faiss_gpu(prepare: Callable[[Data], Callable[[], Result]]) -> Implementation:
    return replace(_cuvs(prepare), warm_up=faiss.warm_up)


def _torch(prepare: Callable[[Data], Callable[[], Result]]) -> Implementation:
    return Implementation(prepare, exact=False, capturable=True)


def _exact_on_cpu(
    prepare: Callable[[Data], Callable[[], Result]], *dtypes: torch.dtype
) -> Implementation:
    """Of others: what distances they sum is theirs; that they find the nearest is checked."""
    return Implementation(
        prepare,
        exact=False,
        least_recall=LEAST_RECALL,
        devices=CPU,
        when=lambda shape: shape.dtype in (dtypes or (HALF, BRAIN, SINGLE)),
    )


def _approximate_on_cpu(prepare: Callable[[Data], Callable[[], Result]]) -> Implementation:
    return Implementation(prepare, exact=False, approximate=True, devices=CPU)


# The bare product comes first: the rest is set in relation to it.
IMPLEMENTATIONS = {
    "bare_product": Implementation(chunked.bare_product, capturable=True),
    "knnext": Implementation(search, capturable=True),
    "knnext_sqnorms": Implementation(search_with_sqnorms, capturable=True),
    "knnext_codes": Implementation(search_with_codes, devices=CPU),
    "torch_chunked": _torch(chunked.torch_chunked),
    "torch_chunked_float32": Implementation(
        chunked.torch_chunked_float32, capturable=True, devices=CUDA
    ),
    "torch_compiled": Implementation(chunked.torch_compiled, exact=False),
    "cuvs_brute_force": _cuvs(cuvs.brute_force),
    "faiss_flat": Implementation(faiss.flat, devices=CPU),
    "faiss_sq_fp16": _exact_on_cpu(faiss.quantizer("QT_fp16", 2), HALF),
    "svs_flat": _exact_on_cpu(svs.flat, HALF, SINGLE),
    "usearch_exact": _exact_on_cpu(usearch.exact),
    "scann_brute_force": _exact_on_cpu(scann.brute_force),
    "faiss_sq8": _approximate_on_cpu(faiss.quantizer("QT_8bit", 1)),
    "usearch_i8": _approximate_on_cpu(usearch.exact_i8),
    "faiss_gpu_flat_float16": _faiss_gpu(faiss.gpu_flat(HALF)),
    "faiss_gpu_flat_float32": _faiss_gpu(faiss.gpu_flat(SINGLE)),
    "faiss_knn_gpu_float16": _faiss_gpu(faiss.knn_gpu(HALF)),
    "faiss_knn_gpu_bfloat16": _faiss_gpu(faiss.knn_gpu(BRAIN)),
    "faiss_knn_gpu_float32": _faiss_gpu(faiss.knn_gpu(SINGLE)),
    "faiss_ivfpq": Implementation(
        faiss.ivfpq,
        exact=False,
        approximate=True,
        own_memory=True,
        late=True,
        shared_index=True,
        when=lambda shape: shape.approximate,
    ),
}

_product_seconds: dict[tuple[Shape, str], float] = {}


def product_seconds(data: Data) -> float:
    """Of the bare product of this shape: from its own row, or measured now."""
    at = (data.shape, data.device)
    if at not in _product_seconds:
        run = chunked.bare_product(data)
        _product_seconds[at] = seconds_of(run, data.device, repeats=3)
    return _product_seconds[at]


def test_knn_search(shape: Shape, device: str, implementation: str, measure: Measure) -> None:
    sets = make_data(shape, device)
    data, chosen = sets[0], IMPLEMENTATIONS[implementation]
    runs, result, facts = _tried(chosen, sets)
    if result is not None:
        facts["recall"] = recall(data, result)
        if chosen.exact:
            assert_exact(data, result)
        assert facts["recall"] >= chosen.least_recall, f"recall {facts['recall']:.4f}"
    del result
    if measure.enabled and implementation != "bare_product":
        facts["product_seconds"] = product_seconds(data)
    seconds = measure(
        runs,
        implementation=chosen,
        work=Work(data.bytes, data.shape.flop, "read", shape.dtype),
        group=f"knn_search {data.shape}",
        rounds=5,
        beside=None if implementation == "knnext" else search(data),
        op="knn_search",
        shape=str(data.shape),
        **data.shape.facts(),
        **facts,
    )
    if seconds is None:
        return
    if implementation == "bare_product":
        _product_seconds[data.shape, device] = seconds
    measure.benchmark.extra_info["share_of_gemm"] = product_seconds(data) / seconds


def _tried(
    chosen: Implementation, sets: Sequence[Data]
) -> tuple[list[Run], Result | None, dict[str, Any]]:
    """(what is timed, the first result, its memory). Skips where a rival needs more memory."""
    try:
        chosen.warm_up()
        memory = Memory(sets[0].device, chosen.own_memory)
        runs = [chosen.prepare(data) for data in sets]
        result, facts = memory.watch(runs[0])
        return runs, result, {} if chosen.shared_index else facts
    except Exception as error:  # torch, FAISS and cuVS each have their own for it
        text = str(error).strip()
        if any(sign in text for sign in ("out of memory", "alloc fail", "bad_alloc")):
            pytest.skip(f"out of memory: {text.splitlines()[0]}")
        raise
