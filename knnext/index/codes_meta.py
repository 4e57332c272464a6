"""What stored codes say of themselves, and whether they are those of a datastore.

docs/datastore-format.md specifies every byte.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from shutil import disk_usage
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from knnext.datastore.errors import (
    CorruptDatastoreError,
    DatastoreError,
    DatastoreFullError,
    DatastoreWriteError,
)
from knnext.datastore.files import (
    check_file,
    file_checksum,
    format_checksum,
    parse_checksum,
)
from knnext.datastore.meta import FileMeta
from knnext.errors import FULL, IndexMismatchError
from knnext.index.sidecar import read_json
from knnext.say import as_typed

if TYPE_CHECKING:
    from knnext.datastore import Datastore

MAGIC = "knnext-codes"
FORMAT_VERSION = 1
#: The rotation and the rounding: codes of another coding need another reader.
CODING = "signs-hadamard-twice int8"
META_FILE, BUILD_FILE = "codes.json", "build.json"
CENTER_FILE, CODES_FILE, STATS_FILE = "center.bin", "codes.bin", "stats.bin"
STATS_BYTES = 12  # of a row: scale, error, norm in float32
HOW_TO_MAKE = "run `knnext index {} --kind codes`"


def codes_bytes(rows: int, dim: int) -> int:
    """Of the codes of so many keys on disk, and of the center that they share."""
    return rows * (dim + STATS_BYTES) + 4 * dim


@dataclass(frozen=True)
class CodesMeta:
    """Everything in ``codes.json``; ``build.json`` is the same of an encoding that goes on.

    Attributes:
        dim: bytes of a code.
        num_entries: rows that are encoded.
        datastore: fingerprint of the datastore whose rows they are (or are to be).
        key_files: its files of keys: (bytes, checksum) of each.
        center_rows: rows whose mean is the center.
    """

    dim: int
    num_entries: int
    datastore: str
    key_files: tuple[tuple[int, str], ...]
    center_rows: int
    center: FileMeta
    codes: FileMeta
    stats: FileMeta
    created: str
    knnext_version: str

    def files(self) -> tuple[FileMeta, ...]:
        return self.center, self.codes, self.stats

    def to_json(self) -> bytes:
        body: dict[str, Any] = {"magic": MAGIC, "format_version": FORMAT_VERSION, "coding": CODING}
        body |= asdict(self) | {"key_files": [list(file) for file in self.key_files]}
        body["checksum"] = _self_checksum(body)
        return (json.dumps(body, indent=1) + "\n").encode("ascii")


def key_files(datastore: Datastore) -> tuple[tuple[int, str], ...]:
    return tuple((shard.keys.num_bytes, shard.keys.checksum) for shard in datastore.meta.shards)


def read_meta(path: Path) -> CodesMeta:
    """The file, checked against itself; FileNotFoundError where there is none."""
    body = read_json(path)
    if body.get("magic") != MAGIC:
        raise IndexMismatchError(f"{path} does not describe codes of knnext")
    found = body.pop("format_version", None), body.pop("coding", None)
    if found != (FORMAT_VERSION, CODING):
        raise IndexMismatchError(
            f"{path} has format version and coding {found}, this version of knnext reads "
            f"{(FORMAT_VERSION, CODING)}"
        )
    stated = body.pop("checksum", None)
    body |= {"format_version": found[0], "coding": found[1]}
    if stated != _self_checksum(body):
        raise IndexMismatchError(
            f"{path}: its own checksum does not match; it was damaged or edited by hand"
        )
    try:
        meta = parse_meta(body)
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise IndexMismatchError(f"{path} is malformed: {error}") from None
    return meta


def _self_checksum(body: dict[str, Any]) -> str:
    canonical = json.dumps(body, sort_keys=True, separators=(",", ":"))
    return format_checksum(zlib.crc32(canonical.encode("ascii")))


def parse_meta(body: dict[str, Any]) -> CodesMeta:
    """KeyError, TypeError or ValueError for what is no meta."""
    values = {field.name: body[field.name] for field in fields(CodesMeta)}
    values["key_files"] = tuple((int(size), str(crc)) for size, crc in values["key_files"])
    for name in ("center", "codes", "stats"):
        values[name] = FileMeta(**values[name])
    meta = CodesMeta(**values)
    _check_layout(meta)
    return meta


def _check_layout(meta: CodesMeta) -> None:
    rows, dim = meta.num_entries, meta.dim
    sizes = (4 * dim, rows * dim, rows * STATS_BYTES)
    wanted = zip((CENTER_FILE, CODES_FILE, STATS_FILE), sizes, strict=True)
    for file, (name, size) in zip(meta.files(), wanted, strict=True):
        parse_checksum(file.checksum)
        if (file.file, file.num_bytes) != (name, size):
            raise ValueError(
                f"it lists {file.file} with {file.num_bytes!r} bytes, want {name} with {size:,}"
            )


def check_datastore(meta: CodesMeta, datastore: Datastore, folder: Path) -> None:
    """Refuse codes of other rows than the datastore's, a view of it included."""
    whole = datastore.meta
    found = (meta.datastore, meta.dim, meta.num_entries)
    if found != (datastore.stored_fingerprint, whole.dim, whole.num_entries):
        raise IndexMismatchError(
            f"{folder} holds codes of another datastore, or of an earlier state of "
            f"{datastore.path} ({meta.num_entries:,} rows, now {whole.num_entries:,}): "
            + HOW_TO_MAKE.format(as_typed(datastore.path))
        )


def check_continues(meta: CodesMeta, datastore: Datastore, folder: Path) -> None:
    """Refuse to go on where the rows that were encoded are not the datastore's first ones."""
    now = key_files(datastore)
    same = meta.dim == datastore.dim and len(meta.key_files) <= len(now)
    for number, (before, after) in enumerate(zip(meta.key_files, now, strict=False)):
        same = same and (before == after or _is_start(before, number, len(meta.key_files), now))
        if same and before != after:  # a shard that grew since
            path = datastore.path / datastore.meta.shards[number].keys.file
            same = file_checksum(path, before[0]) == parse_checksum(before[1])
    if not same:
        raise IndexMismatchError(
            f"{folder} holds codes of another datastore than {datastore.path} is now; "
            "discard them with overwrite=True (--overwrite)"
        )


def _is_start(
    before: tuple[int, str], number: int, count: int, now: Sequence[tuple[int, str]]
) -> bool:
    """Whether a file of keys may be the beginning of the one there is now: the last, and longer."""
    return number == count - 1 and before[0] < now[number][0]


def check_sizes(meta: CodesMeta, folder: Path) -> None:
    try:
        for file in meta.files():
            check_file(folder / file.file, file.num_bytes)
    except DatastoreError as error:
        raise damaged(str(error)) from None


def check_content(folder: Path, *files: FileMeta) -> None:
    """Compare checksums, which reads every byte."""
    for file in files:
        path = folder / file.file
        try:
            check_file(path, file.num_bytes)
        except CorruptDatastoreError as error:
            raise damaged(str(error)) from None
        if file_checksum(path, file.num_bytes) != parse_checksum(file.checksum):
            raise damaged(f"{path} is damaged: its content has changed (checksum)")


def damaged(what: str) -> IndexMismatchError:
    """Says what to do about it."""
    return IndexMismatchError(f"{what}; encode again with overwrite=True (--overwrite)")


def read_center(folder: Path) -> Tensor:
    """(dim,) float32."""
    content = bytearray((folder / CENTER_FILE).read_bytes())
    return torch.frombuffer(content, dtype=torch.float32)


@contextmanager
def naming_the_disk(folder: Path, total: int, done: Callable[[], int]) -> Iterator[None]:
    """Within, an OSError is a DatastoreWriteError that says what stands: ``done()`` of the rows."""
    try:
        yield
    except OSError as error:
        free = disk_usage(folder).free
        kind = DatastoreFullError if error.errno in FULL else DatastoreWriteError
        raise kind(
            f"{folder}: {error.strerror or error} after {done():,} of {total:,} rows "
            f"({free:,} bytes free on this disk). Nothing written before is lost: make room and "
            "encode again, which goes on from there"
        ) from error
