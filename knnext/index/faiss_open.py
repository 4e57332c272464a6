"""Reading a finished FAISS index, with every check that keeps a wrong one out."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from knnext.errors import IndexMismatchError, MissingFileError
from knnext.index import faiss_build, faiss_library
from knnext.index.sidecar import Sidecar, file_crc32, read_sidecar

if TYPE_CHECKING:
    from knnext.datastore import Datastore


def read_index(
    folder: Path, datastore: Datastore, verify: bool, *, mapped: bool = False
) -> tuple[Sidecar, Any]:
    """The sidecar and the FAISS index in `folder`, which must belong to `datastore`.

    `verify` also compares the checksum of the file. `mapped`: inverted lists are not read yet.

    Raises:
        FileNotFoundError: there is no finished index in the folder.
        IndexMismatchError: it is damaged, or was built from something else.
    """
    path = folder / faiss_build.SIDECAR_FILE
    if not path.exists():
        raise MissingFileError(
            f"there is no finished index in {folder}: FaissIndex.build makes one, and goes on "
            "with one that was interrupted"
        )
    sidecar = read_sidecar(path)
    _check_datastore(sidecar, datastore, folder)
    file = folder / faiss_build.INDEX_FILE
    _check_file(file, sidecar, verify)
    return sidecar, _read_checked(file, sidecar, mapped)


def _check_datastore(sidecar: Sidecar, datastore: Datastore, folder: Path) -> None:
    """Refuse any datastore but the one the index was built from, saying what differs."""
    recipe, indexed = sidecar.recipe, datastore.undeleted()
    for name, found, wanted in (
        ("metric", recipe.metric, datastore.metric),
        ("dim", recipe.dim, datastore.dim),
        ("num_entries", recipe.num_entries, indexed.num_entries),
        ("datastore", recipe.datastore, indexed.fingerprint),
    ):
        if found != wanted:
            raise IndexMismatchError(
                f"the index at {folder} was built for another datastore: {name} is {found!r} in "
                f"the index and {wanted!r} in {datastore.path}"
            )


def _check_file(file: Path, sidecar: Sidecar, verify: bool) -> None:
    if not file.exists():
        raise IndexMismatchError(f"{file} is missing; build again with overwrite=True")
    size = file.stat().st_size
    if size != sidecar.num_bytes:
        raise IndexMismatchError(
            f"{file} has {size} bytes, its sidecar says {sidecar.num_bytes}; "
            "build again with overwrite=True"
        )
    if verify and file_crc32(file) != sidecar.crc32:
        raise IndexMismatchError(
            f"{file} is damaged: its checksum differs from its sidecar's; "
            "build again with overwrite=True"
        )


def _read_checked(file: Path, sidecar: Sidecar, mapped: bool = False) -> Any:
    """Load the index; what FAISS says of it must agree with the sidecar too."""
    index = faiss_library.read(file, mapped=mapped)
    found = (faiss_library.metric_of(index), int(index.d), int(index.ntotal))
    recipe = sidecar.recipe
    if found != (recipe.metric, recipe.dim, recipe.num_entries):
        raise IndexMismatchError(
            f"{file} holds (metric, dim, rows) {found}, its sidecar says "
            f"{(recipe.metric, recipe.dim, recipe.num_entries)}"
        )
    return index
