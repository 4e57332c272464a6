"""A process that deletes, replaces and compacts in forked children, killed at every file operation.

Run by test_kill.py, as crash.py is. The last line of output is JSON: one record for each kill.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

from knnext.datastore import Datastore
from tests.datastore.crash import in_child, rows
from tests.dying import dies_at

OPERATIONS = {os: ("pwrite", "fsync", "ftruncate", "mkdir", "rmdir", "unlink", "rename", "replace")}


def delete(path: Path) -> None:
    Datastore.open(path).delete(["doc 1", "doc 4"])


def replace(path: Path) -> None:
    keys, values, _ = rows(50, 58)
    Datastore.open(path).replace(keys, values, [("doc 1", 3), ("doc 9", 5)])


def compact(path: Path) -> None:
    Datastore.open(path).compact()


def make(path: Path) -> None:
    with Datastore.create(path, 3, entries_per_shard=16, vocab_size=11) as store:
        store.set_document_names([f"doc {d}" for d in range(5)])
        store.append(*rows(0, 45))


def make_with_deleted(path: Path) -> None:
    make(path)
    delete(path)


#: What is killed, and what it begins with.
STEPS: dict[str, tuple[Callable[[Path], None], Callable[[Path], None]]] = {
    "delete": (delete, make),
    "replace": (replace, make),
    "compact": (compact, make_with_deleted),
}


def seen(path: Path) -> list[object]:
    """What a reader sees: values and names, with every checksum compared."""
    store = Datastore.open(path, verify=True)
    # A replacement that had come to its end is made once more, under new ids.
    return [store.values[:].tolist(), [name for name in store.document_names if name]]


def main() -> None:
    work, step = Path(sys.argv[1]), int(sys.argv[2])
    torch.set_num_threads(1)
    records = []
    for name, (change, begin) in STEPS.items():
        base, path, count_file = work / f"{name}-base", work / name, work / "count"
        dying = partial(dies_at, OPERATIONS, count_file=count_file)
        begin(base)
        before = seen(base)
        shutil.copytree(base, path)
        assert in_child(lambda c=change, p=path, d=dying: (d(None), c(p))) == 0
        after = seen(path)
        count = int(count_file.read_text())
        for point in range(count - 1, -1, -step):
            shutil.rmtree(path)
            shutil.copytree(base, path)
            status = in_child(lambda c=change, p=path, d=dying, n=point: (d(n), c(p)))
            then = seen(path)
            assert in_child(lambda c=change, p=path: c(p)) == 0
            left = sorted(str(f.relative_to(path)) for f in path.rglob("*") if f.is_file())
            records.append(
                {
                    "what": name,
                    "at": point,
                    "status": status,
                    "whole": then in (before, after),
                    "same": seen(path) == after,
                    "left": [
                        f for f in left if name == "compact" and f.startswith(("keys", "doc"))
                    ],
                }
            )
    print(json.dumps(records))


if __name__ == "__main__":
    main()
