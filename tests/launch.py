"""Commands and programs in several processes, and on two machines that are network namespaces."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]
PATIENCE = 300  # seconds, of a machine many times slower than any
#: Of the two machines, in a net that is in use nowhere else.
ADDRESSES = ("10.199.77.1", "10.199.77.2")
TORCHRUN = [sys.executable, "-m", "torch.distributed.run"]


@contextmanager
def processes(*commands: list[str], **variables: str) -> Iterator[list[subprocess.Popen[str]]]:
    """Each with its own environment's RANK, or through torchrun; none outlives the block."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **variables}
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    begun = [
        subprocess.Popen(words, cwd=ROOT, env=environment, start_new_session=True, **pipes)
        for words in commands
    ]
    try:
        yield begun
    finally:
        for process in begun:
            for number in (signal.SIGCONT, signal.SIGKILL):
                if process.poll() is None:
                    os.killpg(process.pid, number)
            process.communicate()


def free_port(address: str = "127.0.0.1") -> str:
    with socket.socket() as found:
        found.bind((address, 0))
        return str(found.getsockname()[1])


def on_processes(words: list[str], size: int = 2) -> Any:
    """The processes of one module and its words, as other schedulers than torchrun start them."""
    shared = {"WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    starts = (["env", f"RANK={rank}", sys.executable, "-m"] for rank in range(size))
    return processes(*([*start, *words] for start in starts), **shared)


def ended(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    out, err = process.communicate(timeout=PATIENCE)
    return process.returncode, out, err


@contextmanager
def two_machines() -> Iterator[list[str]]:
    """Two network namespaces joined by a cable; skipped, with the reason, where not allowed."""
    names = [f"knnext{os.getpid()}{end}" for end in "ab"]
    cables = [f"kx{os.getpid() % 100_000}{end}" for end in "ab"]

    def ip(*words: str) -> None:
        done = subprocess.run(["ip", *words], capture_output=True, text=True)
        if done.returncode:
            pytest.skip(f"ip {' '.join(words)}: {done.stderr.strip()}")

    if shutil.which("ip") is None:
        pytest.skip("there is no ip command to make network namespaces")
    try:
        for name in names:
            ip("netns", "add", name)
        ip("link", "add", cables[0], "netns", names[0], "type", "veth",
           "peer", "name", cables[1], "netns", names[1])  # fmt: skip
        for name, cable, address in zip(names, cables, ADDRESSES, strict=True):
            ip("-n", name, "addr", "add", f"{address}/24", "dev", cable)
            ip("-n", name, "link", "set", cable, "up")
            ip("-n", name, "link", "set", "lo", "up")
        yield [f"{name} {cable}" for name, cable in zip(names, cables, strict=True)]
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "del", name], capture_output=True)


def on_machines(machines: list[str], words: list[str]) -> Any:
    """One node of torchrun on each machine."""
    starts = []
    for number, machine in enumerate(machines):
        name, cable = machine.split()
        start = ["ip", "netns", "exec", name, "env", f"GLOO_SOCKET_IFNAME={cable}", *TORCHRUN]
        start += ["--nnodes", "2", "--nproc-per-node", "1", "--node-rank", str(number)]
        start += ["--master-addr", ADDRESSES[0], "--master-port", "29511", "-m", *words]
        starts.append(start)
    return processes(*starts)
