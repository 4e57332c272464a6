"""A process that fetches datastores in forked children, killed at every file operation.

Run by test_kill.py with the address of a hub, as tests/datastore/crash.py is run. The last line of
output is JSON: one record for each kill.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from knnext.datastore import Datastore, DatastoreError
from knnext.hub import open_partial
from knnext.index import StoredCodes
from tests.datastore.crash import in_child
from tests.dying import dies_at
from tests.hub.stored import REPO, ROWS

OPERATIONS = {os: ("mkdir", "rmdir", "unlink", "rename", "replace", "fsync")}


def of_the_client(name: str, arguments: tuple[Any, ...]) -> bool:
    """The client's own notes, of which we read none."""
    return ".cache" in str(arguments[0]) and name != "replace"


def whole(path: Path) -> None:
    Datastore.from_hub(REPO, path)


def some(path: Path) -> None:
    Datastore.from_hub(REPO, path, only=["values"])


def shards(path: Path) -> None:
    Datastore.from_hub(REPO, path, shards=[0, 2])


def nothing(path: Path) -> None:
    """Where a fetch begins with no folder."""


#: What is killed, and what is there before.
STEPS: dict[str, tuple[Callable[[Path], None], Callable[[Path], None]]] = {
    "whole": (whole, nothing),
    "rest": (whole, some),
    "shards": (shards, nothing),
}


def seen(path: Path) -> str:
    """What a reader finds: nothing, a part of it whose files are right, or a right datastore."""
    try:
        found = Datastore.open(path, verify=True)
    except DatastoreError:
        try:
            return f"values {open_partial(path).values[:].tolist()}"
        except DatastoreError:  # also of a part whose files are on their way to the stage
            return "nothing"
    codes = path.with_name(f"{path.name}.codes")
    if codes.exists() and "shards" not in (found.meta.origin or {}):
        StoredCodes.open(found).verify()
    return f"whole {found.fingerprint}"


def main() -> None:
    work, step = Path(sys.argv[1]), int(sys.argv[2])
    torch.set_num_threads(1)
    dying = partial(dies_at, OPERATIONS, count_file=work / "count", passed_over=of_the_client)
    records = []
    for name, (fetch, begin) in STEPS.items():
        counting = work / f"{name}-counted" / "T"
        begin(counting) if begin is not nothing else None
        assert in_child(lambda f=fetch, p=counting: (dying(None), f(p))) == 0
        wanted, count = seen(counting), int((work / "count").read_text())
        for point in range(count - 1, -1, -step):
            path = work / name / "T"
            shutil.rmtree(path.parent, ignore_errors=True)
            begin(path) if begin is not nothing else None
            before = seen(path)
            status = in_child(lambda f=fetch, p=path, n=point: (dying(n), f(p)))
            then = seen(path)
            assert in_child(lambda f=fetch, p=path: f(p)) == 0
            records.append(
                {
                    "what": name,
                    "at": point,
                    "status": status,
                    "right": then in (before, wanted, "nothing"),
                    "same": seen(path) == wanted,
                    "left": sorted(p.name for p in path.parent.iterdir() if p.suffix == ".pull"),
                    "groups": [g for g in ROWS if not list(path.glob(f"{g[:5]}*"))],
                }
            )
        print(name, count, file=sys.stderr)
    print(json.dumps(records))


if __name__ == "__main__":
    main()
