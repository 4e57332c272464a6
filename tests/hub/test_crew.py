"""Threads that fetch: an error waits for what is under way, an interrupt for nothing."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from knnext.datastore import Datastore
from knnext.hub.crew import each
from tests.hub.server import Hub
from tests.hub.stored import REPO, same_bytes


@pytest.mark.parametrize("size", [1, 3, 50])
def test_each_is_done_once(size: int) -> None:
    worked: list[int] = []
    told: list[int] = []
    each(list(range(20)), worked.append, told.append, size)
    assert sorted(worked) == sorted(told) == list(range(20))
    each([], worked.append, told.append, size)


def test_an_error_waits_for_what_is_under_way() -> None:
    begun, ended = [], []
    failed, slow = threading.Event(), threading.Event()

    def work(number: int) -> None:
        begun.append(number)
        if number == 0:
            slow.wait(60)
            failed.set()
            raise ValueError("of the first")
        slow.set()
        failed.wait(60)
        ended.append(number)

    with pytest.raises(ValueError, match="of the first"):
        each(list(range(30)), work, lambda number: None, 2)
    assert ended and set(ended) == set(begun) - {0}
    begun.clear()
    slow.set()
    with pytest.raises(ValueError, match="of the first"):
        each(list(range(30)), work, lambda number: None, 1)
    assert begun == [0]


def test_an_interrupt_waits_for_nothing() -> None:
    stuck, go = threading.Event(), threading.Event()

    def work(number: int) -> None:
        if number:
            stuck.set()
            go.wait(60)

    def interrupted(number: int) -> None:
        stuck.wait(60)
        raise KeyboardInterrupt

    try:
        with pytest.raises(KeyboardInterrupt):
            each([0, 1], work, interrupted, 2)
        assert not go.is_set()
    finally:
        go.set()


@pytest.mark.slow
def test_a_pull_ends_at_the_first_interrupt_and_goes_on_later(
    stores: dict[str, Datastore], hub: Hub, tmp_path: Path
) -> None:
    stores["plain"].push_to_hub(REPO)
    begun, go = threading.Event(), threading.Event()

    def fault(method: str, path: str) -> None:
        if method == "GET" and "keys-" in path:
            begun.set()
            go.wait(120)  # of a server that is slow

    hub.fault = fault
    environment = {
        **os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_DISABLE_XET": "1", "HF_HOME": str(tmp_path),
        "HF_ENDPOINT": hub.url,
    }  # fmt: skip
    line = [sys.executable, "-m", "knnext", "pull", REPO, str(tmp_path / "T")]
    process = subprocess.Popen(line, env=environment, stderr=subprocess.PIPE, text=True)
    try:
        assert begun.wait(120)
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=60)
        assert process.returncode == 130 and said.splitlines()[-1] == "knnext pull: interrupted"
        assert not go.is_set() and not (tmp_path / "T").exists()
    finally:
        go.set()
        process.kill()
        process.communicate()
    hub.fault = lambda method, path: None
    assert same_bytes(Datastore.from_hub(REPO, tmp_path / "T"), stores["plain"])
