"""Files on their way: fetched, compared, and put in their place together.

Until then they lie in ``S.pull`` without a ``meta.json``, so that nothing half-fetched can be
opened; what is there is kept for the next attempt.
"""

from __future__ import annotations

import shutil
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from knnext.datastore.files import (
    LOCK_FILE,
    file_checksum,
    parse_checksum,
    replace_file,
    sync_directory,
)
from knnext.datastore.meta import INT32_MAX, META_FILE, PARTIAL_FILE, DatastoreMeta, Origin
from knnext.datastore.meta_file import from_json, read_meta, to_json
from knnext.datastore.room import check_disk
from knnext.datastore.verify import Progress
from knnext.errors import CorruptDatastoreError, DatastoreError
from knnext.hub.client import HubError, asking
from knnext.hub.crew import each
from knnext.hub.layout import (
    EXTRAS,
    HEADS,
    TUNING_FILE,
    Item,
    beside,
    check_fit,
    codes_items,
    index_items,
    row_items,
)
from knnext.hub.remote import Remote
from knnext.hub.shards import cut
from knnext.hub.stage import check_place, staged, take_in

if TYPE_CHECKING:
    from knnext.datastore import Datastore

_THREADS = 4
_VALUES = 1 << 22  # compared at once


class Fetch:
    """One datastore on its way to one place."""

    def __init__(
        self, remote: Remote, path: Path, meta: DatastoreMeta, content: bytes, progress: Progress
    ) -> None:
        self.remote, self.path, self.meta, self.content = remote, path, meta, content
        self.progress = progress
        if not path.name:
            raise DatastoreError(f"{path}: want a folder that can be made, or filled")
        self.fingerprint = _fingerprint(path, meta)
        self.stage = path.with_name(f"{path.name}.pull")

    def whole(self, groups: tuple[str, ...], *, exactly: bool) -> Datastore:
        """What is asked for of all rows; the datastore, or what there is of it."""
        groups = self._there(groups, exactly)
        rows = row_items(self.meta)
        self._look()  # what stands in the way is said before another process is waited for
        with staged(self.stage):
            finished, begun = self._look()
            heads, extras = self._extras(groups)
            wanted = [] if finished else [item for item in rows if item.group in groups]
            if begun and all(_size(self.path / item.path) == item.num_bytes for item in wanted):
                finished = True  # as far as it was asked for, and was compared then
                wanted = []
            elif begun:
                take_in(self.path, self.stage)
            self._download([*wanted, *extras])
            for name, data in heads.items():
                (self.stage / name).parent.mkdir(exist_ok=True)
                replace_file(self.stage / name, data)
            self._move_extras(heads)
            if not finished:
                _check_values(self.stage, self.meta, wanted)
                here = self._sort_out(rows, wanted)
                self._finish(META_FILE if here else PARTIAL_FILE, self.content)
        return open_partial(self.path)

    def some(self, picked: tuple[int, ...]) -> Datastore:
        """A datastore of the rows of some shards."""
        numbers = ",".join(map(str, picked))
        origin = {
            **(self.meta.origin or {}), "shards_of": self.fingerprint, "shards": numbers
        }  # fmt: skip
        if (store := self._has(origin)) is not None:
            return store
        items = row_items(self.meta)
        wanted = [item for item in items if item.shard is None or item.shard in picked]
        with staged(self.stage):
            if (store := self._has(origin)) is not None:
                return store
            self._download(wanted)
            _check_values(self.stage, self.meta, wanted)
            self._sort_out(wanted, wanted)
            meta = cut(self.stage, self.meta, picked, origin)
            self._finish(META_FILE, to_json(meta))
        return open_partial(self.path)

    def _has(self, origin: Origin) -> Datastore | None:
        """The shards, where they are in their place; an error where something else is."""
        if _held(self.path) is not None:
            store = open_partial(self.path)
            if store.meta.origin == origin:
                return store
        if _occupied(self.path):
            raise DatastoreError(
                f"{self.path}: holds something else than these shards; give another folder"
            )
        check_place(self.path)
        return None

    def _look(self) -> tuple[bool, bool]:
        """Whether the datastore is in its place already, and whether a part of its files is."""
        held = _held(self.path)
        if held is None and _occupied(self.path):
            what = "is not empty, and holds no datastore" if self.path.is_dir() else "is a file"
            raise DatastoreError(f"{self.path}: {what}; give another folder")
        if held is not None and held != self.meta:
            raise DatastoreError(
                f"{self.path}: holds another datastore than {self.remote.repo_id} at "
                f"{self.remote.commit[:12]}; give another folder"
            )
        finished = (self.path / META_FILE).is_file()
        if not finished:
            check_place(self.path)
        return finished, held is not None and not finished

    def _there(self, groups: tuple[str, ...], exactly: bool) -> tuple[str, ...]:
        """The groups that the repository has; an error for one that was asked for by name."""
        lacking = [g for g in EXTRAS if g in groups and HEADS[g] not in self.remote]
        if "documents" in groups and self.meta.documents is None:
            lacking.append("documents")
        if lacking and exactly:
            raise HubError(f"{self.remote.repo_id}: has no {' and no '.join(lacking)}")
        return tuple(group for group in groups if group not in lacking)

    def _extras(self, groups: tuple[str, ...]) -> tuple[dict[str, bytes], list[Item]]:
        """The describing files of what lies beside the rows, and the files that they describe."""
        heads: dict[str, bytes] = {}
        items: list[Item] = []
        for group in EXTRAS:
            if group not in groups or self._in_place(group):
                continue
            with asking(self.remote.repo_id):
                content = self.remote.read(HEADS[group])
            try:
                items += _described(group, content, self.fingerprint)
            except (ValueError, TypeError, KeyError, RecursionError) as error:
                raise HubError(f"{self.remote.repo_id}: {HEADS[group]}: {error}") from error
            heads[HEADS[group]] = content
        return heads, items

    def _in_place(self, group: str) -> bool:
        """Whether it lies beside the datastore already; an error where another's does."""
        place = beside(self.path, group)
        head = place if group == "tuning" else place / HEADS[group].rpartition("/")[2]
        if not place.exists():
            return False
        if group == "tuning":
            return True  # a fit of one's own is never replaced
        with suppress(ValueError, TypeError, KeyError, OSError):
            _described(group, head.read_bytes(), self.fingerprint)
            return True
        raise DatastoreError(
            f"{place}: holds no finished {group} of this datastore; remove it, or leave {group} "
            "out (only=, --only)"
        )

    def _download(self, items: list[Item]) -> None:
        for item in items:
            self.remote.check(item.path, item.num_bytes)
        total = sum(item.num_bytes for item in items)
        here = sum(_size(self.stage / item.path) for item in items)
        hint = "fetch less (only=, shards=), or choose another disk"
        check_disk(self.stage, total - here, f"what is fetched of {self.remote.repo_id}", hint)
        done = 0

        def tell(item: Item) -> None:
            nonlocal done
            done += item.num_bytes
            self.progress(done, total)

        with asking(self.remote.repo_id):
            each(items, self._one, tell, _THREADS)

    def _one(self, item: Item) -> None:
        """Fetch a file, with the right bytes or an error; damaged ones do not stay."""
        for last in (False, True):
            path = self.remote.fetch(item.path, self.stage)
            problem = _problem(path, item)
            if problem is None:
                return
            path.unlink(missing_ok=True)
            if last:
                raise CorruptDatastoreError(
                    f"{self.remote.repo_id}: {item.path}: {problem}", [f"{item.path}: {problem}"]
                )

    def _move_extras(self, heads: dict[str, bytes]) -> None:
        for group in EXTRAS:
            if HEADS[group] in heads:
                name = HEADS[group].partition("/")[0]
                (self.stage / name).rename(beside(self.path, group))

    def _sort_out(self, rows: list[Item], fetched: list[Item]) -> bool:
        """Whether all ``rows`` are here; files of earlier attempts that are not among them go."""
        new = {item.path for item in fetched}
        for item in rows:
            if item.path not in new and _problem(self.stage / item.path, item) is not None:
                (self.stage / item.path).unlink(missing_ok=True)
        known = {item.path for item in rows}
        shutil.rmtree(self.stage / ".cache", ignore_errors=True)
        for file in [file for file in self.stage.rglob("*") if not file.is_dir()]:
            if str(file.relative_to(self.stage)) not in known and file.name != LOCK_FILE:
                file.unlink()
        return all((self.stage / item.path).is_file() for item in rows)

    def _finish(self, name: str, content: bytes) -> None:
        replace_file(self.stage / name, content)
        with suppress(FileNotFoundError):
            self.path.rmdir()  # empty, as was seen
        self.stage.rename(self.path)
        sync_directory(self.path.absolute().parent)


def _described(group: str, content: bytes, fingerprint: str) -> list[Item]:
    """The files that a describing file lists; ValueError and its like where it is not right."""
    if group == "tuning":
        check_fit(content, TUNING_FILE)
        return []
    if group == "index":
        return index_items(content, fingerprint)
    return codes_items(content, fingerprint)


def _problem(path: Path, item: Item) -> str | None:
    """What is wrong with a file that came."""
    size = _size(path)
    if size != item.num_bytes:
        return f"has {size:,} bytes, want {item.num_bytes:,}"
    if file_checksum(path, size) != parse_checksum(item.checksum):
        return "its content is not what was sent (checksum differs)"
    return None


def _check_values(stage: Path, meta: DatastoreMeta, items: list[Item]) -> None:
    """Tokens outside the vocabulary would be read as places in it."""
    most = INT32_MAX if meta.vocab_size is None else meta.vocab_size
    for item in items:
        if item.group != "values":
            continue
        values = np.memmap(stage / item.path, dtype="<i4", mode="r")
        for begin in range(0, len(values), _VALUES):
            part = values[begin : begin + _VALUES]
            if int(part.min()) < 0 or int(part.max()) >= most:
                raise CorruptDatastoreError(
                    f"{item.path}: holds tokens from {part.min()} to {part.max()}, want 0 to "
                    f"{most - 1}",
                    [item.path],
                )


def _held(path: Path) -> DatastoreMeta | None:
    """Of the datastore, or the part of one, in a folder."""
    for name in (META_FILE, PARTIAL_FILE):
        with suppress(FileNotFoundError, NotADirectoryError):
            return read_meta(path, name)
    return None


def _occupied(path: Path) -> bool:
    return path.exists() and (not path.is_dir() or any(path.iterdir()))


def _size(path: Path) -> int:
    try:
        return path.lstat().st_size
    except OSError:
        return 0


def _fingerprint(path: Path, meta: DatastoreMeta) -> str:
    from knnext.datastore import Datastore

    return Datastore(path, meta).stored_fingerprint


def open_partial(path: str | Path) -> Datastore:
    """What `pull` with ``only`` left in a folder: a datastore of which some files are not here.

    It knows its meta, length and fingerprint; whatever needs a file that was not fetched says that
    it is missing. With values and index a `FaissIndex` can search it (without rescoring).
    """
    from knnext.datastore import Datastore

    path = Path(path)
    if (path / META_FILE).is_file():
        return Datastore.open(path)
    place = path / PARTIAL_FILE
    if not place.is_file():
        raise DatastoreError(f"{path}: holds nothing that was pulled")
    return Datastore(path, from_json(place.read_bytes(), place))
