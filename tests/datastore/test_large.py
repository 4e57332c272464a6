"""A datastore larger than memory opens, and is read in part, in the memory of that part."""

from __future__ import annotations

import gc
from pathlib import Path

import pytest
import torch

from knnext.datastore import Datastore
from knnext.datastore.meta import META_FILE, DatastoreMeta, FileMeta, ShardMeta, shard_names
from knnext.datastore.meta_file import to_json

DIM = 1024


def sparse_store(path: Path, shards: int, rows: int) -> None:
    """Files of the right size that hold no blocks on the disk."""
    path.mkdir()

    def part(name: str, num_bytes: int) -> FileMeta:
        with (path / name).open("wb") as file:
            file.truncate(num_bytes)
        return FileMeta(name, num_bytes, "crc32:00000000")

    parts = []
    for index in range(shards):
        keys, values = shard_names(index)
        parts.append(ShardMeta(rows, part(keys, rows * DIM * 2), part(values, rows * 4)))
    meta = DatastoreMeta(
        dim=DIM,
        dtype=torch.float16,
        metric="l2",
        num_entries=shards * rows,
        entries_per_shard=rows,
        key_layer=None,
        model_id=None,
        model_revision=None,
        tokenizer_hash=None,
        vocab_size=None,
        corpus=None,
        origin=None,
        created="",
        knnext_version="",
        documents=None,
        shards=tuple(parts),
    )
    (path / META_FILE).write_bytes(to_json(meta))


def resident_bytes() -> int:
    gc.collect()
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096


@pytest.mark.parametrize("shards", [100, 1])
def test_100_gib_open_in_a_few_megabytes(tmp_path, shards):
    """In one file it is larger than memory and swap: the mapping must reserve neither."""
    try:
        sparse_store(tmp_path / "ds", shards, 100 * 2**30 // (DIM * 2) // shards)
    except OSError as error:
        pytest.skip(f"no sparse files of this size here: {error}")
    before = resident_bytes()
    store = Datastore.open(tmp_path / "ds")
    assert store.keys.shape == (52_428_800, DIM)
    assert resident_bytes() - before < 8 << 20
    picked = torch.arange(0, store.num_entries, store.num_entries // 64)
    assert store.keys[picked].shape == (64, DIM)
    assert not store.keys[-3:].any() and not store.values[-3:].any()
    last = store.shard(99, 100)
    assert last.row_offset == store.num_entries // 100 * 99
    start, keys, _ = next(last.iter_chunks(1000))
    assert start == 0 and keys.shape == (1000, DIM)
    assert resident_bytes() - before < 32 << 20
