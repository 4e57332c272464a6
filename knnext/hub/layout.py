"""Where the files of a datastore lie in a repository, and where here.

meta.json, keys-00000.bin, values-00000.bin, document-*   the datastore, as in its folder
part-00001/keys-00000.bin                                 of one that was joined from parts
compact-00001/...                                         of one that was compacted
codes/ codes.json, center.bin, codes.bin, stats.bin       the folder S.codes beside it
index/ index.json, index.faiss                            the folder S.index beside it
tuning.json                                               the file S.tuning.json beside it
README.md                                                 the card
"""

from __future__ import annotations

import json
import math
import re
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from knnext.datastore.files import parse_checksum
from knnext.datastore.meta import DatastoreMeta, FileMeta
from knnext.evaluation.tuning_file import tuning_path
from knnext.index import codes_meta, faiss_build
from knnext.index.sidecar import read_sidecar

CARD_FILE, TUNING_FILE = "README.md", "tuning.json"
CODES_FOLDER, INDEX_FOLDER = "codes", "index"
#: What a datastore consists of, and what may lie beside it.
ROWS = ("keys", "values", "documents")
EXTRAS = ("codes", "index", "tuning")
GROUPS = (*ROWS, *EXTRAS)

_OURS = re.compile(
    r"meta\.json|tuning\.json|(compact-\d{5}/)?document-(starts\.bin|names\.jsonl|hashes\.bin)"
    r"|((part|compact)-\d{5}/)?(keys|values)-\d{5}\.bin"
    r"|codes/(codes\.json|center\.bin|codes\.bin|stats\.bin)|index/index\.(json|faiss)"
)


@dataclass(frozen=True)
class Item:
    """A file: its place in a repository, its bytes and their checksum.

    Attributes:
        group: of `GROUPS`.
        shard: its number, of keys and values.
    """

    group: str
    path: str
    num_bytes: int
    checksum: str
    shard: int | None = None


def is_ours(path: str) -> bool:
    """Whether a file of this name in a repository is one that a push writes, but for the card."""
    return _OURS.fullmatch(path) is not None


def beside(folder: Path, group: str) -> Path:
    """Where codes, index or tuning of the datastore in ``folder`` lie."""
    folder = folder.resolve()
    return tuning_path(folder) if group == "tuning" else folder.with_name(f"{folder.name}.{group}")


def check_groups(names: Iterable[str], known: tuple[str, ...], what: str) -> tuple[str, ...]:
    """The groups that are named; "all" is all that there are."""
    given = tuple(dict.fromkeys([names] if isinstance(names, str) else names))
    given = known if given == ("all",) else given
    wrong = [name for name in given if name not in known]
    if wrong or not given:
        raise ValueError(f"{what}: got {', '.join(wrong) or 'none'}, want of {', '.join(known)}")
    return given


def row_items(meta: DatastoreMeta) -> list[Item]:
    """The files of the datastore itself, but for its meta."""
    found = []
    for number, shard in enumerate(meta.shards):
        for group, file in (("keys", shard.keys), ("values", shard.values)):
            found.append(_item(group, "", file, number))
    files = [] if meta.documents is None else meta.documents.files()
    return found + [_item("documents", "", file) for file in files]


def codes_items(content: bytes, fingerprint: str) -> list[Item]:
    """Files of the codes that a ``codes.json`` describes, which must be of this datastore."""
    with tempfile.TemporaryDirectory(prefix="knnext-codes-") as folder:
        place = Path(folder) / codes_meta.META_FILE
        place.write_bytes(content)
        meta = codes_meta.read_meta(place)
    if meta.datastore != fingerprint:
        raise ValueError(f"{codes_meta.META_FILE} is of another datastore")
    return [_item("codes", f"{CODES_FOLDER}/", file) for file in meta.files()]


def index_items(content: bytes, fingerprint: str) -> list[Item]:
    """The file of the FAISS index that an ``index.json`` describes, which must be of this one."""
    with tempfile.TemporaryDirectory(prefix="knnext-index-") as folder:
        place = Path(folder) / faiss_build.SIDECAR_FILE
        place.write_bytes(content)
        sidecar = read_sidecar(place)
    if sidecar.recipe.datastore != fingerprint:
        raise ValueError(f"{faiss_build.SIDECAR_FILE} is of another datastore")
    size, checksum = sidecar.num_bytes, f"crc32:{sidecar.crc32}"
    if isinstance(size, bool) or not isinstance(size, int) or size < 0:
        raise ValueError(f"{faiss_build.SIDECAR_FILE} speaks of {size!r} bytes")
    parse_checksum(checksum)
    return [Item("index", f"{INDEX_FOLDER}/{faiss_build.INDEX_FILE}", size, checksum)]


#: The file that says what a group holds, in a repository.
HEADS = {
    "codes": f"{CODES_FOLDER}/{codes_meta.META_FILE}",
    "index": f"{INDEX_FOLDER}/{faiss_build.SIDECAR_FILE}",
    "tuning": TUNING_FILE,
}


def _item(group: str, folder: str, file: FileMeta, shard: int | None = None) -> Item:
    return Item(group, folder + file.file, file.num_bytes, file.checksum, shard)


def check_fit(content: bytes, where: str) -> dict[str, Any]:
    """A fit that `knnext tune` wrote, with numbers where it has numbers; else a ValueError."""
    try:
        found = json.loads(content)
        numbers = [found["temperature"], found["lmbda"]]
        good = all(type(n) in (int, float) and math.isfinite(n) for n in numbers)
        good = good and found["temperature"] > 0 and 0 <= found["lmbda"] <= 1
        counts = [found["k"], 1 if found["nprobe"] is None else found["nprobe"]]
        good = good and all(type(n) is int and n > 0 for n in counts)
        good = good and found["index"] in ("exact", "faiss")
        good = good and found["rescore"] in (None, False, True)
    except (ValueError, KeyError, TypeError, RecursionError):
        good = False
    if not good:
        raise ValueError(f"{where} is not what `knnext tune` writes")
    return dict(found)
