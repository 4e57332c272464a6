"""ShardedIndex in processes of torchrun's: the bits of one process, over gloo."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
@pytest.mark.parametrize("size", [2, 4])
def test_searches_of_torchruns_processes_are_those_of_one(tmp_path: Path, size: int) -> None:
    run = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    program = ["-m", "tests.index.sharded_program", str(tmp_path), "16"]
    done = subprocess.run(
        [*run, "--nproc-per-node", str(size), *program],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    said = [f"rank {rank} of {size}: the same in 16 cases" for rank in range(size)]
    assert all(line in done.stdout for line in said), done.stdout
