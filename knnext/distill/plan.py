"""What a folder of distillation data is made with: `distill.json`, which all that go on compare."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from knnext.datastore.claims import when_free
from knnext.datastore.errors import DatastoreError, IncompatibleDatastoreError
from knnext.datastore.files import LOCK_FILE
from knnext.index.row_set import Masked
from knnext.lm.hidden_states import batch_ends
from knnext.output import write_json

if TYPE_CHECKING:
    from knnext.corpus import TokenizedDocuments
    from knnext.evaluation.pieces import Scored
    from knnext.index.base import Index

PLAN_FILE = "distill.json"
FORMAT_VERSION = 1
GRID = ("block_size", "stride", "batch_size")
#: What plans of before did not have, and cannot be compared in.
_LATER = ("documents",)


def shard_name(number: int) -> str:
    return f"tokens-{number:05d}.parquet"


def begun(folder: Path) -> dict[str, Any]:
    """The plan of what is in a folder; nothing where there is none yet."""
    if (folder / PLAN_FILE).is_file():
        return read_plan(folder)
    if folder.exists() and not folder.is_dir():
        raise DatastoreError(f"{folder}: a folder is wanted, this is a file")
    # A kill may have come before the plan was in its place.
    others = list(folder.iterdir()) if folder.is_dir() else []
    if not {file.name for file in others} <= {
        LOCK_FILE,
        *(file.name for file in _unplaced(folder)),
    }:
        raise DatastoreError(f"{folder}: is not empty, and holds no distillation data")
    return {}


def read_plan(folder: Path) -> dict[str, Any]:
    """`distill.json` of a folder; DatastoreError where it is none."""
    place = folder / PLAN_FILE
    try:
        found = json.loads(place.read_text(encoding="utf-8"))
        version = (found["magic"], found["format_version"])
    except (FileNotFoundError, NotADirectoryError):
        raise DatastoreError(f"{folder}: holds no distillation data (no {PLAN_FILE})") from None
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise DatastoreError(f"{place}: is not what `knnext distill` writes: {error}") from None
    if version != ("knnext-distillation", FORMAT_VERSION):
        raise DatastoreError(f"{place}: is {version}, this knnext reads version {FORMAT_VERSION}")
    counts = [*(found.get(name) for name in ("tokens", "top")), *_list(found.get("shards"))]
    if not all(type(n) is int and n > 0 for n in counts) or sum(counts[2:]) != counts[0]:
        raise DatastoreError(f"{place}: is not what `knnext distill` writes: its counts do not add")
    return dict(found)


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def begin(folder: Path, plan: dict[str, Any], known: dict[str, Any]) -> dict[str, Any] | None:
    """Write the plan, or compare it with the one that is there; None once either is done.

    Another plan than the ``known`` one that has come meanwhile, of a process that began beside this
    one, is returned: what was left open is as it has it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with when_free(folder):
        there = begun(folder)
        if there != known:
            return there
        for left in _unplaced(folder):
            left.unlink(missing_ok=True)
        if not there:
            write_json(folder / PLAN_FILE, plan)
    differ = [
        f"{name}: the data has {there.get(name)!r}, asked for {value!r}"
        for name, value in plan.items()
        if there and name != "shards" and there.get(name, _later(name, value)) != value
    ]
    if there and not differ and there["shards"] != plan["shards"]:
        differ = ["shard_tokens: the data was cut at other tokens"]
    if differ:
        raise IncompatibleDatastoreError(f"{folder}: cannot go on with it: {'; '.join(differ)}")
    return None


def _later(name: str, value: Any) -> Any:
    return value if name in _LATER else None


def _unplaced(folder: Path) -> Iterator[Path]:
    """Of plans that a kill came before; see `knnext.output.whole_file`."""
    return folder.glob(f"{PLAN_FILE}.*.part")


def cuts_of(
    tokenized: TokenizedDocuments, windows: dict[str, Any], size: int, scored: Scored
) -> list[tuple[int, int]]:
    """Positions [first, last) of each shard; cut where a batch ends, each with something scored."""
    apart = tokenized.document_offsets if windows["separate_documents"] else None
    grid = {name: int(windows[name]) for name in GRID}
    full = bool(windows["full_last_window"])
    ends = batch_ends(
        len(tokenized.tokens), **grid, separate_documents=apart, full_last_window=full
    ).tolist()
    cuts, first = [], 0
    for end in ends:
        if scored.row(end) - scored.row(first) >= size or end == ends[-1]:
            cuts.append((first, end))
            first = end
    if len(cuts) > 1 and scored.row(cuts[-1][0]) == scored.row(cuts[-1][1]):
        (begin, _), (_, end) = cuts[-2:]
        cuts[-2:] = [(begin, end)]
    return cuts


def facts_of(tokenized: TokenizedDocuments) -> dict[str, str]:
    """By which a text is known again: its tokens, and where which documents are in it."""
    documents = hashlib.sha256(np.asarray(tokenized.document_offsets, dtype="<i8").tobytes())
    if tokenized.hashes is not None:
        documents.update(np.ascontiguousarray(tokenized.hashes).tobytes())
    return {
        "text": f"sha256:{hashlib.sha256(tokenized.tokens.tobytes()).hexdigest()}",
        "documents": f"sha256:{documents.hexdigest()}",
    }


def describe(index: Index) -> str:
    """What decides which neighbors a search finds."""
    sidecar = getattr(index, "sidecar", None)
    if sidecar is None:
        facts = ["exact"] if getattr(index, "refine", True) else ["exact", "not refined"]
    else:
        facts = ["faiss", sidecar.recipe.factory, f"seed {sidecar.recipe.seed}"]
        facts += [f"crc {sidecar.crc32}"]
        facts += [f"{name} {getattr(index, name, None)}" for name in ("nprobe", "rescore")]
    if index.metric != index.datastore.metric:
        facts.append(f"by {index.metric}")
    leaves = getattr(index, "filter", None)
    if leaves is not None:
        digest = hashlib.sha256()
        for part in leaves.shared(index.datastore).parts:
            rows = [part.mask] if isinstance(part, Masked) else [part.starts, part.stops]
            digest.update(repr((type(part).__name__, getattr(part, "keep", None))).encode())
            for array in rows:
                digest.update(np.ascontiguousarray(array).tobytes())
        facts.append(f"filter {digest.hexdigest()[:16]}")
    return ", ".join(facts)
