"""Eight-bit codes of a datastore's keys, kept beside it: what its exact search reads instead.

The codes of a datastore ``S`` lie in the folder ``S.codes``: one byte a dimension and 12 a row. A
search scores every key by them, with a bound that holds always, and reads from the keys only the
rows that could be among the k nearest. The answer has the same bits as without codes.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from knnext.datastore.rows import LazyRows, ShardFiles
from knnext.errors import IndexMismatchError, MissingFileError
from knnext.index import codes_build
from knnext.index.codes_meta import (
    BUILD_FILE,
    HOW_TO_MAKE,
    META_FILE,
    STATS_BYTES,
    CodesMeta,
    check_content,
    check_datastore,
    check_sizes,
    read_center,
    read_meta,
)
from knnext.ops import KeyCodes
from knnext.say import as_typed

if TYPE_CHECKING:
    from knnext.datastore import Datastore

# Files whose checksums agreed, as they were then: a process reads them for that only once.
_verified: set[tuple[Any, ...]] = set()


class StoredCodes:
    """The codes of a datastore's rows, or of those of a view. Made by `build` or `open`.

    ``codes[a:b]`` are those of ``datastore.keys[a:b]``, mapped from the file.
    """

    def __init__(self, datastore: Datastore, folder: Path, meta: CodesMeta) -> None:
        """Internal: use `open`."""
        self.datastore = datastore
        self.path = folder
        self.meta = meta
        self.center = read_center(folder)
        place, kept = datastore.keys.place(), datastore.keys.kept
        self._codes, self._stats = (
            LazyRows(
                ShardFiles(_shards(folder / file, meta), shape, dtype, kept), 0, meta.num_entries
            ).at(place)
            for file, shape, dtype in (
                (meta.codes.file, (meta.dim,), torch.int8),
                (meta.stats.file, (3,), torch.float32),
            )
        )

    @classmethod
    def build(
        cls,
        datastore: Datastore,
        path: str | Path | None = None,
        *,
        overwrite: bool = False,
        parts: int | None = None,
        rank: tuple[int, int] = (0, 1),
    ) -> StoredCodes:
        """Encode the keys of a datastore, or go on with an encoding that was interrupted.

        Codes of these very keys are opened as they are. Of a datastore that was appended to since,
        the new rows are encoded, with the center of the first ones. Memory stays small.

        Args:
            datastore: an open datastore, not a view.
            path: the folder of the codes; by default `<datastore folder>.codes` beside it, where
                `ExactIndex` looks for them.
            overwrite: discard whatever codes, finished or not, are in the folder.
            parts: several processes share so many parts, with the result of one; each returns when
                all are encoded. By default 8 for each of the processes that `rank` tells of.
            rank: of how many: which parts this process begins with.

        Raises:
            IndexMismatchError: the folder holds damaged codes, or those of another datastore.
            DatastoreLockedError: another process is encoding there.
            DatastoreWriteError: the disk refused; what was committed before stands.
        """
        folder = default_path(datastore) if path is None else Path(path)
        stored = datastore.undeleted()
        codes_build.build(stored, folder, overwrite=overwrite, parts=parts, rank=rank)
        return cls.open(datastore, folder, verify=False)

    @classmethod
    def build_part(
        cls, datastore: Datastore, part: tuple[int, int], path: str | Path | None = None
    ) -> StoredCodes | None:
        """Encode one part alone: (3, 64) is the third of 64. The codes, if it was the last."""
        folder = default_path(datastore) if path is None else Path(path)
        if not codes_build.build(datastore.undeleted(), folder, part=part):
            return None
        return cls.open(datastore, folder, verify=False)

    @classmethod
    def renew(cls, datastore: Datastore) -> StoredCodes:
        """`build`, in place of damaged codes or those of a datastore that was there before."""
        try:
            return cls.build(datastore)
        except IndexMismatchError:
            return cls.build(datastore, overwrite=True)

    @classmethod
    def open(
        cls, datastore: Datastore, path: str | Path | None = None, *, verify: bool = True
    ) -> StoredCodes:
        """Open finished codes (None: in the default place) of a datastore or a view of one.

        `verify` compares checksums, which reads every byte, once in a process.

        Raises:
            FileNotFoundError: there are no finished codes in the folder.
            IndexMismatchError: they are damaged, or not of the datastore as it is now.
        """
        folder = default_path(datastore) if path is None else Path(path)
        try:
            meta = read_meta(folder / META_FILE)
        except (FileNotFoundError, NotADirectoryError):
            begun = (folder / BUILD_FILE).exists()
            state = "an encoding that has not ended" if begun else "no codes"
            raise MissingFileError(
                f"there is {state} in {folder}: {HOW_TO_MAKE.format(as_typed(datastore.path))}"
            ) from None
        check_datastore(meta, datastore, folder)
        check_sizes(meta, folder)
        found = cls(datastore, folder, meta)
        if verify:
            found.verify()
        return found

    def __len__(self) -> int:
        return len(self._codes)

    @property
    def dim(self) -> int:
        return self.meta.dim

    @property
    def nbytes(self) -> int:
        """Bytes of the codes of these rows: one a dimension and 12 a row."""
        return len(self) * (self.dim + STATS_BYTES) + self.center.nbytes

    def __getitem__(self, rows: slice) -> KeyCodes:
        """Not copied, unless of a subsample."""
        return KeyCodes(self._codes[rows], self._stats[rows], self.center)

    def verify(self) -> None:
        """Compare checksums; IndexMismatchError where the content has changed."""
        files = [file for file in self.meta.files() if file.num_bytes]
        stamps = [(self.path / file.file).stat() for file in files]
        state = (
            *(str(self.path.resolve()), self.meta),
            *((stamp.st_ino, stamp.st_size, stamp.st_mtime_ns) for stamp in stamps),
        )
        if state in _verified:
            return
        with ThreadPoolExecutor(2) as pool:
            list(pool.map(lambda file: check_content(self.path, file), files))
        _verified.add(state)

    def __reduce__(self) -> tuple[Any, ...]:
        """A pickle holds the place and the datastore, and opens the codes there again."""
        return _reopen, (self.datastore, self.path.absolute())


def default_path(datastore: Datastore) -> Path:
    """`<datastore folder>.codes`, beside the datastore's folder."""
    folder = Path(datastore.path).resolve()
    return folder.with_name(folder.name + ".codes")


def _shards(path: Path, meta: CodesMeta) -> list[tuple[Path, int]]:
    return [(path, meta.num_entries)] if meta.num_entries else []


def _reopen(datastore: Datastore, path: Path) -> StoredCodes:
    return StoredCodes.open(datastore, path, verify=False)
