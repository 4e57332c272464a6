"""kill -9 and power cuts at every file operation of a build: it goes on, and ends the same."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

HERE = Path(__file__).parent


@pytest.fixture
def folder(tmp_path):
    """In memory where that can be: thousands of real fsyncs would take minutes."""
    shared = Path("/dev/shm")
    if not os.access(shared, os.W_OK):
        yield tmp_path
        return
    with tempfile.TemporaryDirectory(dir=shared) as path:
        yield Path(path)


def kills(folder: Path, begin: int, *modes: str) -> list[dict]:
    """One record for each kill, at every N-th operation for "mode:N"; see crash.py."""
    paths = [str(HERE.parents[1]), os.environ.get("PYTHONPATH", "")]
    script = [sys.executable, "-W", "ignore", str(HERE / "crash.py")]
    result = subprocess.run(
        [*script, str(folder), str(begin), *modes],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    records = json.loads(result.stdout.splitlines()[-1])
    bad = [record for record in records if not (record["same"] and record["kept"])]
    assert not bad, (bad[:5], result.stderr[-3000:])
    return records


def test_a_new_build_survives_death_at_every_operation(folder):
    """SIGKILL ("kill"). The next three: power cuts that undo, or keep, unsynced renames."""
    records = kills(folder, -1, "kill:1", "lost:3", "kept:3", "mixed:1", "twice:7")
    for mode in ("kill", "lost", "kept", "mixed"):
        chosen = [record for record in records if record["mode"] == mode]
        assert len(chosen) > (30 if mode in ("lost", "kept") else 90)
        assert {record["status"][0] for record in chosen} == {-9}
        # It is never open as a finished datastore before it is one.
        seen = {record["seen"][0] for record in chosen}
        assert seen - {"45"} == {"nothing", "unfinished"}
        # The last operation but one is the rename that finishes.
        assert "45" in seen or mode in ("lost", "kept")
    twice = [record for record in records if record["mode"] == "twice"]
    assert len(twice) > 12 and sum(record["status"][1] == -9 for record in twice) > 10


@pytest.mark.parametrize("begin", [19, 32])
def test_an_extension_leaves_the_finished_part_readable(folder, begin):
    """19 ends inside a shard, 32 between two. A reader sees the old rows or all rows."""
    records = kills(folder, begin, "kill:1", "mixed:1")
    assert len(records) > 35
    assert {record["status"][0] for record in records} == {-9}
    assert {record["seen"][0] for record in records} == {str(begin), "45"}
