"""A run of the rows of a FAISS index, as an index of its own: what one rank holds of it.

Lists and codebooks are those of the whole, and each row has the code that it has there. So the
nearest of all runs, merged, are those that the whole index finds. Inverted lists are mapped and
copied from, so that a rank's memory never holds more than its run; flat codes are read first. A
graph leads from any row to any other, and codes that FAISS packs by 32 have no rows to take:
these cannot be divided.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from knnext.index import faiss_library
from knnext.index.faiss import FaissIndex, default_path
from knnext.index.faiss_build import INDEX_FILE, SIDECAR_FILE
from knnext.index.faiss_open import read_index
from knnext.index.sidecar import read_sidecar

if TYPE_CHECKING:
    from knnext.datastore import Datastore


def undivided(path: str | Path | None, datastore: Datastore) -> str:
    """Why the index there cannot be divided among ranks, or "" where it can, or is not there."""
    file = _folder(path, datastore) / SIDECAR_FILE
    if not file.exists():
        return ""  # whoever opens it says so
    if datastore.kept_rows is not None:
        return "the index still has rows that were deleted (`knnext compact` takes them out)"
    sidecar = read_sidecar(file)
    recipe = sidecar.recipe
    if sidecar.adopted is None:
        like = faiss_library.create(recipe.factory, recipe.dim, recipe.metric)
    else:  # whose factory nobody knows
        like = faiss_library.read(file.with_name(INDEX_FILE), mapped=True)
    if faiss_library.can_slice(like):
        return ""
    return (
        f"an index {recipe.factory} cannot be divided; inverted lists and flat codes can, such as "
        "IVF4096,PQ64 and SQ8"
    )


def open_slice(
    path: str | Path | None,
    datastore: Datastore,
    rows: tuple[int, int],
    *,
    verify: bool = True,
    **options: Any,
) -> FaissIndex:
    """The rows [first, last) of the finished index of a whole datastore, as an index of them.

    Args:
        verify: read the file once more and compare its checksum.
        options: of `FaissIndex.open`.

    Raises:
        ValueError: `undivided` tells why.
        MissingFileError, IndexMismatchError: as of `FaissIndex.open`.
    """
    if why := undivided(path, datastore):
        raise ValueError(f"{_folder(path, datastore)}: {why}")
    folder = _folder(path, datastore)
    sidecar, index = read_index(folder, datastore, verify, mapped=True)
    held = faiss_library.slice_rows(index, *rows)
    return FaissIndex(datastore.rows(*rows), held, sidecar, folder, **options)


def rescorer(
    path: str | Path | None, datastore: Datastore
) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Real distances of (Q, k) rows to (Q, dim) queries, on the CPU, in their order."""
    folder = _folder(path, datastore)
    sidecar = read_sidecar(folder / SIDECAR_FILE)
    return FaissIndex(datastore, None, sidecar, folder, gpu=False)._rescore


def _folder(path: str | Path | None, datastore: Datastore) -> Path:
    return default_path(datastore) if path is None else Path(path)
