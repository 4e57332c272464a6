"""What make says and calls, with a Python that does nothing in the place of pip and compilers."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
pytestmark = [
    pytest.mark.skipif(shutil.which("make") is None, reason="needs make"),
    pytest.mark.skipif(not (ROOT / "Makefile").is_file(), reason="no source tree"),
]
#: Writes down how it is called, and makes an environment of itself.
PYTHON = """#!/bin/sh
echo "$@" >> {log}
case "$*" in "-m venv "*) mkdir -p "$3/bin" && cp "$0" "$3/bin/python";; esac
"""


def make(folder: Path, *words: str) -> tuple[str, list[str]]:
    """What was printed, and the arguments of each call of Python."""
    python, log = folder / "python", folder / "calls"
    python.write_text(PYTHON.format(log=log))
    python.chmod(0o755)
    log.touch()
    command = ["make", "-s", f"PYTHON={python}", f"VENV={folder / 'venv'}", *words]
    kept = {k: v for k, v in os.environ.items() if k not in ("MAKEFLAGS", "MFLAGS", "CUDA")}
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=kept)
    assert done.returncode == 0, done.stderr
    return done.stdout, log.read_text().splitlines()


def test_setup_says_each_step_before_it_is_taken(tmp_path):
    said, calls = make(tmp_path, "setup", "TORCH=2.13.0+cpu")
    steps = [line[:6] for line in said.splitlines() if line[1:6] == " of 4"]
    assert steps == ["1 of 4", "2 of 4", "3 of 4", "4 of 4"]
    assert any("install --quiet torch==2.13.0+cpu" in call for call in calls)
    assert "NVIDIA driver" not in said, "the build for the CPU was chosen"
    again, _ = make(tmp_path, "setup", "TORCH=2.13.0+cpu")
    assert again == "", "it is made"


@pytest.mark.skipif(Path("/proc/driver/nvidia/version").exists(), reason="there is a driver")
def test_setup_without_a_driver_tells_how_to_choose_the_smaller_torch(tmp_path):
    said, _ = make(tmp_path, "setup", "TORCH=2.13.0")
    assert "No NVIDIA driver is here" in said
    (line,) = [line for line in said.splitlines() if "make setup" in line]
    index, _, command = line.strip().partition(" ")
    assert index.startswith("PIP_EXTRA_INDEX_URL=https://")
    assert command == "make setup TORCH=2.13.0+cpu"


@pytest.mark.parametrize(
    ("words", "call"),
    [
        (("wheel",), "tools/wheels.py --cuda cpu --python {venv}/bin/python"),
        (("wheel", "CUDA=12.8", "PYTHONS=a b"), "tools/wheels.py --cuda 12.8 --python a b"),
        (("cuda-toolchain",), "tools/cuda_toolchain.py 13.0"),
        (("cuda-toolchain", "CUDA=13.1"), "tools/cuda_toolchain.py 13.1"),
        (("test-wheel", "WHEEL=x.whl", "TORCH=none"), "tools/test_wheel.py x.whl --torch none"),
        (("test-sdist", "ARGS=--libraries ."), "tools/test_sdist.py --libraries ."),
    ],
)
def test_targets_pass_on_what_was_said(tmp_path, words, call):
    _, calls = make(tmp_path, *words)
    assert calls[-1] == call.format(venv=tmp_path / "venv")
