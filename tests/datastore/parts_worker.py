"""One of several processes that build a datastore, and may die or stand still at a chosen moment.

``python parts_worker.py FOLDER RANK SIZE [WHEN WHERE]``: WHERE is a batch of the process, counted
from 1, or "join"; WHEN it comes there the process is killed ("kill") or stopped ("stop").
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from knnext.datastore import build_job, parts
from knnext.datastore.build import build_datastore
from knnext.lm.hidden_states import hidden_states
from tests.datastore.streams import LENGTHS, WINDOWS, some_tokenizer, stream
from tests.lm.tiny_models import tiny

SIGNALS = {"kill": signal.SIGKILL, "stop": signal.SIGSTOP}


def main(folder: str, rank: str, size: str, when: str = "", where: str = "") -> None:
    torch.set_num_threads(1)
    batches = [0]

    def counted(*args: Any, **kwargs: Any) -> Iterator[Any]:
        for batch in hidden_states(*args, **kwargs):
            batches[0] += 1
            if where == str(batches[0]):
                os.kill(os.getpid(), SIGNALS[when])
            yield batch

    build_job.hidden_states = counted  # type: ignore[attr-defined]
    real = parts.replace_file

    def dying(path: Path, content: bytes) -> None:
        joining = path.name == "build.json" and (path.parent / "document-starts.bin").exists()
        if where == "join" and joining:
            os.kill(os.getpid(), SIGNALS[when])
        real(path, content)

    parts.replace_file = dying  # type: ignore[attr-defined]
    build_datastore(
        tiny("gpt2"),
        some_tokenizer(),
        stream(LENGTHS),
        folder,
        parts=4,
        rank=(int(rank), int(size)),
        **WINDOWS,
    )


if __name__ == "__main__":
    main(*sys.argv[1:])
