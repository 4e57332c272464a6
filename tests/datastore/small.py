"""A datastore of 3 shards, 16, 16 and 8 rows, for tests of damage, disks and resuming."""

from __future__ import annotations

from pathlib import Path

import torch

from knnext.datastore import Datastore

DIM = 4


def rows(first: int, last: int):
    index = torch.arange(first, last)
    return (index[:, None] + torch.arange(DIM)).half(), index % 11, index // 10


def begin(path: Path, **options) -> Datastore:
    defaults = {"entries_per_shard": 16, "vocab_size": 11, "commit_seconds": 1e9, "model_id": "m"}
    return Datastore.create(path, DIM, **{**defaults, **options})


def write(path: Path, last: int) -> Path:
    with begin(path) as store:
        store.append(*rows(0, last))
    return path


def folder_bytes(path: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted(path.iterdir())}
