"""Intel's Scalable Vector Search, flat: exact, on float16 or float32 keys as they are.

Its threads share the queries, so that a single query has one of them; that is the library's own
way and no setting changes it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from benchmarks.data.search import Data, Result, require_memory
from benchmarks.rivals.needs import load


def flat(data: Data) -> Callable[[], Result]:
    """`svs.Flat`: it keeps a copy of the keys; queries are float32, as its interface wants them."""
    svs = load("svs", "scalable-vs")

    def build() -> Any:
        require_memory(data.keys.nbytes, "cpu", "the index")
        return svs.Flat(data.keys.numpy(), svs.DistanceType.L2)

    index = data.key_set.kept("svs_flat", build)
    index.num_threads = torch.get_num_threads()
    queries = data.queries.float().numpy()

    def run() -> Result:
        indices, distances = index.search(queries, data.k)
        return torch.from_numpy(distances), torch.from_numpy(indices.astype("int64"))

    return run
