"""A process that distills in forked children, killed at every file operation and row group.

Run by test_kill.py, as tests/datastore/crash.py is. The last line of output is JSON: one record for
each kill.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import torch

from knnext.corpus import Document
from knnext.datastore.build import build_datastore
from knnext.distill import DistillationData, distill, sparse
from knnext.distill.sparse import ShardWriter
from knnext.errors import DatastoreError
from knnext.index import ExactIndex
from knnext.lm.train import train_tokenizer
from tests.datastore.crash import in_child
from tests.distill.test_distill import LENGTHS, OPTIONS, WINDOWS, a_text
from tests.dying import dies_at
from tests.lm.tiny_models import tiny

OPERATIONS = {
    os: ("mkdir", "unlink", "rename", "replace", "fsync"),
    ShardWriter: ("__init__", "_write", "__exit__"),
}


def content(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted(folder.glob("*"))}


def opens(folder: Path) -> bool:
    """Whether it can be read, and then every item of it."""
    try:
        data = DistillationData(folder, 16)
    except DatastoreError:
        return False
    return sum(len(data[n]["labels"]) for n in range(len(data))) == data.num_tokens


def main() -> None:
    work, step = Path(sys.argv[1]), int(sys.argv[2])
    torch.set_num_threads(1)
    sparse.GROUP_ROWS = 16  # several groups a shard
    sys.modules["knnext.distill.data"].GROUP_ROWS = 16  # type: ignore[attr-defined]
    model, text = tiny("gpt2"), a_text(LENGTHS)
    tokenizer = train_tokenizer([Document("a", "some text to learn from\n" * 9)], vocab_size=260)
    store = build_datastore(model, tokenizer, text, work / "S", **WINDOWS)

    def run(folder: Path, *, temperature: float = 5.0) -> None:
        options = {**OPTIONS, **WINDOWS, "temperature": temperature, "shard_tokens": 60}
        distill(model, ExactIndex(store), text, folder, **options)

    def dying(folder: Path, point: int | None) -> Callable[[], None]:
        return lambda: (dies_at(OPERATIONS, point, work / "count"), run(folder))[1]

    assert in_child(dying(work / "whole", None)) == 0
    wanted, count = content(work / "whole"), int((work / "count").read_text())
    records = []
    for point in range(count - 1, -1, -step):
        folder = work / "D"
        shutil.rmtree(folder, ignore_errors=True)
        status = in_child(dying(folder, point))
        shards = sorted(name for name in content(folder) if name.endswith(".parquet"))
        held = {name: content(folder)[name] == wanted[name] for name in shards}
        opened = opens(folder)
        assert in_child(lambda f=folder: run(f)) == 0
        records.append(
            {
                "at": point,
                "status": status,
                "shards": len(shards),
                "whole": all(held.values()),
                "opened": opened,
                "same": content(folder) == wanted and opens(folder),
            }
        )
    print(json.dumps(records))


if __name__ == "__main__":
    main()
