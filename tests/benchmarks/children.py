"""Programs that a test starts: they get their own folders, and none outlives the test."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import benchmarks

BENCHMARKS = Path(benchmarks.__file__).resolve().parent
ROOT = BENCHMARKS.parent


def run_child(
    command: Sequence[str], *, cwd: Path, scratch: Path, env: dict[str, str]
) -> subprocess.CompletedProcess[str]:
    """Runs to the end, with HOME and TMPDIR in `scratch`; AssertionError if anything stays there.

    It gets the default SIGINT back, which this process may have been told to ignore, and a session
    of its own, all of which is killed however this ends.
    """
    home, temporary = scratch / "home", scratch / "tmp"
    for folder in (home, temporary):
        folder.mkdir(parents=True, exist_ok=True)
    places = {"HOME": str(home), "TMPDIR": str(temporary)}
    # A worker of ours is none of the child's: pytest-benchmark measures nothing in one.
    own = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    child = _started(command, cwd=cwd, env=own | places | env)
    try:
        out, err = child.communicate()
    finally:
        _kill_session(child.pid)
        child.wait()
    left = [str(path) for folder in (home, temporary) for path in folder.rglob("*")]
    assert not left, f"left behind: {left}"
    return subprocess.CompletedProcess(command, child.returncode, out, err)


def _started(command: Sequence[str], **places: Any) -> subprocess.Popen[str]:
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    # What is ignored here would be ignored there too; what is handled is not inherited.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        return subprocess.Popen(command, start_new_session=True, **pipes, **places)
    finally:
        signal.signal(signal.SIGINT, before)


def _kill_session(session: int) -> None:
    """All processes in it: `timeout` makes a group of its own, which its parent's does not hold."""
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            after_name = (folder / "stat").read_text().rpartition(")")[2].split()
            if int(after_name[3]) == session:
                os.kill(int(folder.name), signal.SIGKILL)
        except (OSError, ValueError, IndexError):  # it has ended meanwhile
            continue
