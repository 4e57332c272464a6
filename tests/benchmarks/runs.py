"""Made-up runs on a GPU, as pytest-benchmark writes them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

LIMITS = {"limit_read_gbps": 4000.0, "limit_copy_gbps": 4000.0, "limit_tflops": 500.0}


def entry(implementation: str, queries: int, milliseconds: float, **facts: Any) -> dict[str, Any]:
    """A search as pytest-benchmark writes it; the bare product takes 10 ms for 4096 queries."""
    shape = {"Q": queries, "N": 1_000_000, "D": 1024, "k": 1024, "dtype": "float16"}
    seconds = 1e-3 * milliseconds
    extra = {
        "op": "knn_search",
        "kernels": "portable",
        "keys": "gaussian",
        "gbps": 2.048 / seconds,
        "tflops": 2.048e-3 * queries / seconds,
        "share_of_limit": 1e-3 / seconds,
        "share_of_gemm": 1e-2 * queries / 4096 / seconds,
        "recall": 1.0,
        "peak_memory": 123_000_000,
    }
    return {
        "group": f"knn_search Q{queries} cuda",
        "params": {"implementation": implementation, "device": "cuda"},
        "stats": {"median": seconds, "min": seconds, "max": seconds, "rounds": 5},
        "extra_info": extra | LIMITS | shape | facts,
    }


def write_run(path: Path, entries: list[dict[str, Any]]) -> Path:
    info = {"node": "a-host", "cpu": {"brand_raw": "A CPU"}, "threads": 8, "gpu": "A GPU"}
    content = {
        "machine_info": info | {"versions": {"torch": "9.9"}},
        "datetime": "2031-02-03T04:05:06",
        "benchmarks": entries,
    }
    path.write_text(json.dumps(content))
    return path
