"""The command that makes one of what was built in parts: the datastore, its index, its codes."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from knnext.cli.build import facts_of
from knnext.say import Say


def join(args: argparse.Namespace, say: Say) -> dict[str, Any]:
    from knnext.datastore import Datastore
    from knnext.datastore.meta import META_FILE
    from knnext.datastore.parts import read_plan
    from knnext.index import codes, codes_parts, faiss, faiss_parts

    folder = Path(args.datastore)
    alone = (folder / META_FILE).exists() and read_plan(folder) is None
    # A datastore of one process may have an index and codes in parts.
    store = Datastore.open(folder) if alone else Datastore.join(folder)
    index = faiss.default_path(store) if args.index_path is None else Path(args.index_path)
    found: dict[str, Any] = {}
    if faiss_parts.is_planned(index):
        faiss_parts.join(store, index)
        found["index"] = {"path": str(index)}
    if codes_parts.is_planned(codes.default_path(store)):
        codes_parts.join(store, codes.default_path(store))
        found["codes"] = {"path": str(codes.default_path(store))}
    if alone and not found:
        raise ValueError(f"{folder}: was built by one process, and nothing beside it is in parts")
    say(store.describe())
    for name, facts in found.items():
        say(f"{name:<12}{facts['path']}, joined")
    return facts_of(store) | found
