"""The shard that still grows, and what a writer finds of an earlier one."""

from __future__ import annotations

from pathlib import Path

import torch

from knnext.datastore.batch import Batch
from knnext.datastore.errors import CorruptDatastoreError
from knnext.datastore.files import AppendFile, check_file, file_checksum, parse_checksum
from knnext.datastore.meta import (
    HASHES_FILE,
    NAMES_FILE,
    STARTS_FILE,
    DatastoreMeta,
    FileMeta,
    ShardMeta,
    shard_names,
)


class OpenShard:
    """The shard that still grows."""

    def __init__(
        self, directory: Path, index: int, shard: ShardMeta | None = None, *, prefix: str = ""
    ) -> None:
        directory, self._prefix = directory / prefix, prefix
        self.rows = 0 if shard is None else shard.rows
        parts = (None, None) if shard is None else (shard.keys, shard.values)
        self.keys, self.values = (
            AppendFile(directory / name)
            if part is None
            else AppendFile(directory / name, part.num_bytes, parse_checksum(part.checksum))
            for name, part in zip(shard_names(index), parts, strict=True)
        )

    def append(self, batch: Batch, first: int, count: int) -> None:
        keys = batch.keys[first : first + count]
        self.keys.append(keys.view(torch.uint8).numpy().data.cast("B"))
        self.values.append(batch.values[first : first + count].data.cast("B"))
        self.rows += count

    def meta(self) -> ShardMeta:
        keys, values = (
            FileMeta(self._prefix + file.path.name, file.length, file.checksum)
            for file in (self.keys, self.values)
        )
        return ShardMeta(self.rows, keys, values)

    def sync(self) -> None:
        self.keys.sync()
        self.values.sync()

    def close(self) -> None:
        self.keys.close()
        self.values.close()


def remove_leftovers(directory: Path, meta: DatastoreMeta) -> None:
    """Remove what was begun after ``meta``: shards, document tables, temporary files."""
    known = {file.file for file in meta.files()}
    documents = (STARTS_FILE, NAMES_FILE, HASHES_FILE)
    patterns = ("keys-*.bin", "values-*.bin", *documents, "*.json.tmp")
    for path in (path for pattern in patterns for path in directory.glob(meta.prefix + pattern)):
        if meta.prefix + path.name not in known:
            path.unlink()


def has_old_files(directory: Path, meta: DatastoreMeta) -> bool:
    """Whether a compacting was interrupted: before its end, or before all that was is removed."""
    kept = {meta.folder, *(part.folder for part in meta.parts or ())}
    others = (f for pattern in ("compact-*", "part-*") for f in directory.glob(pattern))
    begun = any(folder.name not in kept for folder in others)
    return begun or (meta.folder is not None and any(directory.glob("keys-*.bin")))


def check_content(directory: Path, *parts: FileMeta) -> None:
    for part in parts:
        path = directory / part.file
        check_file(path, part.num_bytes)
        crc = file_checksum(path, part.num_bytes)
        if crc is None or crc != parse_checksum(part.checksum):
            problem = f"{path}: the committed part has changed since it was written"
            raise CorruptDatastoreError(f"{problem}; it cannot be resumed", [problem])
