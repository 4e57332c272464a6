"""ScaNN by brute force, without quantization: exact, on a float32 copy of the keys.

Its threads share the batches of queries. The calling thread works beside those of the pool, so the
pool has one fewer than may run, and there are as many batches as threads: with its own batches of
256, one thread would search and the others wait. A single query has one thread in any case.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from benchmarks.data.search import Data, Result, require_memory
from benchmarks.rivals.needs import load


def brute_force(data: Data) -> Callable[[], Result]:
    ops = load("scann", "scann").scann_ops_pybind
    threads = torch.get_num_threads()

    def build() -> Any:
        require_memory(8 * data.keys.numel(), "cpu", "the index")
        builder = ops.builder(data.keys.float().numpy(), data.k, "squared_l2")
        return builder.set_n_training_threads(threads).score_brute_force().build()

    searcher = data.key_set.kept("scann_brute_force", build)
    searcher.set_num_threads(max(1, threads - 1))
    queries = data.queries.float().numpy()
    batch = -(-len(queries) // threads)

    def run() -> Result:
        if threads == 1 or len(queries) == 1:
            indices, distances = searcher.search_batched(queries, data.k)
        else:
            indices, distances = searcher.search_batched_parallel(queries, data.k, batch_size=batch)
        return torch.from_numpy(distances), torch.from_numpy(indices.astype("int64"))

    return run
