"""A datastore in words, for ``knnext info`` and error reports."""

from __future__ import annotations

from pathlib import Path

from knnext.datastore.meta import DTYPE_NAMES, DatastoreMeta, DeletedMeta
from knnext.datastore.meta_file import is_partial, missing_parts, ranges
from knnext.datastore.open_shard import has_old_files
from knnext.say import as_typed, binary_size, shown

#: Of deleted documents and rows; meta.json has a list of them, which is read at each opening.
_MANY_RUNS = 50_000


def describe(path: Path, meta: DatastoreMeta, *, unfinished: bool) -> str:
    """One ``name  value`` line for each fact; sizes in bytes and in the unit that suits."""
    keys = sum(shard.keys.num_bytes for shard in meta.shards)
    values = sum(shard.values.num_bytes for shard in meta.shards)
    lost = 0 if meta.deleted is None else meta.deleted.num_rows
    lines = {
        "datastore": str(path),
        "entries": f"{meta.num_entries - lost:,} in {len(meta.shards):,} shards "
        f"of at most {meta.entries_per_shard:,}",
        "keys": f"{DTYPE_NAMES[meta.dtype]} x {meta.dim:,}, {size(keys)}",
        "values": f"int32, {size(values)}",
        **({} if meta.parts is None else {"parts": _parts(path, meta)}),
        "documents": "not kept" if meta.documents is None else f"{meta.documents.count:,}",
        **({} if meta.deleted is None else {"deleted": _deleted(path, meta, meta.deleted)}),
        **({"old files": _old(path)} if _has_old(path, meta, unfinished) else {}),
        "metric": meta.metric,
        "key_layer": meta.key_layer,
        "model": _with_revision(meta),
        "tokenizer": meta.tokenizer_hash,
        "vocab_size": None if meta.vocab_size is None else f"{meta.vocab_size:,}",
        "corpus": meta.corpus,
        "split": _split(meta),
        "origin": _origin(meta),
        "created": f"{meta.created} by knnext {meta.knnext_version}",
        "state": "unfinished build, last commit shown" if unfinished else _state(path, meta),
    }
    width = max(map(len, lines)) + 2
    # What stands in a file may be anybody's: no line more than there are, and no escapes.
    return "\n".join(f"{name:<{width}}{shown(text or 'unknown')}" for name, text in lines.items())


def lacking(path: Path, meta: DatastoreMeta) -> list[str]:
    """Of keys, values and documents, those of which files are missing in the folder."""
    groups = {
        "keys": [shard.keys for shard in meta.shards],
        "values": [shard.values for shard in meta.shards],
        "documents": [] if meta.documents is None else meta.documents.files(),
    }
    return [
        name
        for name, files in groups.items()
        if not all((path / file.file).is_file() for file in files)
    ]


def _state(path: Path, meta: DatastoreMeta) -> str:
    lacks = lacking(path, meta) if is_partial(path) else []
    if not lacks:
        return "finished"
    return f"some of its files, without {', '.join(lacks)}: `knnext pull` fetches the rest"


def size(num_bytes: int) -> str:
    """``1,073,741,824 bytes (1.00 GiB)``, ``32 bytes``"""
    if num_bytes < 1024:
        return f"{num_bytes} bytes"
    return f"{num_bytes:,} bytes ({binary_size(num_bytes)})"


def _parts(path: Path, meta: DatastoreMeta) -> str:
    count, rows = len(meta.parts or ()), sum(part.rows for part in meta.parts or ())
    if meta.num_entries or not rows:
        return f"{count:,}, joined"
    missing = missing_parts(path, meta)
    lacking = f"missing {ranges(missing)}" if missing else "not joined yet"
    return f"{count - len(missing):,} of {count:,} whole, of {rows:,} entries in all; {lacking}"


def _deleted(path: Path, meta: DatastoreMeta, deleted: DeletedMeta) -> str:
    runs = len(deleted.documents) + len(deleted.rows)
    slow = f" (in {runs:,} runs, which slow down opening)" if runs >= _MANY_RUNS else ""
    return (
        f"{deleted.num_documents:,} of the documents, with {deleted.num_rows:,} of "
        f"{meta.num_entries:,} entries{slow}, which nobody reads and the files still hold: "
        f"`knnext compact {as_typed(path)}`"
    )


def _has_old(path: Path, meta: DatastoreMeta, unfinished: bool) -> bool:
    return not unfinished and has_old_files(path, meta)


def _old(path: Path) -> str:
    return f"of a compacting that was interrupted; `knnext compact {as_typed(path)}` removes them"


def _with_revision(meta: DatastoreMeta) -> str | None:
    if meta.model_id is None or meta.model_revision is None:
        return meta.model_id
    parts = meta.model or {}
    named = [parts.get("dtype"), parts.get("quantization")]
    named += [f"adapter {parts['adapter']}"] if "adapter" in parts else []
    return ", ".join([f"{meta.model_id} at {meta.model_revision}", *filter(None, named)])


def _split(meta: DatastoreMeta) -> str | None:
    text = meta.text
    if text is None:
        return None
    shares = ",".join(f"{share:g}" for share in text.get("shares") or ())
    cap = text.get("max_bytes")
    most = "" if cap is None else f", at most {cap:,} bytes"
    return f"{text.get('split')}, seed {text.get('seed')}, shares {shares}{most}"


def _origin(meta: DatastoreMeta) -> str:
    if meta.origin is None:
        return "built by append"
    return ", ".join(f"{name} {value}" for name, value in meta.origin.items())
