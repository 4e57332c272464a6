"""What a datastore says about itself: what it holds, where from, in which files."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import metadata
from typing import Any

import torch

from knnext.datastore.errors import (
    DatastoreError,
    IncompatibleDatastoreError,
)
from knnext.lm.config_facts import settings_differences

MAGIC = "knnext-datastore"
FORMAT_VERSION = 1
#: Of datastores that are joined from parts, which no reader of version 1 could find.
PARTS_VERSION = 2
#: Of datastores that readers of the versions before would read wrongly: with deleted rows, whose
#: files are still there, or with files in a folder of their own, as compacting leaves them.
DELETED_VERSION = 3
META_FILE = "meta.json"
BUILD_FILE = "build.json"
#: In place of meta.json, in a folder that holds some files of a datastore (knnext/hub).
PARTIAL_FILE = "partial.json"

KEY_DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}
DTYPE_NAMES = {dtype: name for name, dtype in KEY_DTYPES.items()}
METRICS = ("l2", "ip")
VALUE_BYTES = 4
INT32_MAX = 2**31 - 1
STARTS_FILE = "document-starts.bin"
NAMES_FILE = "document-names.jsonl"
HASHES_FILE = "document-hashes.bin"
HASH_BYTES = 16
_SHARD_BYTES = 1 << 30  # of keys in a shard, where nobody says otherwise

Origin = Mapping[str, str | int | float | bool]
#: Part by part what the states depend on, to name what differs (`knnext.lm.load.model_parts`).
ModelParts = Mapping[str, str]
#: Which text the rows are of: `knnext.corpus.SplitFacts` as plain values.
TextFacts = Mapping[str, Any]


def shard_names(index: int) -> tuple[str, str]:
    """File names of the keys and of the values of shard ``index``."""
    return f"keys-{index:05d}.bin", f"values-{index:05d}.bin"


def part_folder(number: int) -> str:
    """The folder of part ``number``, counted from 1."""
    return f"part-{number:05d}"


def compact_folder(number: int) -> str:
    """The folder of the files of the ``number``-th compacting."""
    return f"compact-{number:05d}"


@dataclass(frozen=True)
class FileMeta:
    """One file: its name in the folder, its committed bytes, the checksum of those bytes.

    Of a shard of a joined datastore the name begins with the part's folder and a slash.
    """

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
class PartMeta:
    """A part of a joined datastore: the folder, in its own, of a datastore of ``rows`` rows."""

    folder: str
    rows: int


@dataclass(frozen=True)
class DeletedMeta:
    """What is deleted, and still in the files: ids of documents and stored rows, in runs.

    Runs are [first, stop), ascending and disjoint.
    """

    documents: tuple[tuple[int, int], ...]
    rows: tuple[tuple[int, int], ...]

    @property
    def num_documents(self) -> int:
        return sum(stop - first for first, stop in self.documents)

    @property
    def num_rows(self) -> int:
        return sum(stop - first for first, stop in self.rows)


@dataclass(frozen=True)
class DocumentsMeta:
    """``count`` documents: names (one JSON string a line), first rows (int64), perhaps hashes.

    First rows may be fewer: the last documents then have no rows. ``hashes``: 16 bytes a document,
    zeros where nobody told; None in datastores that were begun without.
    """

    count: int
    starts: FileMeta
    names: FileMeta
    hashes: FileMeta | None = None

    def files(self) -> list[FileMeta]:
        return [file for file in (self.starts, self.names, self.hashes) if file is not None]


@dataclass(frozen=True)
class DatastoreMeta:
    """Everything in ``meta.json``. ``None`` means: not known to whoever built the datastore.

    ``parts`` are those that a datastore is joined from, or is to be: until then it has no rows.
    ``num_entries`` counts the rows in the files, also those that are ``deleted``; ``audit`` tells
    what was deleted and compacted, and when. ``folder`` is where the files lie, if not in the
    datastore's own.
    """

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
    text: TextFacts | None = None
    model: ModelParts | None = None
    parts: tuple[PartMeta, ...] | None = None
    deleted: DeletedMeta | None = None
    audit: tuple[Mapping[str, Any], ...] | None = None
    folder: str | None = None

    @property
    def prefix(self) -> str:
        """What the names of its files begin with."""
        return "" if self.folder is None else f"{self.folder}/"

    @property
    def row_bytes(self) -> int:
        """Bytes of one key."""
        return self.dim * self.dtype.itemsize

    def files(self) -> list[FileMeta]:
        """Every data file, in the order in which they are checked."""
        found = [file for shard in self.shards for file in (shard.keys, shard.values)]
        if self.documents is not None:
            found += self.documents.files()
        return found


def new_meta(
    dim: int,
    dtype: torch.dtype,
    entries_per_shard: int | None = None,
    *,
    origin: Origin | None = None,
    text: TextFacts | None = None,
    model: ModelParts | None = None,
    **facts: Any,
) -> DatastoreMeta:
    """Of a datastore that begins now; ``Datastore.create`` tells what the arguments are."""
    check_byte_order()
    if not isinstance(dim, int) or not isinstance(dtype, torch.dtype):
        raise TypeError(f"dim, dtype: got {dim!r}, {dtype!r}, want an int and a torch.dtype")
    fitting = max(1, _SHARD_BYTES // max(1, dim * dtype.itemsize))
    return DatastoreMeta(
        dim=dim,
        dtype=dtype,
        num_entries=0,
        entries_per_shard=fitting if entries_per_shard is None else entries_per_shard,
        origin=None if origin is None else dict(origin),
        created=creation_time(),
        knnext_version=installed_version(),
        documents=None,
        shards=(),
        text=None if text is None else dict(text),
        model=None if model is None else dict(model),
        **facts,
    )


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
    for name in ("created", "knnext_version"):
        if not isinstance(getattr(meta, name), str):
            raise TypeError(f"{name}: got {getattr(meta, name)!r}, want a str")
    for name in ("origin", "model", "text"):
        value = getattr(meta, name)
        if value is not None and not isinstance(value, Mapping):
            raise TypeError(f"{name}: got {value!r}, want a dict or None")
    for name, value in (meta.origin or {}).items():
        if not isinstance(name, str) or not isinstance(value, str | int | float):
            raise TypeError(f"origin: got {name!r}: {value!r}, want str, int, float or bool values")
    for name, value in (meta.model or {}).items():
        if not isinstance(name, str) or not isinstance(value, str):
            raise TypeError(f"model: got {name!r}: {value!r}, want strings")
    for name, value in (meta.text or {}).items():
        values = value if isinstance(value, list) else [value]
        if not isinstance(name, str) or not all(
            v is None or isinstance(v, str | int | float) for v in values
        ):
            raise TypeError(f"text: got {name!r}: {value!r}, want plain values or lists of them")
    shares, cap = (meta.text or {}).get("shares"), (meta.text or {}).get("max_bytes")
    numbers = shares if isinstance(shares, list | tuple) else () if shares is None else ("",)
    if not all(isinstance(n, int | float) for n in numbers) or not isinstance(cap, int | None):
        raise TypeError(f"text: got shares {shares!r} and max_bytes {cap!r}, want numbers")


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
        if want != have and name == "origin" and want and have:
            found += [
                f"origin, {key}: datastore has {have.get(key)!r}, asked for {want.get(key)!r}"
                for key in dict.fromkeys([*have, *want])
                if have.get(key) != want.get(key)
            ]
        elif want != have:
            found.append(f"{name}: datastore has {have!r}, asked for {want!r}")
            if name == "model_revision" and (
                why := model_differences(actual.model, expected.model)
            ):
                found.append(why)
        elif name == "model_revision":
            found += settings_differences(actual.model, expected.model)
    return "; ".join(found)


def model_differences(stored: ModelParts | None, asked: ModelParts | None) -> str:
    """In which parts two models differ that are not the same, "" where that is not known.

    Weights that are other numbers because of their dtype, quantization or a merged adapter are not
    named beside it.
    """
    if not stored or not asked:
        return ""
    names = [n for n in ("dtype", "quantization", "adapter") if stored.get(n) != asked.get(n)]
    merged = any("merged" in (side.get("adapter") or "") for side in (stored, asked))
    explained = {"dtype", "quantization"} & set(names) or ("adapter" in names and merged)
    if stored.get("weights") != asked.get("weights") and not explained:
        names.append("weights")
    if "weights" in names and stored.get("commit") != asked.get("commit"):
        names.append("commit")
    return "; ".join(
        f"the models differ in {name}: datastore has {stored.get(name, 'none')}, "
        f"asked for {asked.get(name, 'none')}"
        for name in names
    )


def check_same_text(asked: TextFacts | None, stored: TextFacts | None, where: str) -> bool:
    """Whether both are known to be one text; IncompatibleDatastoreError naming what differs."""
    if asked is None or stored is None:
        return False
    documents = asked.get("documents")
    if asked == stored or (documents is not None and documents == stored.get("documents")):
        return True
    differ = [
        f"{name}: datastore has {stored.get(name)!r}, asked for {value!r}"
        for name, value in asked.items()
        if value != stored.get(name) and name != "documents"
    ]
    reason = "; ".join(differ) or "its documents have changed since then"
    raise IncompatibleDatastoreError(f"{where}: it was begun with another text: {reason}")


def check_same_build(expected: DatastoreMeta, actual: DatastoreMeta, where: str) -> None:
    """IncompatibleDatastoreError naming what differs, unless both are of one build."""
    same_text = check_same_text(expected.text, actual.text, where)
    # The same documents may have moved to another folder since.
    wanted = tuple(n for n in BUILD_PARAMETERS if not (same_text and n == "corpus"))
    check_same(expected, actual, wanted, where)


def check_same(
    expected: DatastoreMeta, actual: DatastoreMeta, names: tuple[str, ...], where: str
) -> None:
    """IncompatibleDatastoreError naming each of ``names`` in which the two differ."""
    found = differences(expected, actual, names)
    if found:
        raise IncompatibleDatastoreError(f"{where}: {found}")
