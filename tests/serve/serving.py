"""The command `knnext serve` in a process of its own."""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

from tests.explore.small import LMBDA, TEMPERATURE, K
from tests.serve.asking import PATIENCE

KEY = "a-key-of-this-run"


@contextlib.contextmanager
def served(folder: Path, *options: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """The process, ready, and its address."""
    command = [
        sys.executable, "-m", "knnext", "serve", str(folder / "store"),
        "--model", str(folder / "model"), "--device", "cpu", "--port", "0", "--name", "small",
        "--temperature", str(TEMPERATURE), "--lmbda", str(LMBDA), "--k", str(K), *options,
    ]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "KNNEXT_API_KEY": KEY}
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment
    )
    watch = threading.Timer(PATIENCE, process.kill)
    watch.start()
    try:
        said = ""
        assert process.stdout is not None
        for line in process.stdout:
            said += line
            if line.startswith("ready"):
                break
        found = re.search(r"listening +(http://\S+)/v1", said)
        assert found and process.poll() is None, said
        yield process, found[1]
    finally:
        watch.cancel()
        process.kill()
        process.wait(60)
        if process.stdout is not None:
            process.stdout.close()
