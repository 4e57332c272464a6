"""What a test run leaves to the programs that it starts, to the machine, and to other tests."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch

from tests.conftest import CACHES, changed

SHOW = "import signal; print(signal.getsignal(signal.SIGINT) is signal.default_int_handler)"
UNDER_NOHUP = f"""
import subprocess, sys
from tests.conftest import restore_signals
show = [sys.executable, "-c", {SHOW!r}]
subprocess.run(show)
restore_signals()
subprocess.run(show)
"""


def ignore_and_block() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})


def test_children_get_their_signals_where_this_run_ignores_them() -> None:
    done = subprocess.run(
        [sys.executable, "-c", UNDER_NOHUP],
        capture_output=True,
        text=True,
        preexec_fn=ignore_and_block,
        cwd=Path(__file__).resolve().parents[1],
    )
    assert done.stdout.split() == ["False", "True"], done.stderr
    assert signal.getsignal(signal.SIGINT) is not signal.SIG_IGN  # of this very run


@pytest.mark.parametrize("name", CACHES)
def test_libraries_keep_nothing_in_home(name: str) -> None:
    place = Path(os.environ[name])
    assert place.parent.name.startswith("knnext-tests-")
    assert Path(tempfile.gettempdir()) in place.parents


def test_what_a_file_would_leave_to_others_is_named(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    assert not changed()
    monkeypatch.setenv("MPLCONFIGDIR", str(tmp_path))
    monkeypatch.setenv("KNNEXT_CPU_ISA", "plain")
    monkeypatch.setenv("SET_BY_A_LIBRARY", "1")
    monkeypatch.delenv("HF_HOME")
    monkeypatch.chdir(tmp_path)
    with torch.inference_mode(), torch.device("meta"):
        assert changed().keys() == {
            "$MPLCONFIGDIR", "$KNNEXT_CPU_ISA", "$HF_HOME", "the current folder",
            "torch's default device", "torch's gradients",
        }  # fmt: skip
    monkeypatch.undo()
    assert not changed()
