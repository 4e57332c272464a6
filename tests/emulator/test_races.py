"""The kernels under the thread sanitizer: no two accesses that no barrier orders."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.emulator.build import compiler_found

ROOT = Path(__file__).resolve().parents[2]


def sanitizer() -> str:
    """The runtime to load before Python, or "" where the compiler brings none."""
    if not compiler_found():
        return ""
    command = [os.environ.get("CXX", "g++"), "-print-file-name=libtsan.so"]
    path = subprocess.run(command, capture_output=True, text=True).stdout.strip()
    return path if Path(path).is_absolute() and Path(path).is_file() else ""


pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not sanitizer(), reason="the compiler brings no thread sanitizer"),
]


def check(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {
        **os.environ,
        "LD_PRELOAD": sanitizer(),
        "TSAN_OPTIONS": "report_thread_leaks=0 exitcode=66",
        "EMULATE_TSAN": "1",
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, "-m", "tests.emulator.race_check", *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT)


def test_a_forgotten_barrier_is_a_race() -> None:
    done = check("--forget")
    assert "data race" in done.stderr and "in sum_kernel" in done.stderr, done.stderr


def test_kernels_have_no_race() -> None:
    done = check()
    assert done.returncode == 0, done.stderr[-4000:]
