"""Device time of each kernel of one search: where the time goes, and what an epilogue costs.

    python -m benchmarks.timing.kernels --queries 4096 --entries 1000000

A build with `NVCC_APPEND_FLAGS=-DKNNEXT_NULL_EPILOGUE` scans without looking at its scores. Its
results are wrong, and every query goes through the fallback afterwards; what its scan is faster by
than that of a plain build is the epilogue's cost.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import knnext


def searches(queries: int, entries: int, dim: int, k: int, calls: int) -> Callable[[], None]:
    """What runs `calls` searches on gaussian data, norms given."""
    q = torch.randn(queries, dim, device="cuda").half()
    keys = torch.cat([torch.randn(n, dim, device="cuda").half() for n in _parts(entries)])
    norms = knnext.key_sqnorms(keys)

    def search() -> None:
        for _ in range(calls):
            knnext.knn_search(q, keys, k, key_sqnorms=norms)

    return search


def kernel_times(calls: int, **sizes: int) -> list[dict[str, Any]]:
    """One entry for each kernel, the longest first: name, launches and microseconds a search."""
    search = searches(calls=calls, **sizes)
    search()
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        search()
        torch.cuda.synchronize()
    return summed(profile.key_averages(), calls)


def _parts(entries: int, most: int = 1 << 20) -> list[int]:
    return [min(most, entries - start) for start in range(0, entries, most)]


def summed(events: Any, calls: int) -> list[dict[str, Any]]:
    times = [
        {
            "kernel": short_name(event.key),
            "launches": event.count / calls,
            "microseconds": event.device_time_total / calls,
        }
        for event in events
        if event.device_time_total > 0
    ]
    return sorted(times, key=lambda entry: -entry["microseconds"])


def short_name(signature: str) -> str:
    """The kernel's name with its template arguments and without namespaces and parameters."""
    name = signature.replace("(anonymous namespace)::", "")
    name = re.sub(r"\b(?:knnext|at|native|cub|detail)::", "", name)
    return re.sub(r"^(?:void|static) ", "", name).partition("(")[0][:90]


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.timing.kernels", description=__doc__.partition("\n")[0]
    )
    parser.add_argument("--queries", type=int, default=4096)
    parser.add_argument("--entries", type=int, default=1_000_000)
    parser.add_argument("--dim", type=int, default=1024)
    parser.add_argument("-k", type=int, default=1024)
    parser.add_argument("--calls", type=int, default=3)
    parser.add_argument("--json", type=Path)
    parser.add_argument(
        "--run-only", action="store_true", help="for a profiler that watches from outside"
    )
    given = vars(parser.parse_args())
    path, run_only = given.pop("json"), given.pop("run_only")
    if not torch.cuda.is_available():
        sys.exit("kernels: torch sees no CUDA device")
    if run_only:
        searches(**given)()
        torch.cuda.synchronize()
        return
    times = kernel_times(**given)
    if not times:
        sys.exit("kernels: the profiler saw no kernel; CUPTI may be closed on this machine")
    total = sum(entry["microseconds"] for entry in times)
    for entry in times:
        share = 100 * entry["microseconds"] / total
        print(f"{entry['microseconds']:12.1f} us {share:5.1f} %  {entry['kernel']}")
    if path is not None:
        path.write_text(json.dumps(given | {"kernels": times}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
