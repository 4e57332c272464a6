"""Building a FAISS index over a datastore, so that a killed build can go on.

A build leaves these files in its folder:

    build.json            the recipe; another recipe in the same folder is refused
    trained.faiss         the trained, empty index
    segment-00000.faiss   codes of the first `segment_rows` rows, and so on
    index.faiss           all segments merged
    index.json            the sidecar, written last: with it the index exists

Each is written under another name and renamed when whole, so a kill costs at most one segment of
adding. Every build, killed or not, merges the same segments, which makes the results identical.
Each code is written twice, in its segment and in the index, plus one copy of the trained part
(centroids and codebooks) a segment. Rewriting the index at each checkpoint instead would write
rows^2 / (2 x interval) codes: 77 times the index for 153 M rows with a save each million.
"""

from __future__ import annotations

import logging
import math
import operator
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from knnext.datastore.errors import DatastoreLockedError
from knnext.datastore.files import WriterLock
from knnext.datastore.room import check_disk, taken_bytes
from knnext.errors import IndexMismatchError
from knnext.index import faiss_library
from knnext.index.faiss_size import faiss_size
from knnext.index.queries import check_count
from knnext.index.sidecar import (
    Recipe,
    Sidecar,
    check_recipe,
    file_crc32,
    read_json,
    read_sidecar,
)
from knnext.output import whole_file, write_json
from knnext.progress import progress

_log = logging.getLogger(__name__)
if TYPE_CHECKING:
    from knnext.datastore import Datastore

INDEX_FILE, SIDECAR_FILE = "index.faiss", "index.json"
TRAINED_FILE, RECIPE_FILE = "trained.faiss", "build.json"
PLAN_FILE = "parts.json"  # of a build in parts (knnext/index/faiss_parts.py)
_CLAIMS = ".piece-*.lock"

MAX_LISTS = 4096  # the paper's number
MIN_POINTS_PER_LIST = 39  # below this FAISS calls k-means undertrained
MIN_TRAINED_ROWS = 256 * MIN_POINTS_PER_LIST  # a codebook of one byte has 256 centroids
POINTS_PER_LIST = 256  # k-means subsamples past this
TRAIN_ROWS = 1_000_000  # the paper's sample
MIN_SEGMENT_ROWS = 1 << 20
MAX_SEGMENTS = 32
_SEEDS = 1 << 31  # FAISS keeps it in an int
_TRIAL_ROWS = 1024  # searched before all rows are added; some graphs want hundreds
# Lists and dimensions a byte of a quick index: near the paper's ratio (64 bytes for 1,024), and the
# k-means of so many takes seconds.
_QUICK_LISTS, _DIMS_PER_BYTE = 1024, 8
# Code lengths that FAISS also runs on GPUs.
CODE_BYTES = (64, 56, 48, 40, 32, 28, 24, 20, 16, 12, 8, 4, 3, 2, 1)


def faiss_recipe(num_entries: int, dim: int) -> tuple[str | None, int | None]:
    """A factory string and training size that one can wait for; (None, None): the defaults."""
    lists = 1 << (min(_QUICK_LISTS, num_entries // MIN_POINTS_PER_LIST) | 1).bit_length() - 1
    if lists * MIN_POINTS_PER_LIST < MIN_TRAINED_ROWS or dim % _DIMS_PER_BYTE:
        return None, None
    return f"IVF{lists},PQ{dim // _DIMS_PER_BYTE}", min(lists * 40, num_entries)


def default_factory(num_entries: int, dim: int) -> str:
    """The paper's `IVF4096,PQ64`, scaled down where rows or dimensions are fewer.

    Lists: the power of two at or below 4 sqrt(N), at most 4096, and few enough for 39 training
    rows a list. Below 9,984 rows nothing can be trained well and brute force is fast: `Flat`.
    Codes: the longest of at most 64 bytes that divides D with two dimensions or more a byte.
    Where D has no good divisor (fewer than 32 bytes and more than four dimensions a byte), one
    byte a dimension: `SQ8`.
    """
    if num_entries < MIN_TRAINED_ROWS:
        return "Flat"
    most = min(MAX_LISTS, 4 * math.isqrt(num_entries), num_entries // MIN_POINTS_PER_LIST)
    lists = 1 << (most.bit_length() - 1)
    fitting = [m for m in CODE_BYTES if dim % m == 0 and dim >= 2 * m]
    code = fitting[0] if fitting else 0
    return f"IVF{lists},PQ{code}" if code >= 32 or 4 * code >= dim > 1 else f"IVF{lists},SQ8"


def training_rows(num_entries: int, lists: int) -> int:
    """Rows to train on where nobody says: 256 a list, within what serves codes and the paper's."""
    wanted = min(TRAIN_ROWS, max(POINTS_PER_LIST * max(lists, 1), 1 << 16))
    return min(wanted, num_entries)


def default_segment_rows(num_entries: int) -> int:
    return max(MIN_SEGMENT_ROWS, -(-num_entries // MAX_SEGMENTS))


def make_recipe(
    datastore: Datastore,
    factory: str | None,
    train_size: int | None,
    seed: int,
    segment_rows: int | None,
    *,
    metric: str | None = None,
) -> Recipe:
    """Fill in what the caller left open and check the factory string against the data."""
    if not 0 <= operator.index(seed) < _SEEDS:
        raise ValueError(f"seed must be a whole number from 0 to {_SEEDS - 1:,}, got {seed}")
    if datastore.num_entries == 0:
        raise ValueError("datastore has no entries, there is nothing to index")
    rows, dim = datastore.num_entries, datastore.dim
    metric = datastore.metric if metric is None else metric
    if factory is None:
        factory = default_factory(rows, dim)
    lists = faiss_library.num_lists(faiss_library.create(factory, dim, metric))
    if lists > rows:
        raise ValueError(
            f"factory {factory!r} asks for {lists} lists, the datastore has only {rows} rows"
        )
    if train_size is None:
        train_size = training_rows(rows, lists)
    elif check_count("train_size", train_size) < max(lists, 1):
        raise ValueError(f"train_size must be at least {max(lists, 1)}, got {train_size}")
    if segment_rows is None:
        segment_rows = default_segment_rows(rows)
    check_count("segment_rows", segment_rows)
    return Recipe(
        factory=factory,
        metric=metric,
        num_entries=rows,
        dim=dim,
        datastore=datastore.fingerprint,
        seed=operator.index(seed),
        train_size=min(train_size, rows),
        segment_rows=segment_rows,
    )


def build(
    datastore: Datastore,
    folder: Path,
    recipe: Recipe,
    *,
    nprobe: int,
    add_chunk: int,
    gpu: bool | str,
    overwrite: bool = False,
) -> None:
    """Train, add and save; goes on from whatever an earlier call of this recipe left.

    A finished index of the recipe stays as it is, unless `overwrite` discards all that is there.
    """
    sidecar = folder / SIDECAR_FILE
    if not overwrite and sidecar.exists():  # wherever it lies, it is only read
        check_recipe(read_sidecar(sidecar).recipe, recipe, folder)
        return
    folder.mkdir(parents=True, exist_ok=True)
    lock = _lock(folder)
    try:
        for part in folder.glob("*.faiss.*.part"):  # of a build that was killed
            part.unlink()
        if overwrite:
            check_unclaimed(folder)
            discard(folder)
        if sidecar.exists():  # finished by another build a moment ago
            check_recipe(read_sidecar(sidecar).recipe, recipe, folder)
        else:
            _build(datastore, folder, recipe, nprobe, add_chunk, gpu)
    finally:
        lock.release()


@contextmanager
def building(folder: Path) -> Iterator[None]:
    """Within, nobody else builds there."""
    lock = _lock(folder)
    try:
        yield
    finally:
        lock.release()


def _lock(folder: Path) -> WriterLock:
    try:
        return WriterLock(folder)
    except DatastoreLockedError:
        raise DatastoreLockedError(
            f"{folder}: another process is building this index; wait for it, or end it and build "
            "again, which goes on from there"
        ) from None


def _build(
    datastore: Datastore, folder: Path, recipe: Recipe, nprobe: int, add_chunk: int, gpu: bool | str
) -> None:
    claim(folder, recipe)
    _log.info("%s: building %s of %d rows", folder, recipe.factory, recipe.num_entries)
    if not (folder / TRAINED_FILE).exists():
        train_into(datastore, folder, recipe, gpu)
    with progress(recipe.num_entries, "adding to the index", unit="rows") as bar:
        for number in range(num_segments(folder, recipe)):
            add_segment(datastore, folder, recipe, number, add_chunk, gpu, bar.update)
    merge(folder, recipe, nprobe)


def merge(folder: Path, recipe: Recipe, nprobe: int) -> None:
    """Make the index of its segments, which are all there; with its sidecar it exists."""
    segments = [segment_file(folder, number) for number in range(num_segments(folder, recipe))]
    _write(folder / INDEX_FILE, _merge(folder / TRAINED_FILE, segments, recipe))
    _finish(folder, recipe, nprobe)


def sample_rows(num_entries: int, size: int, seed: int) -> torch.Tensor:
    """(size,) int64 distinct rows in ascending order, so that a file is read forwards."""
    rng = np.random.default_rng(seed)
    rows = rng.choice(num_entries, size=size, replace=False, shuffle=False)
    return torch.from_numpy(np.sort(rows).astype(np.int64))


def is_begun(folder: Path) -> bool:
    """Whether there is anything of a build, finished or not."""
    return next(_files(folder), None) is not None


def discard(folder: Path) -> None:
    """Remove the files of a build, finished or not, and nothing else."""
    for path in list(_files(folder)):  # what makes the others count goes first
        path.unlink(missing_ok=True)
    for path in folder.glob(_CLAIMS):
        path.unlink()


def _files(folder: Path) -> Iterator[Path]:
    names = (SIDECAR_FILE, INDEX_FILE, TRAINED_FILE, RECIPE_FILE, PLAN_FILE)
    yield from (folder / name for name in names if (folder / name).exists())
    for pattern in ("segment-*.faiss", "*.faiss.*.part"):
        yield from folder.glob(pattern)


def check_unclaimed(folder: Path) -> None:
    """DatastoreLockedError where a process of a build in parts is at work."""
    for path in folder.glob(_CLAIMS):
        claim_piece(folder, path.name.removeprefix(".piece-").removesuffix(".lock")).release()


def claim_piece(folder: Path, name: str) -> WriterLock:
    """The lock on "training" or on a segment, of a build in parts."""
    try:
        return WriterLock(folder, f".piece-{name}.lock")
    except DatastoreLockedError:
        raise DatastoreLockedError(f"{folder}: another process is at its {name}") from None


def read_recipe(folder: Path) -> Recipe:
    """Of a build that has not ended."""
    path = folder / RECIPE_FILE
    try:
        return Recipe(**read_json(path))
    except TypeError as error:
        raise IndexMismatchError(f"{path} is incomplete: {error}") from None


def claim(folder: Path, recipe: Recipe) -> None:
    """Note the recipe in the folder, or check that the one begun there is the same."""
    _check_disk(folder, recipe)
    path = folder / RECIPE_FILE
    if not path.exists():
        write_json(path, asdict(recipe))
        return
    check_recipe(read_recipe(folder), recipe, folder)


def _check_disk(folder: Path, recipe: Recipe) -> None:
    """DatastoreFullError where the disk has not the room, as far as the factory tells how much."""
    size = faiss_size(recipe.factory, recipe.dim)
    if size is None:
        return
    segments = 1 if size.graph else -(-recipe.num_entries // recipe.segment_rows)
    needed = size.build_bytes(recipe.num_entries, segments) - taken_bytes(folder)
    hint = "choose a factory of shorter codes (--factory), or another disk (--index-path)"
    check_disk(folder, needed, f"the index {recipe.factory}, while it is built,", hint)


def train_into(datastore: Datastore, folder: Path, recipe: Recipe, gpu: bool | str) -> None:
    """Write the trained, empty index; ValueError where the factory does not suit the rows."""
    try:
        index = trained(datastore, recipe, gpu)
    except ValueError:  # of the factory: another one may be tried in this folder
        for name in (RECIPE_FILE, PLAN_FILE):
            (folder / name).unlink(missing_ok=True)
        raise
    _write(folder / TRAINED_FILE, index)


def trained(datastore: Datastore, recipe: Recipe, gpu: bool | str) -> Any:
    """An empty index, trained on a sample of the keys and tried on a few."""
    index = faiss_library.create(recipe.factory, recipe.dim, recipe.metric)
    faiss_library.set_seed(index, recipe.seed)
    if not index.is_trained:
        rows = sample_rows(recipe.num_entries, recipe.train_size, recipe.seed)
        keys = faiss_library.as_float32(datastore.keys[rows])
        replica = faiss_library.to_gpu(index, gpu) if gpu else None
        faiss_library.train(index if replica is None else replica, keys, recipe.factory)
        index = index if replica is None else faiss_library.to_cpu(replica)
    few = faiss_library.as_float32(datastore.keys[: min(_TRIAL_ROWS, recipe.num_entries)])
    faiss_library.check_searchable(index, recipe.factory, few)
    return index


def segment_file(folder: Path, number: int) -> Path:
    return folder / f"segment-{number:05d}.faiss"


def num_segments(folder: Path, recipe: Recipe) -> int:
    """Pieces in which rows are added: one, where FAISS cannot merge such an index."""
    trained = faiss_library.read(folder / TRAINED_FILE)
    return -(-recipe.num_entries // _segment_rows(trained, recipe))


def _segment_rows(trained: Any, recipe: Recipe) -> int:
    return recipe.segment_rows if faiss_library.can_merge(trained) else recipe.num_entries


def add_segment(
    datastore: Datastore,
    folder: Path,
    recipe: Recipe,
    number: int,
    add_chunk: int,
    gpu: bool | str,
    advance: Callable[[int], Any],
) -> None:
    """Write one segment, where it is not there; `advance` gets numbers of rows."""
    segment = faiss_library.read(folder / TRAINED_FILE)
    step = _segment_rows(segment, recipe)
    start, stop = number * step, min((number + 1) * step, recipe.num_entries)
    path = segment_file(folder, number)
    if path.exists():
        advance(stop - start)
        return
    replica = faiss_library.to_gpu(segment, gpu) if gpu else None
    target = segment if replica is None else replica
    for begin in range(start, stop, add_chunk):
        keys = datastore.keys[begin : min(begin + add_chunk, stop)]
        faiss_library.add(target, faiss_library.as_float32(keys))
        advance(keys.shape[0])
    _write(path, segment if replica is None else faiss_library.to_cpu(replica))


def _merge(trained: Path, segments: list[Path], recipe: Recipe) -> Any:
    if len(segments) == 1:
        merged = faiss_library.read(segments[0])
    else:
        merged = faiss_library.read(trained)
        for path in segments:
            faiss_library.merge(merged, faiss_library.read(path))
    if merged.ntotal != recipe.num_entries:
        raise IndexMismatchError(
            f"the segments beside {trained} hold {merged.ntotal} rows, the datastore has "
            f"{recipe.num_entries}; build again with overwrite=True"
        )
    return merged


def _finish(folder: Path, recipe: Recipe, nprobe: int) -> None:
    path = folder / INDEX_FILE
    sidecar = Sidecar(
        recipe=recipe,
        nprobe=nprobe,
        faiss_version=faiss_library.version(),
        num_bytes=path.stat().st_size,
        crc32=file_crc32(path),
    )
    sidecar.write(folder / SIDECAR_FILE)
    leftovers = [folder / name for name in (TRAINED_FILE, RECIPE_FILE, PLAN_FILE)]
    for pattern in ("segment-*.faiss", "*.faiss.*.part", _CLAIMS):
        leftovers += folder.glob(pattern)
    for leftover in leftovers:
        leftover.unlink(missing_ok=True)
    _log.info("%s: the index is whole, %d bytes", folder, sidecar.num_bytes)


def _write(path: Path, index: Any) -> None:
    with whole_file(path) as part:
        faiss_library.write(index, part)  # a full disk is a RuntimeError of FAISS's
