"""Compacting a datastore with what lies beside it: codes and indexes hold its keys too."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from knnext.datastore import Datastore
from knnext.datastore.verify import Progress
from knnext.errors import IndexMismatchError
from knnext.index import codes, codes_meta, faiss_build
from knnext.index.codes import StoredCodes
from knnext.index.sidecar import Recipe, read_json, read_sidecar


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
    folders = [own, *sorted(own.parent.glob(f"{own.name}-*-*"))]
    for folder in folders:
        beside += _renew_index(store, folder, rebuild=rebuild and folder == own)
    return Compacted(rows, len(store), tuple(beside))


def _renew_codes(store: Datastore) -> list[str]:
    folder = codes.default_path(store)
    if not any((folder / name).exists() for name in (codes_meta.META_FILE, codes_meta.BUILD_FILE)):
        return []
    try:
        StoredCodes.open(store, verify=False)
        return []
    except (IndexMismatchError, FileNotFoundError):
        StoredCodes.build(store, overwrite=True)
        return [f"{folder}: codes made anew"]


def _renew_index(store: Datastore, folder: Path, *, rebuild: bool) -> list[str]:
    recipe, nprobe = _recipe(folder)
    if recipe is None:
        return []
    current = recipe.datastore == store.fingerprint
    if (current and nprobe is not None) or (recipe.num_entries <= 0):
        return []
    if not current:
        faiss_build.discard(folder)
    if not rebuild or len(store) == 0:
        return [f"{folder}: removed, as it held what was deleted; `knnext index` builds it again"]
    from knnext.index.faiss import FaissIndex

    factory = _fitting(recipe, len(store))
    FaissIndex.build(store, folder, factory, seed=recipe.seed, nprobe=nprobe)
    return [f"{folder}: built again, {factory or 'by the default for what is left'}"]


def _recipe(folder: Path) -> tuple[Recipe | None, int | None]:
    """Of the index in a folder, or of one that was begun; and the nprobe of one that is whole."""
    try:
        sidecar = read_sidecar(folder / faiss_build.SIDECAR_FILE)
        return sidecar.recipe, sidecar.nprobe
    except (FileNotFoundError, NotADirectoryError):
        pass
    try:
        return Recipe(**read_json(folder / faiss_build.RECIPE_FILE)), None
    except (FileNotFoundError, NotADirectoryError, TypeError):
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
