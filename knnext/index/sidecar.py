"""The small file beside a FAISS index that says what it was built from.

An index is worth nothing with another datastore: its ids are row numbers there. FAISS files know
neither the datastore nor, once loaded as inner product, that they were meant for L2. The sidecar
holds both, and opening checks them before a wrong neighbor can be returned.
"""

from __future__ import annotations

import json
import zlib
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from knnext.errors import IndexMismatchError
from knnext.output import write_json

MAGIC = "knnext-faiss-index"
FORMAT_VERSION = 1
_READ_BYTES = 8 << 20


@dataclass(frozen=True)
class Recipe:
    """Everything that decides what an index holds: two builds of one recipe are the same.

    Attributes:
        factory: the FAISS factory string.
        metric: `"l2"` or `"ip"`.
        num_entries: rows of the datastore, all of which are indexed.
        dim: width of a key.
        datastore: fingerprint of the datastore's contents.
        seed: of the training sample and of k-means.
        train_size: rows sampled for training.
        segment_rows: rows a resumable piece.
    """

    factory: str
    metric: str
    num_entries: int
    dim: int
    datastore: str
    seed: int
    train_size: int
    segment_rows: int


@dataclass(frozen=True)
class Sidecar:
    """A finished index: its recipe, how to search it, and its file's size and checksum.

    ``adopted``: of one that another program built, its file and what was checked of it.
    """

    recipe: Recipe
    nprobe: int
    faiss_version: str
    num_bytes: int
    crc32: str
    magic: str = MAGIC
    format_version: int = FORMAT_VERSION
    adopted: dict[str, Any] | None = None

    def write(self, path: Path) -> None:
        """Write as JSON, atomically."""
        content = asdict(self)
        if self.adopted is None:  # as before there were such
            del content["adopted"]
        write_json(path, content)


def read_sidecar(path: Path) -> Sidecar:
    """Read and check the form of a sidecar; contents are compared by the caller."""
    data = read_json(path)
    if data.get("magic") != MAGIC:
        raise IndexMismatchError(f"{path} does not describe a knnext FAISS index")
    if data.get("format_version") != FORMAT_VERSION:
        raise IndexMismatchError(
            f"{path} has format version {data.get('format_version')}, "
            f"this version of knnext reads {FORMAT_VERSION}"
        )
    try:
        return Sidecar(**{**data, "recipe": Recipe(**data["recipe"])})
    except (TypeError, KeyError) as error:
        raise IndexMismatchError(f"{path} is incomplete: {error}") from None


def check_recipe(found: Recipe, wanted: Recipe, path: Path) -> None:
    """Refuse an index whose recipe differs, naming every field that does."""
    differing = [
        f"{field.name} is {getattr(found, field.name)!r}, wanted {getattr(wanted, field.name)!r}"
        for field in fields(Recipe)
        if getattr(found, field.name) != getattr(wanted, field.name)
    ]
    if differing:
        raise IndexMismatchError(
            f"the index at {path} was built from something else: {'; '.join(differing)}. "
            "overwrite=True (--overwrite) discards it"
        )


def file_crc32(path: Path) -> str:
    """CRC-32 of a file, read in pieces."""
    crc = 0
    with path.open("rb") as file:
        while piece := file.read(_READ_BYTES):
            crc = zlib.crc32(piece, crc)
    return f"{crc:08x}"


def read_json(path: Path) -> dict[str, Any]:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise IndexMismatchError(f"{path} is not readable JSON: {error}") from None
    if not isinstance(data, dict):
        raise IndexMismatchError(f"{path} must hold a JSON object")
    return data
