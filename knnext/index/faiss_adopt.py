"""Taking a FAISS index that another program built over the same keys, in the same order.

Nothing in such a file says of which keys it is. So it is asked: rows are decoded and compared with
the keys of their numbers, and keys are searched, each of which should find itself.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from knnext.errors import IndexMismatchError, MissingFileError
from knnext.index import faiss_build, faiss_library
from knnext.index.faiss_build import INDEX_FILE, SIDECAR_FILE
from knnext.index.queries import check_count
from knnext.index.row_set import ALL_ROWS
from knnext.index.sidecar import Recipe, Sidecar, file_crc32
from knnext.output import whole_file

if TYPE_CHECKING:
    from knnext.datastore import Datastore

_SAMPLE, _NEAREST = 256, 10
#: Of the sampled rows: of an index of other keys, or of these in another order, about none do.
_LEAST_DECODED, _LEAST_FOUND = 0.9, 0.5


def adopt(
    datastore: Datastore,
    file: Path,
    folder: Path,
    *,
    nprobe: int,
    overwrite: bool,
    sample: int = _SAMPLE,
) -> None:
    """Check the index in ``file`` and write it, with its sidecar, into ``folder``.

    Raises:
        MissingFileError: there is no such file.
        IndexMismatchError: it is not of these keys; or an index is in the folder already.
    """
    if not file.is_file():
        raise MissingFileError(f"{file}: there is no such file")
    if (folder / SIDECAR_FILE).exists() and not overwrite:
        raise IndexMismatchError(
            f"{folder} holds an index already: discard it with overwrite=True (--overwrite)"
        )
    stored = datastore.undeleted()
    try:
        index = faiss_library.read(file)
    except RuntimeError as error:
        raise IndexMismatchError(f"{file}: FAISS cannot read it: {error}") from None
    index = _plain_ids(index, file)
    checked = _check_shape(index, stored, file)
    checked |= _check_rows(index, stored, file, nprobe, check_count("sample", sample))
    recipe = Recipe(
        factory=f"adopted {faiss_library.kind_of(index)}",
        metric=datastore.metric,
        num_entries=stored.num_entries,
        dim=datastore.dim,
        datastore=stored.fingerprint,
        seed=0,
        train_size=0,
        segment_rows=max(1, stored.num_entries),
    )
    folder.mkdir(parents=True, exist_ok=True)
    with faiss_build.building(folder):
        if overwrite:
            faiss_build.check_unclaimed(folder)
            faiss_build.discard(folder)
        path = folder / INDEX_FILE
        with whole_file(path) as part:
            faiss_library.write(index, part)
        size, version = path.stat().st_size, faiss_library.version()
        adopted = {"file": file.name, **checked}
        Sidecar(recipe, nprobe, version, size, file_crc32(path), adopted=adopted).write(
            folder / SIDECAR_FILE
        )


def _plain_ids(index: Any, file: Path) -> Any:
    """The index behind a map of ids that maps each row to itself."""
    ids = faiss_library.mapped_ids(index)
    if ids is None:
        return index
    if not np.array_equal(ids, np.arange(len(ids))):
        raise IndexMismatchError(
            f"{file}: its rows have ids of their own, which are not those of the keys in order"
        )
    return faiss_library.inside_map(index)


def _check_shape(index: Any, stored: Datastore, file: Path) -> dict[str, Any]:
    for name, found, wanted in (
        ("metric", faiss_library.metric_of(index), stored.metric),
        ("dim", int(index.d), stored.dim),
    ):
        if found != wanted:
            raise IndexMismatchError(
                f"{file} is of other keys: {name} is {found!r} there and {wanted!r} in "
                f"{stored.path}"
            )
    try:
        faiss_library.check_kind(index, str(file), stored.metric)
    except ValueError as error:
        raise IndexMismatchError(str(error)) from None
    rows, dropped = stored.num_entries, int(index.ntotal) - stored.num_entries
    if dropped and dropped == (stored.meta.origin or {}).get("dropped_rows"):
        # The tail of zeros that the import left out, at the end of the index too.
        faiss_library.remove_tail(index, rows)
    if int(index.ntotal) != rows:
        raise IndexMismatchError(
            f"{file} holds {int(index.ntotal):,} rows, and {stored.path} {rows:,}"
        )
    return {"rows_left_out": max(0, dropped)}


def _check_rows(
    index: Any, stored: Datastore, file: Path, nprobe: int, sample: int
) -> dict[str, Any]:
    """Compare decoded rows with keys, and let keys find themselves."""
    size = min(sample, stored.num_entries)
    if size < 2:
        return {"sampled": size}
    rows = faiss_build.sample_rows(stored.num_entries, size, 0)
    keys = stored.keys[rows].float()
    found: dict[str, Any] = {"sampled": size}
    try:
        decoded = faiss_library.decode(index, rows)
    except ValueError:  # of kinds that keep no codes to decode
        found["decoded"] = None
    else:
        own = (decoded - keys).square().sum(1)
        # Rows that are far apart in the sample; where those are equal, either is right.
        other = (decoded - keys.roll(size // 2, 0)).square().sum(1)
        share = float((own <= other).float().mean())
        strictly = float((own < other).float().mean())
        found["decoded"] = round(share, 4)
        if share < _LEAST_DECODED or (strictly < 0.5 and not _all_alike(keys)):
            raise _other_keys(file, stored, f"{share:.0%} of {size} decoded rows are nearest")
    scores = faiss_library.search_among(
        index, faiss_library.as_float32(keys), _NEAREST, nprobe, ALL_ROWS
    )
    if scores is None:
        scores = faiss_library.search(index, faiss_library.as_float32(keys), _NEAREST)
    near = torch.from_numpy(scores[1])
    real = stored.keys[near.clamp_min(0)].float()
    itself = (near == rows[:, None]) | (real == keys[:, None]).all(-1)
    share = float((itself & (near >= 0)).any(1).float().mean())
    found["found_themselves"] = round(share, 4)
    # The largest inner product of a key need not be with itself.
    if share < _LEAST_FOUND and (stored.metric == "l2" or found["decoded"] is None):
        raise _other_keys(file, stored, f"{share:.0%} of {size} keys find themselves")
    return found


def _all_alike(keys: torch.Tensor) -> bool:
    return bool((keys == keys[:1]).all(1).float().mean() > 0.5)


def _other_keys(file: Path, stored: Datastore, why: str) -> IndexMismatchError:
    return IndexMismatchError(
        f"{file} is not of the keys of {stored.path}, or of these in another order: {why}"
    )
