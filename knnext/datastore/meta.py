"""``meta.json``: what a datastore says about itself, written and read strictly.

The file carries a checksum of itself, because a flipped byte in ``dim`` or ``model_id`` would
otherwise pass for another datastore.
"""

from __future__ import annotations

import json
import os
import sys
import time
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, fields
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from knnext.datastore_errors import (
    CorruptDatastoreError,
    DatastoreError,
    FormatVersionError,
    IncompatibleDatastoreError,
    UnfinishedDatastoreError,
)
from knnext.datastore_files import format_checksum, inside, parse_checksum

MAGIC = "knnext-datastore"
FORMAT_VERSION = 1
META_FILE = "meta.json"
BUILD_FILE = "build.json"

KEY_DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}
DTYPE_NAMES = {dtype: name for name, dtype in KEY_DTYPES.items()}
METRICS = ("l2", "ip")
VALUE_BYTES = 4
INT32_MAX = 2**31 - 1
STARTS_FILE = "document-starts.bin"
NAMES_FILE = "document-names.jsonl"

Origin = Mapping[str, str | int | float | bool]


def shard_names(index: int) -> tuple[str, str]:
    """File names of the keys and of the values of shard ``index``."""
    return f"keys-{index:05d}.bin", f"values-{index:05d}.bin"


@dataclass(frozen=True)
class FileMeta:
    """One file: its name in the folder, its committed bytes, the checksum of those bytes."""

    file: str
    num_bytes: int
    checksum: str


@dataclass(frozen=True)
class ShardMeta:
    """``rows`` consecutive entries: keys (rows, dim) and values (rows,)."""

    rows: int
    keys: FileMeta
    values: FileMeta


@dataclass(frozen=True)
class DocumentsMeta:
    """``count`` documents: names (one JSON string a line) and first rows (int64).

    First rows may be fewer: the last documents then have no rows.
    """

    count: int
    starts: FileMeta
    names: FileMeta


@dataclass(frozen=True)
class DatastoreMeta:
    """Everything in ``meta.json``. ``None`` means: not known to whoever built the datastore."""

    dim: int
    dtype: torch.dtype
    metric: str
    num_entries: int
    entries_per_shard: int
    key_layer: str | None
    model_id: str | None
    model_revision: str | None
    tokenizer_hash: str | None
    vocab_size: int | None
    corpus: str | None
    origin: Origin | None
    created: str
    knnext_version: str
    documents: DocumentsMeta | None
    shards: tuple[ShardMeta, ...]

    @property
    def row_bytes(self) -> int:
        """Bytes of one key."""
        return self.dim * self.dtype.itemsize

    def files(self) -> list[FileMeta]:
        """Every data file, in the order in which they are checked."""
        found = [file for shard in self.shards for file in (shard.keys, shard.values)]
        if self.documents is not None:
            found += [self.documents.starts, self.documents.names]
        return found


# What a resumed build must repeat. The rest follows from the rows, or stays as the first
# attempt wrote it (created, knnext_version), so that a resumed build ends byte-identical.
BUILD_PARAMETERS = (
    "dim", "dtype", "metric", "entries_per_shard", "key_layer", "model_id", "model_revision",
    "tokenizer_hash", "vocab_size", "corpus", "origin",
)  # fmt: skip
# What two datastores must share to be merged: their keys and values mean the same.
MEANING = (
    "dim", "dtype", "metric", "key_layer", "model_id", "model_revision", "tokenizer_hash",
    "vocab_size",
)  # fmt: skip


def check_parameters(meta: DatastoreMeta) -> None:
    """ValueError or TypeError for parameters that no datastore can have."""
    for name in ("dim", "entries_per_shard", "num_entries", "vocab_size"):
        value = getattr(meta, name)
        if value is None and name == "vocab_size":
            continue
        if isinstance(value, bool) or not isinstance(value, int):
            raise TypeError(f"{name}: got {value!r}, want an int")
        if value < (0 if name == "num_entries" else 1):
            raise ValueError(f"{name}: got {value}, want a positive number")
    if meta.vocab_size is not None and meta.vocab_size > INT32_MAX:
        raise ValueError(f"vocab_size: got {meta.vocab_size}, want at most {INT32_MAX}")
    if meta.dtype not in DTYPE_NAMES:
        raise ValueError(f"dtype: got {meta.dtype}, want one of {', '.join(KEY_DTYPES)}")
    if meta.metric not in METRICS:
        raise ValueError(f"metric: got {meta.metric!r}, want 'l2' or 'ip'")
    for name in ("key_layer", "model_id", "model_revision", "tokenizer_hash", "corpus"):
        value = getattr(meta, name)
        if value is not None and not isinstance(value, str):
            raise TypeError(f"{name}: got {value!r}, want a str or None")
    for name, value in (meta.origin or {}).items():
        if not isinstance(name, str) or not isinstance(value, str | int | float):
            raise TypeError(f"origin: got {name!r}: {value!r}, want str, int, float or bool values")


def check_byte_order() -> None:
    if sys.byteorder != "little":
        raise DatastoreError("datastore files are little-endian; this machine is not")


def creation_time() -> str:
    """UTC, or ``SOURCE_DATE_EPOCH`` where a reproducible build sets it."""
    seconds = float(os.environ.get("SOURCE_DATE_EPOCH") or time.time())
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(seconds))


def installed_version() -> str:
    try:
        return metadata.version("knnext")
    except metadata.PackageNotFoundError:  # a source tree on sys.path
        return "0+tree"


def differences(expected: DatastoreMeta, actual: DatastoreMeta, names: tuple[str, ...]) -> str:
    """``"dim: datastore has 8, asked for 9; ..."``, or "" where all of ``names`` agree."""
    found = []
    for name in names:
        want, have = getattr(expected, name), getattr(actual, name)
        if want != have:
            found.append(f"{name}: datastore has {have!r}, asked for {want!r}")
    return "; ".join(found)


def check_same(
    expected: DatastoreMeta, actual: DatastoreMeta, names: tuple[str, ...], where: str
) -> None:
    """IncompatibleDatastoreError naming each of ``names`` in which the two differ."""
    found = differences(expected, actual, names)
    if found:
        raise IncompatibleDatastoreError(f"{where}: {found}")


def to_json(meta: DatastoreMeta) -> bytes:
    """The bytes of ``meta.json``: the same meta gives the same bytes."""
    body: dict[str, Any] = {"magic": MAGIC, "format_version": FORMAT_VERSION}
    for field in fields(meta):
        body[field.name] = getattr(meta, field.name)
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
        return {field.name: _plain(getattr(part, field.name)) for field in fields(part)}
    return part


def _self_checksum(body: dict[str, Any]) -> str:
    canonical = json.dumps(body, sort_keys=True, separators=(",", ":"))
    return format_checksum(zlib.crc32(canonical.encode("ascii")))


def _parse(body: dict[str, Any]) -> DatastoreMeta:
    values = {field.name: body[field.name] for field in fields(DatastoreMeta)}
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
