"""cuVS brute force: the index keeps norms, the search writes distances tile by tile and selects."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from search_data import Data, Result


def brute_force(data: Data) -> Callable[[], Result]:
    module = pytest.importorskip(
        "cuvs.neighbors.brute_force",
        reason="cuVS is not installed: pip install cuvs-cu12 (or cuvs-cu13, as the driver wants)",
    )
    from cuvs.common import Resources

    if data.keys.dtype == torch.bfloat16:
        pytest.skip("cuVS brute force takes float16 and float32")
    stream = torch.cuda.current_stream().cuda_stream
    resources = Resources(stream=stream)
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
