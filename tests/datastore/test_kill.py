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


def run(script: str, *arguments: str) -> tuple[list[dict], str]:
    """The records that a process of many kills prints, and what it complained of."""
    paths = [str(HERE.parents[1]), os.environ.get("PYTHONPATH", "")]
    result = subprocess.run(
        [sys.executable, "-W", "ignore", str(HERE / script), *arguments],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    return json.loads(result.stdout.splitlines()[-1]), result.stderr[-3000:]


def kills(folder: Path, begin: int, *modes: str) -> list[dict]:
    """One record for each kill, at every N-th operation for "mode:N"; see crash.py."""
    records, complaints = run("crash.py", str(folder), str(begin), *modes)
    bad = [record for record in records if not (record["same"] and record["kept"])]
    assert not bad, (bad[:5], complaints)
    return records


#: Death at each operation is hundreds of builds; every seventh from the last is a sample of them.
EVERY = pytest.mark.parametrize("step", [7, pytest.param(1, marks=pytest.mark.slow)])


@EVERY
def test_a_new_build_survives_death_at_every_operation(folder, step):
    """SIGKILL ("kill"). The next three: power cuts that undo, or keep, unsynced renames."""
    steps = {"kill": step, "lost": 3 * step, "kept": 3 * step, "mixed": step, "twice": 7 * step}
    records = kills(folder, -1, *(f"{mode}:{every}" for mode, every in steps.items()))
    for mode in ("kill", "lost", "kept", "mixed"):
        chosen = [record for record in records if record["mode"] == mode]
        assert len(chosen) > (30 if mode in ("lost", "kept") else 90) // step
        assert {record["status"][0] for record in chosen} == {-9}
        # It is never open as a finished datastore before it is one.
        seen = {record["seen"][0] for record in chosen}
        assert seen - {"45"} <= {"nothing", "unfinished"}
        assert step > 1 or seen >= {"nothing", "unfinished"}
        # The last operation but one is the rename that finishes.
        assert "45" in seen or mode in ("lost", "kept")
    twice = [record for record in records if record["mode"] == "twice"]
    assert len(twice) > 12 // step and sum(r["status"][1] == -9 for r in twice) > 10 // step


@EVERY
@pytest.mark.parametrize("begin", [19, pytest.param(32, marks=pytest.mark.slow)])
def test_an_extension_leaves_the_finished_part_readable(folder, begin, step):
    """19 ends inside a shard, 32 between two. A reader sees the old rows or all rows."""
    records = kills(folder, begin, f"kill:{step}", f"mixed:{step}")
    assert len(records) > 35 // step
    assert {record["status"][0] for record in records} == {-9}
    assert {record["seen"][0] for record in records} == {str(begin), "45"}


@EVERY
def test_deleting_replacing_and_compacting_survive_death_at_every_operation(folder, step):
    """A reader sees what was or what is to be, never a mixture; the same call does the rest."""
    records, complaints = run("crash_delete.py", str(folder), str(step))
    # A deletion writes one file, in place of the one that was; the others write new files besides.
    for what, most in {"delete": 4, "replace": 20, "compact": 30}.items():
        assert len([r for r in records if r["what"] == what]) > most // step
    bad = [r for r in records if r["status"] != -9 or not (r["whole"] and r["same"]) or r["left"]]
    assert not bad, (bad[:5], complaints)
