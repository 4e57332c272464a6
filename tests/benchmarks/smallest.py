"""A pytest plugin under which the benchmarks time one small shape, beside limits that take no time.

pytest -p tests.benchmarks.smallest benchmarks/bench_knn_search.py
"""

from __future__ import annotations

from benchmarks.data import cases, search_shapes
from benchmarks.timing import limits

cases.profile = lambda device, full, smoke: "smoke"
search_shapes.SMOKE[:] = search_shapes.SMOKE[:1]
limits.CPU_BYTES, limits.CPU_PRODUCT = 1 << 20, 64
