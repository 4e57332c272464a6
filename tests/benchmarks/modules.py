"""Puts the benchmarks' folder on the path, and names those of its modules that tests patch."""

from __future__ import annotations

import sys
from importlib import import_module
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
BENCHMARKS = ROOT / "benchmarks"
if str(BENCHMARKS) not in sys.path:
    sys.path.append(str(BENCHMARKS))

real_keys = import_module("real_keys")
report = import_module("report")
