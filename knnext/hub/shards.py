"""Some shards of a datastore as a datastore of their rows: files renamed, documents cut."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import replace
from itertools import groupby
from pathlib import Path

import torch

from knnext.datastore.documents import DocumentTable
from knnext.datastore.files import format_checksum, replace_file
from knnext.datastore.meta import (
    HASH_BYTES,
    DatastoreMeta,
    DocumentsMeta,
    FileMeta,
    Origin,
    PartMeta,
    ShardMeta,
    part_folder,
    shard_names,
)


def choose(
    meta: DatastoreMeta, shards: Sequence[int] | None, parts: Sequence[int] | None
) -> tuple[int, ...] | None:
    """Numbers of the shards that are meant, ascending; None for all of a datastore."""
    if shards is None and parts is None:
        return None
    if meta.deleted is not None:
        raise ValueError(
            "shards, parts: rows of this datastore are deleted and still in its files; fetch it "
            "whole, or let its owner compact it"
        )
    if shards is not None:
        picked, count, what = {int(n) for n in shards}, len(meta.shards), "shards"
        wrong = sorted(n for n in picked if not 0 <= n < count)
        limits = f"0 to {count - 1}"
    else:
        assert parts is not None
        asked, count, what = {int(n) for n in parts}, len(meta.parts or ()), "parts"
        if meta.parts is None:
            raise ValueError("parts: this datastore was not joined from parts; give shards")
        wrong = sorted(n for n in asked if not 1 <= n <= count)
        limits = f"1 to {count}"
        picked = {n for n, part in enumerate(_part_of(meta)) if part in asked}
    if wrong or not picked:
        got = ", ".join(map(str, wrong)) or "none that have rows"
        raise ValueError(f"{what}: got {got}, want numbers from {limits}")
    return tuple(sorted(picked))


def cut(
    folder: Path, meta: DatastoreMeta, picked: tuple[int, ...], origin: Origin
) -> DatastoreMeta:
    """Make the folder, which holds the picked shards and the documents, a datastore of these.

    Names are given in ascending order, and no file gets a later number than it had: so none takes
    the place of one that is still to be renamed.
    """
    documents = None
    if meta.documents is not None:
        documents = _cut_documents(folder, meta, meta.documents, picked)
    parts, shards = [], []
    owners = _part_of(meta)
    for number, (_, group) in enumerate(groupby(picked, key=lambda n: owners[n]), start=1):
        inner = "" if meta.parts is None else f"{part_folder(number)}/"
        moved = [_rename(folder, meta.shards[n], i, inner) for i, n in enumerate(group)]
        parts.append(PartMeta(part_folder(number), sum(shard.rows for shard in moved)))
        shards += moved
    for left in (*folder.glob("part-*"), *folder.glob("compact-*")):
        if not any(left.iterdir()):
            left.rmdir()
    return replace(
        meta,
        num_entries=sum(shard.rows for shard in shards),
        shards=tuple(shards),
        parts=None if meta.parts is None else tuple(parts),
        documents=documents,
        origin=origin,
        folder=None,
    )


def _part_of(meta: DatastoreMeta) -> list[int]:
    """The part of each shard, from 1; all 0 where there are none."""
    if meta.parts is None:
        return [0] * len(meta.shards)
    counts = [-(-part.rows // meta.entries_per_shard) for part in meta.parts]
    return [number for number, count in enumerate(counts, start=1) for _ in range(count)]


def _rename(folder: Path, shard: ShardMeta, index: int, inner: str) -> ShardMeta:
    files = []
    for file, name in zip((shard.keys, shard.values), shard_names(index), strict=True):
        place = folder / f"{inner}{name}"
        place.parent.mkdir(exist_ok=True)
        (folder / file.file).replace(place)
        files.append(replace(file, file=f"{inner}{name}"))
    return ShardMeta(shard.rows, *files)


def _cut_documents(
    folder: Path, meta: DatastoreMeta, documents: DocumentsMeta, picked: tuple[int, ...]
) -> DocumentsMeta:
    """All documents keep their numbers and names; those without rows here have no hash here."""
    table = DocumentTable(folder, meta)
    offsets = torch.zeros_like(table.offsets)
    first = 0
    for number, shard in enumerate(meta.shards):
        if number in picked:
            offsets += (table.offsets - first).clamp(0, shard.rows)
        first += shard.rows
    starts = offsets[:-1][offsets[:-1] < offsets[-1]].numpy().astype("<i8").tobytes()
    hashes = None
    if documents.hashes is not None:
        content = bytearray((folder / documents.hashes.file).read_bytes())
        for number in (offsets.diff() == 0).nonzero().flatten().tolist():
            content[number * HASH_BYTES : (number + 1) * HASH_BYTES] = bytes(HASH_BYTES)
        hashes = _write(folder, documents.hashes, bytes(content))
    names = (folder / documents.names.file).read_bytes()
    return DocumentsMeta(
        documents.count,
        _write(folder, documents.starts, starts),
        _write(folder, documents.names, names),
        hashes,
    )


def _write(folder: Path, file: FileMeta, content: bytes) -> FileMeta:
    """In the folder itself, also where the file was in another within."""
    name = Path(file.file).name
    replace_file(folder / name, content)
    if name != file.file:
        (folder / file.file).unlink()
    return FileMeta(name, len(content), format_checksum(zlib.crc32(content)))
