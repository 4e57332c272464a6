"""Compacting a datastore with what lies beside it: codes and indexes hold its keys too."""

from __future__ import annotations

import re
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from knnext.datastore import Datastore
from knnext.datastore.verify import Progress
from knnext.errors import IndexMismatchError, KnnextError
from knnext.index import codes, codes_build, faiss_build
from knnext.index.codes import StoredCodes
from knnext.index.sidecar import Recipe, read_sidecar


class Compacted(NamedTuple):
    """What is gone, what is left, and a line on each folder beside the datastore."""

    rows: int
    left: int
    beside: tuple[str, ...]


def compact(
    path: str | Path, *, rebuild: bool = True, progress: Progress | None = None
) -> Compacted:
    """Take deleted rows off the disk: `Datastore.compact`, and codes and FAISS indexes beside it.

    Codes are made anew. FAISS indexes are removed, and the datastore's own is built again by the
    same recipe unless ``rebuild`` is False; those of shards are built by who searches them next.
    What was interrupted is gone on with by the same call.
    """
    store = Datastore.open(path)
    rows = store.compact(progress)
    beside = _renew_codes(store)
    own = _index_folder(store)
    if faiss_build.is_begun(own):
        beside += _renew_index(store, own, rebuild)
    for folder in _shard_indexes(own):
        beside += _drop_index(store, folder)
    return Compacted(rows, len(store), tuple(beside))


def _renew_codes(store: Datastore) -> list[str]:
    folder = codes.default_path(store)
    if not codes_build.is_begun(folder):
        return []
    try:
        StoredCodes.open(store, verify=False)
        return []
    except (IndexMismatchError, FileNotFoundError):
        StoredCodes.build(store, overwrite=True)
        return [f"{folder}: codes made anew"]


def _renew_index(store: Datastore, folder: Path, rebuild: bool) -> list[str]:
    """Of the whole datastore; one that was begun of the rows as they are now is gone on with."""
    recipe, nprobe = _recipe(folder)
    current = recipe is not None and recipe.datastore == store.fingerprint
    if current and (nprobe is not None or not rebuild):
        return []
    if recipe is None or not rebuild or len(store) == 0:
        return _removed(folder)
    from knnext.index.faiss import FaissIndex

    factory = recipe.factory if current else _fitting(recipe, len(store))
    options: dict[str, Any] = {"seed": recipe.seed, "nprobe": nprobe, "overwrite": not current}
    same: dict[str, Any] = (
        {} if factory is None else {"train_size": min(recipe.train_size, len(store))}
    )
    if current:
        same["segment_rows"] = recipe.segment_rows
    try:
        FaissIndex.build(store, folder, factory, **options, **same)
    except ValueError as error:
        if factory is None or current or isinstance(error, KnnextError):
            raise
        factory = None  # so few rows cannot train it
        FaissIndex.build(store, folder, **options)
    return [f"{folder}: built again, {factory or 'by the default for what is left'}"]


def _shard_indexes(own: Path) -> list[Path]:
    """Folders of indexes of runs of rows, beside that of the whole."""
    pattern = re.compile(re.escape(own.name) + r"-\d+-\d+")
    found = (one for one in own.parent.iterdir() if pattern.fullmatch(one.name))
    return sorted(one for one in found if faiss_build.is_begun(one))


def _drop_index(store: Datastore, folder: Path) -> list[str]:
    """Of a run of rows, unless it is of those that have their numbers now."""
    first, last = (int(bound) for bound in folder.name.rsplit("-", 2)[1:])
    recipe, _ = _recipe(folder)
    rows = store.rows(first, last) if first <= last <= len(store) else None
    if recipe is None or rows is None or recipe.datastore != rows.undeleted().fingerprint:
        return _removed(folder)
    return []


def _removed(folder: Path) -> list[str]:
    with faiss_build.building(folder):
        faiss_build.check_unclaimed(folder)
        faiss_build.discard(folder)
    return [f"{folder}: removed, as it held what was deleted; `knnext index` builds it again"]


def _recipe(folder: Path) -> tuple[Recipe | None, int | None]:
    """Of the index in a folder, or of one that was begun; and the nprobe of one that is whole.

    None of one that nobody can read.
    """
    with suppress(FileNotFoundError, IndexMismatchError):
        sidecar = read_sidecar(folder / faiss_build.SIDECAR_FILE)
        return sidecar.recipe, sidecar.nprobe
    with suppress(FileNotFoundError, IndexMismatchError):
        return faiss_build.read_recipe(folder), None
    return None, None


def _fitting(recipe: Recipe, rows: int) -> str | None:
    """The recipe's factory, where so few rows can still fill its lists."""
    from knnext.index import faiss_library

    if recipe.factory.startswith("adopted "):  # which tells a class, and not how to make one
        return None
    lists = faiss_library.num_lists(faiss_library.create(recipe.factory, recipe.dim, recipe.metric))
    enough = lists * faiss_build.MIN_POINTS_PER_LIST <= rows or lists == 0
    return recipe.factory if enough else None


def _index_folder(store: Datastore) -> Path:
    """Where `FaissIndex` puts it, without loading that."""
    folder = Path(store.path).resolve()
    return folder.with_name(folder.name + ".index")
