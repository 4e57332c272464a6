"""``meta.json`` and ``build.json`` as bytes, written and read strictly.

The file carries a checksum of itself, because a flipped byte in ``dim`` or ``model_id`` would
otherwise pass for another datastore.
"""

from __future__ import annotations

import json
import zlib
from dataclasses import fields
from pathlib import Path
from typing import Any

from knnext.datastore.errors import (
    CorruptDatastoreError,
    DatastoreError,
    FormatVersionError,
    UnfinishedDatastoreError,
)
from knnext.datastore.files import format_checksum, inside, parse_checksum
from knnext.datastore.meta import (
    BUILD_FILE,
    DTYPE_NAMES,
    FORMAT_VERSION,
    HASH_BYTES,
    HASHES_FILE,
    KEY_DTYPES,
    MAGIC,
    META_FILE,
    NAMES_FILE,
    STARTS_FILE,
    VALUE_BYTES,
    DatastoreMeta,
    DocumentsMeta,
    FileMeta,
    ShardMeta,
    check_parameters,
    shard_names,
)

#: What came to the format after its first datastores; null in none of them, but not there.
_LATER = ("text", "model")


def to_json(meta: DatastoreMeta) -> bytes:
    """The bytes of ``meta.json``: the same meta gives the same bytes."""
    body: dict[str, Any] = {"magic": MAGIC, "format_version": FORMAT_VERSION}
    for field in fields(meta):
        body[field.name] = getattr(meta, field.name)
    for name in _LATER:  # files without them stay as they were, to the byte
        if body[name] is None:
            del body[name]
    body["dtype"] = DTYPE_NAMES[meta.dtype]
    body["documents"] = None if meta.documents is None else _plain(meta.documents)
    body["shards"] = [_plain(shard) for shard in meta.shards]
    body["checksum"] = _self_checksum(body)
    return (json.dumps(body, indent=1, allow_nan=False) + "\n").encode("ascii")


def from_json(content: bytes, where: Path) -> DatastoreMeta:
    """Parse and check ``content``, the bytes of the file ``where``."""
    try:
        body = json.loads(content)
    except ValueError as error:
        raise CorruptDatastoreError(f"{where}: not JSON ({error})", [f"{where}: {error}"]) from None
    if not isinstance(body, dict) or body.get("magic") != MAGIC:
        got = body.get("magic") if isinstance(body, dict) else type(body).__name__
        raise FormatVersionError(
            f"{where}: not a knnext datastore: magic is {got!r}, want {MAGIC!r}"
        )
    if body.get("format_version") != FORMAT_VERSION:
        raise FormatVersionError(
            f"{where}: format version {body.get('format_version')!r}; this knnext reads "
            f"{FORMAT_VERSION}. Open it with the knnext that wrote it"
        )
    stated = body.pop("checksum", None)
    if stated != _self_checksum(body):
        problem = f"{where}: its own checksum does not match; it was damaged or edited by hand"
        raise CorruptDatastoreError(problem, [problem])
    try:
        meta = _parse(body)
        check_parameters(meta)
        _check_layout(meta, where)
    except DatastoreError:
        raise
    except (KeyError, TypeError, ValueError) as error:
        problem = f"{where}: malformed: {type(error).__name__}: {error}"
        raise CorruptDatastoreError(problem, [problem]) from None
    return meta


def _plain(part: Any) -> Any:
    if hasattr(part, "__dataclass_fields__"):
        values = {field.name: _plain(getattr(part, field.name)) for field in fields(part)}
        if values.get("hashes", part) is None:
            del values["hashes"]
        return values
    return part


def _self_checksum(body: dict[str, Any]) -> str:
    canonical = json.dumps(body, sort_keys=True, separators=(",", ":"))
    return format_checksum(zlib.crc32(canonical.encode("ascii")))


def _parse(body: dict[str, Any]) -> DatastoreMeta:
    values = {
        field.name: body[field.name] for field in fields(DatastoreMeta) if field.name not in _LATER
    }
    values |= {name: body.get(name) for name in _LATER}
    values["dtype"] = KEY_DTYPES[body["dtype"]]
    values["shards"] = tuple(
        ShardMeta(int(shard["rows"]), FileMeta(**shard["keys"]), FileMeta(**shard["values"]))
        for shard in body["shards"]
    )
    documents = body["documents"]
    if documents is not None:
        values["documents"] = DocumentsMeta(
            int(documents["count"]),
            FileMeta(**documents["starts"]),
            FileMeta(**documents["names"]),
            FileMeta(**documents["hashes"]) if documents.get("hashes") else None,
        )
    return DatastoreMeta(**values)


def _check_layout(meta: DatastoreMeta, where: Path) -> None:
    """The parts of one meta must agree with each other before any file is opened."""
    for file in meta.files():
        inside(where.parent, file.file)
        parse_checksum(file.checksum)
    for index, shard in enumerate(meta.shards):
        keys, values = shard_names(index)
        _check_part(where, shard.keys, keys, shard.rows * meta.row_bytes)
        _check_part(where, shard.values, values, shard.rows * VALUE_BYTES)
    if meta.documents is not None:
        starts, names = meta.documents.starts, meta.documents.names
        begun = min(int(starts.num_bytes) // 8, meta.documents.count)
        _check_part(where, starts, STARTS_FILE, max(0, begun * 8))
        _check_part(where, names, NAMES_FILE, max(0, int(names.num_bytes)))
        if meta.documents.hashes is not None:
            size = meta.documents.count * HASH_BYTES
            _check_part(where, meta.documents.hashes, HASHES_FILE, size)
    rows = [shard.rows for shard in meta.shards]
    full = all(count == meta.entries_per_shard for count in rows[:-1])
    if sum(rows) != meta.num_entries or not full or any(count < 1 for count in rows):
        problem = f"{where}: its shards hold {rows} rows, want {meta.num_entries:,} in all"
        raise CorruptDatastoreError(problem, [problem])


def _check_part(where: Path, part: FileMeta, name: str, num_bytes: int) -> None:
    if part.file != name or part.num_bytes != num_bytes:
        problem = (
            f"{where}: lists {part.file} with {part.num_bytes!r} bytes, "
            f"want {name} with {num_bytes:,}"
        )
        raise CorruptDatastoreError(problem, [problem])


def read_meta(directory: Path, name: str) -> DatastoreMeta:
    """Read ``meta.json`` (or ``build.json``) of ``directory``. FileNotFoundError if it has none."""
    path = directory / name
    return from_json(path.read_bytes(), path)


def read_finished(directory: Path) -> DatastoreMeta:
    """``meta.json``, or an error that says what the folder is instead."""
    try:
        return read_meta(directory, META_FILE)
    except (FileNotFoundError, NotADirectoryError):
        pass
    if (directory / BUILD_FILE).exists():
        rows = read_meta(directory, BUILD_FILE).num_entries
        raise UnfinishedDatastoreError(
            f"{directory}: the build has not ended ({rows:,} entries committed). Go on with "
            "Datastore.create(..., resume=True), or read what is there with "
            "Datastore.open(path, allow_unfinished=True)"
        )
    what = "has no meta.json" if directory.is_dir() else "does not exist"
    raise DatastoreError(f"{directory}: not a datastore: the folder {what}")
