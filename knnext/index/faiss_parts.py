"""A FAISS index that several processes build: one trains, all add, the last one merges.

The pieces are the segments of any build (knnext/index/faiss_build.py), so that the same recipe
gives the same index, whoever made which. Claims are locks on files ``.piece-*.lock``;
``parts.json`` tells that the folder is being built so. An index that FAISS cannot merge (a graph)
has one segment, which one process makes while the others wait; so it is with the training.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from knnext.datastore.claims import check_locks, in_turn, take_all, when_free
from knnext.datastore.errors import UnfinishedDatastoreError
from knnext.datastore.meta_file import ranges
from knnext.datastore.parts import check_part
from knnext.errors import IndexMismatchError
from knnext.index import faiss_build
from knnext.index.faiss_build import (
    PLAN_FILE,
    SIDECAR_FILE,
    TRAINED_FILE,
    segment_file,
)
from knnext.index.sidecar import (
    Recipe,
    check_recipe,
    read_json,
    read_sidecar,
)
from knnext.output import write_json
from knnext.progress import progress
from knnext.say import as_typed

if TYPE_CHECKING:
    from knnext.datastore import Datastore

#: Segments a process, where nobody says how many. Each has a copy of what was trained.
SEGMENTS_PER_RANK = 2


def is_planned(folder: Path) -> bool:
    """Whether an index was begun there in parts that are not merged yet."""
    return (folder / PLAN_FILE).exists() and not (folder / SIDECAR_FILE).exists()


def cut_recipe(folder: Path, recipe: Recipe, asked: int | None, size: int) -> Recipe:
    """The recipe, in as many segments as were begun; else in at least one for each part or process.

    Their number decides nothing but how the work can be shared.
    """
    try:
        if (folder / SIDECAR_FILE).exists():
            found = read_sidecar(folder / SIDECAR_FILE).recipe
        else:
            found = faiss_build.read_recipe(folder)
        return replace(recipe, segment_rows=found.segment_rows)
    except (FileNotFoundError, NotADirectoryError):
        pass
    alone = asked is None and size == 1
    count = (1 if alone else SEGMENTS_PER_RANK * size) if asked is None else asked
    most = -(-recipe.num_entries // count)
    return replace(recipe, segment_rows=min(recipe.segment_rows, most))


def build_parts(
    datastore: Datastore,
    folder: Path,
    recipe: Recipe,
    *,
    nprobe: int,
    add_chunk: int,
    gpu: bool | str,
    part: tuple[int, int] | None = None,
    rank: tuple[int, int] = (0, 1),
) -> bool:
    """Train and add what nobody has taken, or the segments of one part; whether all is merged.

    Raises:
        IndexMismatchError: the folder holds an index of another recipe, or the beginning of one.
        DatastoreLockedError: one process alone is building there.
    """
    if part is not None:
        check_part(*part)
    sidecar = folder / SIDECAR_FILE
    if not sidecar.exists():
        folder.mkdir(parents=True, exist_ok=True)
        check_locks(folder)
        with when_free(folder):
            if not sidecar.exists():
                faiss_build.claim(folder, recipe)
                if not (folder / PLAN_FILE).exists():
                    write_json(folder / PLAN_FILE, {"nprobe": nprobe})
    if sidecar.exists():
        check_recipe(read_sidecar(sidecar).recipe, recipe, folder)
        return True
    _train(datastore, folder, recipe, gpu)
    try:
        count = faiss_build.num_segments(folder, recipe)
    except RuntimeError:  # FAISS's, of a file that is gone: another has merged the rest
        if sidecar.exists():
            return True
        raise
    first, last = (0, count) if part is None else _of_part(part, count)
    turn = (0, 1) if part is not None else rank
    numbers = [first + number for number in in_turn(last - first, *turn)]  # from 1, for people

    def add(number: int) -> None:
        number -= 1
        lock = faiss_build.claim_piece(folder, f"segment-{number:05d}")
        try:
            if not _is_done(folder, number):
                rows = min(recipe.segment_rows, recipe.num_entries)
                with progress(rows, f"adding segment {number + 1} of {count}", unit="rows") as bar:
                    faiss_build.add_segment(
                        datastore, folder, recipe, number, add_chunk, gpu, bar.update
                    )
        finally:
            lock.release()

    take_all(numbers, lambda number: _is_done(folder, number - 1), add, _alive, "segment")
    if any(not _is_done(folder, number) for number in range(count)):
        return False
    join(datastore, folder)
    return True


def join(datastore: Datastore, folder: Path) -> None:
    """Merge the segments in ``folder``. UnfinishedDatastoreError names those that are missing."""
    with when_free(folder, seconds=_MERGE_SECONDS):
        if not is_planned(folder):
            return
        recipe = faiss_build.read_recipe(folder)
        if recipe.datastore != datastore.undeleted().fingerprint:
            raise IndexMismatchError(
                f"{folder} holds the parts of an index of another datastore than {datastore.path} "
                "is now; discard them with overwrite=True (--overwrite)"
            )
        trained = (folder / TRAINED_FILE).exists()
        count = faiss_build.num_segments(folder, recipe) if trained else 0
        absent = [n + 1 for n in range(count) if not segment_file(folder, n).exists()]
        if absent or not trained:
            what = f"of its {count} segments {ranges(absent)} are" if trained else "training is"
            raise UnfinishedDatastoreError(
                f"{folder}: {what} missing. The `knnext index {as_typed(datastore.path)}` of the "
                "others makes it, with --parts 1 or with the --part that has not run"
            )
        faiss_build.merge(folder, recipe, int(read_json(folder / PLAN_FILE)["nprobe"]))


#: A merge of a large index takes long, and whoever waits for it has nothing else to do.
_MERGE_SECONDS = 24 * 3600.0


def _train(datastore: Datastore, folder: Path, recipe: Recipe, gpu: bool | str) -> None:
    trained = folder / TRAINED_FILE

    def work(_: int) -> None:
        lock = faiss_build.claim_piece(folder, "training")
        try:
            if not (trained.exists() or (folder / SIDECAR_FILE).exists()):
                faiss_build.train_into(datastore, folder, recipe, gpu)
        finally:
            lock.release()

    def done(_: int) -> bool:
        return trained.exists() or (folder / SIDECAR_FILE).exists()

    take_all([1], done, work, _alive, "the training, part")


def _is_done(folder: Path, number: int) -> bool:
    return segment_file(folder, number).exists() or (folder / SIDECAR_FILE).exists()


def _of_part(part: tuple[int, int], count: int) -> tuple[int, int]:
    """Segments [first, last) of a part."""
    number, parts = part
    return (number - 1) * count // parts, number * count // parts


def _alive(_: int) -> object:
    """FAISS tells nothing until it is done: as long as its process lives it is waited for."""
    return object()
