"""kill -9 at every file operation of a distillation: it goes on, and ends with the same bytes."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import pytest

from tests.datastore.test_kill import run

pytest.importorskip("pyarrow")
SCRIPT = "../distill/crash.py"


@pytest.mark.slow
def test_death_at_every_operation(tmp_path: Path) -> None:
    shared = "/dev/shm" if os.access("/dev/shm", os.W_OK) else str(tmp_path)
    with tempfile.TemporaryDirectory(dir=shared) as folder:
        records, complaints = run(SCRIPT, folder, "1")
    assert len(records) > 30
    assert {record["status"] for record in records} == {-9}
    bad = [record for record in records if not (record["whole"] and record["same"])]
    assert not bad, (bad[:5], complaints)
    # What can be read before the end died after the last file: at its folder, or at locks that go.
    most = max(record["shards"] for record in records)
    assert {record["shards"] for record in records if record["opened"]} <= {most}
    assert {record["shards"] for record in records} == set(range(most + 1))
