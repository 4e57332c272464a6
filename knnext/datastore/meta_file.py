"""``meta.json`` and ``build.json`` as bytes, written and read strictly.

The file carries a checksum of itself, because a flipped byte in ``dim`` or ``model_id`` would
otherwise pass for another datastore.
"""

from __future__ import annotations

import json
import zlib
from dataclasses import fields
from itertools import pairwise
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
    DELETED_VERSION,
    DTYPE_NAMES,
    FORMAT_VERSION,
    HASH_BYTES,
    HASHES_FILE,
    KEY_DTYPES,
    MAGIC,
    META_FILE,
    NAMES_FILE,
    PARTIAL_FILE,
    PARTS_VERSION,
    STARTS_FILE,
    VALUE_BYTES,
    DatastoreMeta,
    DeletedMeta,
    DocumentsMeta,
    FileMeta,
    PartMeta,
    ShardMeta,
    check_parameters,
    compact_folder,
    part_folder,
    shard_names,
)
from knnext.say import as_typed

#: What came to the format after its first datastores; null in none of them, but not there.
_LATER = ("text", "model", "parts", "deleted", "audit", "folder")
_VERSIONS = (FORMAT_VERSION, PARTS_VERSION, DELETED_VERSION)


def to_json(meta: DatastoreMeta) -> bytes:
    """The bytes of ``meta.json``: the same meta gives the same bytes."""
    version = FORMAT_VERSION if meta.parts is None else PARTS_VERSION
    if meta.deleted is not None or meta.folder is not None:
        version = DELETED_VERSION
    body: dict[str, Any] = {"magic": MAGIC, "format_version": version}
    for field in fields(meta):
        body[field.name] = getattr(meta, field.name)
    for name in _LATER:  # files without them stay as they were, to the byte
        if body[name] is None:
            del body[name]
    body["dtype"] = DTYPE_NAMES[meta.dtype]
    body["documents"] = None if meta.documents is None else _plain(meta.documents)
    body["shards"] = [_plain(shard) for shard in meta.shards]
    if meta.parts is not None:
        body["parts"] = [_plain(part) for part in meta.parts]
    if meta.deleted is not None:
        body["deleted"] = {n: [list(r) for r in runs] for n, runs in vars(meta.deleted).items()}
    if meta.audit is not None:
        body["audit"] = [dict(entry) for entry in meta.audit]
    body["checksum"] = _self_checksum(body)
    return (json.dumps(body, indent=1, allow_nan=False) + "\n").encode("ascii")


def from_json(content: bytes, where: Path) -> DatastoreMeta:
    """Parse and check ``content``, the bytes of the file ``where``."""
    try:
        body = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise CorruptDatastoreError(f"{where}: not JSON ({error})", [f"{where}: {error}"]) from None
    if not isinstance(body, dict) or body.get("magic") != MAGIC:
        got = body.get("magic") if isinstance(body, dict) else type(body).__name__
        raise FormatVersionError(
            f"{where}: not a knnext datastore: magic is {got!r}, want {MAGIC!r}"
        )
    if body.get("format_version") not in _VERSIONS:
        raise FormatVersionError(
            f"{where}: format version {body.get('format_version')!r}; this knnext reads "
            f"{', '.join(map(str, _VERSIONS))}. Open it with the knnext that wrote it"
        )
    stated = body.pop("checksum", None)
    try:
        if stated != _self_checksum(body):
            raise _corrupt(
                f"{where}: its own checksum does not match; it was damaged or edited by hand"
            )
        meta = _parse(body)
        check_parameters(meta)
        _check_layout(meta, where)
    except DatastoreError:
        raise
    # What stands where a dict or a finite number should is told by whoever asks it for more.
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        raise _corrupt(f"{where}: malformed: {type(error).__name__}: {error}") from None
    return meta


def _corrupt(problem: str) -> CorruptDatastoreError:
    return CorruptDatastoreError(problem, [problem])


def _plain(part: Any) -> Any:
    if hasattr(part, "__dataclass_fields__"):
        values = {field.name: _plain(getattr(part, field.name)) for field in fields(part)}
        if values.get("hashes", part) is None:
            del values["hashes"]
        return values
    return part


def _self_checksum(body: dict[str, Any]) -> str:
    canonical = json.dumps(body, sort_keys=True, separators=(",", ":"), allow_nan=False)
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
    later = values["deleted"] is not None or values["folder"] is not None
    if later != (body["format_version"] == DELETED_VERSION):
        raise ValueError("deleted and folder are there in format version 3, and in no other")
    if not later and (body["format_version"] == PARTS_VERSION) != ("parts" in body):
        raise ValueError("parts are there in format version 2 or 3, and in no other")
    if values["deleted"] is not None:
        runs = {n: tuple((int(a), int(b)) for a, b in r) for n, r in values["deleted"].items()}
        values["deleted"] = DeletedMeta(**runs)
    if values["audit"] is not None:
        values["audit"] = tuple(dict(entry) for entry in values["audit"])
    if values["parts"] is not None:
        values["parts"] = tuple(PartMeta(**part) for part in values["parts"])
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
    folder = meta.folder
    if folder is not None and (meta.parts is not None or folder != _compacted(folder)):
        raise ValueError(f"its files lie in {folder!r}")
    for file in meta.files():
        # Those in folders are compared with the only names that they may have.
        if (meta.parts is None and folder is None) or "/" not in file.file:
            inside(where.parent, file.file)
        parse_checksum(file.checksum)
    _check_deleted(meta)
    if meta.documents is not None:
        starts, names = meta.documents.starts, meta.documents.names
        begun = min(int(starts.num_bytes) // 8, meta.documents.count)
        _check_part(where, starts, meta.prefix + STARTS_FILE, max(0, begun * 8))
        _check_part(where, names, meta.prefix + NAMES_FILE, max(0, int(names.num_bytes)))
        if meta.documents.hashes is not None:
            size = meta.documents.count * HASH_BYTES
            _check_part(where, meta.documents.hashes, meta.prefix + HASHES_FILE, size)
    if meta.parts is None:
        _check_shards(meta, where, meta.shards, meta.prefix, meta.num_entries)
    else:
        _check_parts(meta, where, meta.parts)


def _compacted(folder: str) -> str:
    number = folder.rpartition("-")[2]
    return compact_folder(int(number)) if number.isdecimal() else ""


def _check_deleted(meta: DatastoreMeta) -> None:
    if meta.deleted is None:
        return
    if meta.documents is None:
        raise ValueError("documents are deleted, and there are none")
    for name, runs, count in (
        ("documents", meta.deleted.documents, meta.documents.count),
        ("rows", meta.deleted.rows, meta.num_entries),
    ):
        bounds = [bound for run in runs for bound in run]
        if any(a >= b for a, b in pairwise(bounds)) or (bounds and not bounds[0] >= 0):
            raise ValueError(f"runs of deleted {name} do not ascend")
        if bounds and bounds[-1] > count:
            raise ValueError(f"{name} up to {bounds[-1]} are deleted, of {count}")


def _check_parts(meta: DatastoreMeta, where: Path, parts: tuple[PartMeta, ...]) -> None:
    joined, left = bool(meta.num_entries or meta.shards), meta.shards
    for number, part in enumerate(parts, start=1):
        if isinstance(part.rows, bool) or not isinstance(part.rows, int) or part.rows < 0:
            raise ValueError(f"part {number} has {part.rows!r} rows")
        if part.folder != part_folder(number):
            raise ValueError(f"part {number} lies in {part.folder!r}")
        count = -(-part.rows // meta.entries_per_shard) if joined else 0
        wanted = part.rows if joined else 0
        _check_shards(meta, where, left[:count], f"{part.folder}/", wanted)
        left = left[count:]
    rows = sum(part.rows for part in parts)
    if left or not parts or (joined and rows != meta.num_entries):
        raise _corrupt(
            f"{where}: its {len(parts)} parts hold {rows:,} rows, want {meta.num_entries:,}"
        )


def _check_shards(
    meta: DatastoreMeta, where: Path, shards: tuple[ShardMeta, ...], folder: str, wanted: int
) -> None:
    """``shards`` hold the ``wanted`` rows of one part, or of a whole."""
    for index, shard in enumerate(shards):
        keys, values = shard_names(index)
        _check_part(where, shard.keys, folder + keys, shard.rows * meta.row_bytes)
        _check_part(where, shard.values, folder + values, shard.rows * VALUE_BYTES)
    rows = [shard.rows for shard in shards]
    full = all(count == meta.entries_per_shard for count in rows[:-1])
    if sum(rows) != wanted or not full or any(count < 1 for count in rows):
        told = f"{rows[:8]}{' and on' if len(rows) > 8 else ''} rows"
        raise _corrupt(f"{where}: its shards hold {told}, want {wanted:,} in all")


def _check_part(where: Path, part: FileMeta, name: str, num_bytes: int) -> None:
    if part.file != name or part.num_bytes != num_bytes:
        raise _corrupt(
            f"{where}: lists {part.file} with {part.num_bytes!r} bytes, "
            f"want {name} with {num_bytes:,}"
        )


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
        meta = read_meta(directory, BUILD_FILE)
        raise UnfinishedDatastoreError(
            f"{directory}: the build has not ended ({meta.num_entries:,} entries committed). Go on "
            "with Datastore.create(..., resume=True), or read what is there with "
            "Datastore.open(path, allow_unfinished=True)"
            if meta.parts is None
            else not_joined(directory, meta)
        )
    if is_partial(directory):
        raise UnfinishedDatastoreError(
            f"{directory}: holds some files of a datastore, as `knnext pull --only` fetches them: "
            "`knnext pull` without --only fetches the rest; knnext.hub.open_partial opens what is "
            "there"
        )
    what = "has no meta.json" if directory.is_dir() else "does not exist"
    raise DatastoreError(f"{directory}: not a datastore: the folder {what}")


def is_partial(directory: Path) -> bool:
    """Whether a folder holds some files of a datastore, and is none."""
    return (directory / PARTIAL_FILE).is_file() and not (directory / META_FILE).is_file()


def missing_parts(directory: Path, meta: DatastoreMeta) -> list[int]:
    """Numbers, from 1, of the parts that are not whole yet."""
    parts = enumerate(meta.parts or (), start=1)
    return [n for n, part in parts if not (directory / part.folder / META_FILE).is_file()]


def not_joined(directory: Path, meta: DatastoreMeta) -> str:
    """What a datastore in parts lacks, and the commands that make it."""
    missing, count = missing_parts(directory, meta), len(meta.parts or ())
    if not missing:
        join = f"knnext join {as_typed(directory)}"
        return f"{directory}: its {count} parts are whole and not joined: `{join}`"
    return (
        f"{directory}: of its {count} parts {count - len(missing)} are whole; missing: "
        f"{ranges(missing)}. The `knnext build {as_typed(directory)}` of the others makes each "
        f"with --part {missing[0]}/{count}{' and so on' if len(missing) > 1 else ''}, or all "
        f"that are missing with --parts {count}"
    )


def ranges(numbers: list[int], most: int = 20) -> str:
    """``"1, 3-5, 9"`` of ascending numbers."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and runs[-1][1] + 1 == number:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    said = [str(a) if a == b else f"{a}-{b}" for a, b in runs[:most]]
    return ", ".join(said) + (" and more" if len(runs) > most else "")
