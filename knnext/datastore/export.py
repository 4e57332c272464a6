"""The rows of a datastore in formats that other programs read. Rows stream; memory is bounded.

Every format gives keys (n, D), values (n,) int32 and, where the datastore has documents, the
document of each row (n,) int32, beside ``datastore.json``: what the datastore says of itself, and
the names of its documents. float16 and float32 keys stay what they are. bfloat16 stays in
safetensors; NumPy and Parquet have no such type, so there it becomes float32, which holds every
bfloat16 exactly.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from knnext.datastore.copy import chunk_rows
from knnext.datastore.files import sync_directory
from knnext.datastore.meta import DTYPE_NAMES, VALUE_BYTES
from knnext.datastore.reader import DatastoreReader
from knnext.datastore.room import check_disk
from knnext.datastore.verify import Progress
from knnext.errors import missing_package
from knnext.output import scratch_folder, whole_file, write_text

FACTS_FILE = "datastore.json"
#: Of keys in one file of safetensors, which is held in memory while it is written.
_FILE_BYTES = 256 << 20
_DOCUMENT_BYTES = 4

Rows = tuple[Tensor, Tensor, Tensor | None]  # keys, values, documents


def export_rows(
    store: DatastoreReader,
    path: str | Path,
    file_format: str,
    *,
    file_bytes: int = _FILE_BYTES,
    progress: Progress | None = None,
) -> list[Path]:
    """Writes all rows into the new folder ``path`` and returns its files; whole or not at all.

    What an export to the same place left that was killed is removed first.

    Args:
        store: a datastore or a view of one.
        path: a folder that does not exist yet.
        file_format: ``"npy"``: keys.npy, values.npy and documents.npy, which NumPy can map;
            ``"safetensors"``: rows-00000.safetensors and on, of about ``file_bytes`` of keys each;
            ``"parquet"``: rows.parquet, with a key as a list of D numbers.
        file_bytes: keys held in memory at once for safetensors.
        progress: is called with the rows that are done, and all.

    Raises:
        ValueError: for an unknown format, or one file's bytes below a row.
        FileExistsError: where ``path`` exists.
        ImportError: where the format's package is missing; it says what to install.
        DatastoreFullError: where the disk has not the room, before anything is written.
    """
    path = Path(path)
    if file_format not in _WRITERS:
        names = ", ".join(_WRITERS)
        raise ValueError(f"file_format must be one of {names}, got {file_format!r}")
    if path.exists() or path.is_symlink():
        raise FileExistsError(f"{path} exists; an export wants a new folder")
    width = store.dim * _dtype(store, file_format).itemsize
    if file_bytes < width:
        raise ValueError(f"file_bytes must hold a key of {width} bytes, got {file_bytes}")
    documents = _DOCUMENT_BYTES if store.num_documents else 0
    needed = len(store) * (width + VALUE_BYTES + documents)
    check_disk(path, needed, f"an export of {len(store):,} rows", "give another place")
    path.parent.mkdir(parents=True, exist_ok=True)
    # Of this export alone: another one into the same place must not find its files half-written.
    with scratch_folder(path) as part:
        _WRITERS[file_format](store, part, file_bytes, progress or (lambda done, total: None))
        write_text(part / FACTS_FILE, json.dumps(_facts(store), indent=1) + "\n")
        try:
            part.rename(path)
            sync_directory(path.absolute().parent)
        except OSError as error:
            if path.exists():
                raise FileExistsError(
                    f"{path} was made meanwhile; this export is dropped"
                ) from error
            raise
    return sorted(path.iterdir())


def _facts(store: DatastoreReader) -> dict[str, Any]:
    meta = store.meta
    facts = {
        "rows": len(store),
        "dim": store.dim,
        "key_dtype": DTYPE_NAMES[store.dtype],
        "metric": store.metric,
        "key_layer": store.key_layer,
        "vocab_size": store.vocab_size,
        "model_id": meta.model_id,
        "model_revision": meta.model_revision,
        "tokenizer_hash": meta.tokenizer_hash,
        "corpus": meta.corpus,
    }
    names = list(store.document_names) if store.num_documents else None
    return {**facts, "document_names": names}


def _dtype(store: DatastoreReader, file_format: str) -> torch.dtype:
    kept = file_format == "safetensors" or store.dtype != torch.bfloat16
    return store.dtype if kept else torch.float32


def _rows(store: DatastoreReader, count: int) -> Iterator[tuple[int, Rows]]:
    for start, keys, values in store.iter_chunks(count):
        documents = None
        if store.num_documents:
            rows = torch.arange(start, start + len(values), device="cpu")
            documents = store.document_of(rows).to(torch.int32)
        yield start, (keys, values, documents)


def _npy(store: DatastoreReader, folder: Path, _: int, progress: Progress) -> None:
    dtype = _dtype(store, "npy")
    shapes: dict[str, tuple[Any, tuple[int, ...]]] = {
        "keys": (np.dtype(str(dtype).removeprefix("torch.")), (len(store), store.dim)),
        "values": (np.dtype(np.int32), (len(store),)),
    }
    if store.num_documents:
        shapes["documents"] = (np.dtype(np.int32), (len(store),))
    with ExitStack() as stack:
        with_rows = {}
        for name, (kind, shape) in shapes.items():
            place = stack.enter_context(whole_file(folder / f"{name}.npy"))
            file = with_rows[name] = stack.enter_context(place.open("wb"))
            header = {"descr": kind.str, "fortran_order": False, "shape": shape}
            np.lib.format.write_array_header_1_0(file, header)
        for start, (keys, values, documents) in _rows(store, chunk_rows(store.dim * 4)):
            found = {"keys": keys.to(dtype), "values": values, "documents": documents}
            for name, file in with_rows.items():
                tensor = found[name]
                assert tensor is not None
                file.write(tensor.contiguous().numpy().tobytes())
            progress(start + len(values), len(store))


def _safetensors(store: DatastoreReader, folder: Path, file_bytes: int, progress: Progress) -> None:
    try:
        from safetensors.torch import save_file
    except ImportError as error:
        raise missing_package("this format needs", "safetensors", "lm") from error
    count = max(1, file_bytes // (store.dim * store.dtype.itemsize))
    nothing = store.keys[0:0], store.values[0:0], torch.empty(0, dtype=torch.int32, device="cpu")
    none = nothing if store.num_documents else (*nothing[:2], None)
    # Without a row there is one file, as in the other formats.
    for number, (start, (keys, values, documents)) in enumerate(
        _rows(store, count) if len(store) else [(0, none)]
    ):
        tensors = {"keys": keys.contiguous(), "values": values.contiguous()}
        if documents is not None:
            tensors["documents"] = documents
        facts = {"format": "pt", "first_row": str(start)}
        with whole_file(folder / f"rows-{number:05d}.safetensors") as place:
            save_file(tensors, place, facts)
        progress(start + len(values), len(store))


def _parquet(store: DatastoreReader, folder: Path, _: int, progress: Progress) -> None:
    try:
        import pyarrow as arrow
        from pyarrow import parquet
    except ImportError as error:
        raise missing_package("this format needs", "pyarrow", "lm") from error
    dtype = _dtype(store, "parquet")
    number = {torch.float16: arrow.float16(), torch.float32: arrow.float32()}[dtype]
    fields = [("key", arrow.list_(number, store.dim)), ("value", arrow.int32())]
    if store.num_documents:
        fields.append(("document", arrow.int32()))
    schema = arrow.schema(fields)
    # Hidden states do not compress, and an encoding by dictionary would only try.
    options = {"compression": "zstd", "use_dictionary": ["value", "document"][: len(fields) - 1]}
    with (
        whole_file(folder / "rows.parquet") as place,
        parquet.ParquetWriter(place, schema, **options) as writer,
    ):
        for start, (keys, values, documents) in _rows(store, chunk_rows(store.dim * 4)):
            flat = arrow.array(keys.to(dtype).contiguous().numpy().reshape(-1))
            columns = [
                arrow.FixedSizeListArray.from_arrays(flat, store.dim),
                arrow.array(values.numpy()),
            ]
            if documents is not None:
                columns.append(arrow.array(documents.numpy()))
            writer.write_table(arrow.table(columns, schema=schema))
            progress(start + len(values), len(store))


_WRITERS: dict[str, Callable[[DatastoreReader, Path, int, Progress], None]] = {
    "npy": _npy,
    "safetensors": _safetensors,
    "parquet": _parquet,
}
FORMATS = tuple(_WRITERS)
