"""A process that builds datastores in forked children and kills them at every file operation.

Run by test_kill.py. It forks because importing torch anew for each of hundreds of kills
would take minutes; it is a process of its own because forking is safe only while torch has started
no threads. The last line of output is JSON: one record for each kill.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from knnext.datastore import Datastore, UnfinishedDatastoreError

ROWS, DIM, PER_SHARD, APPEND = 45, 3, 16, 7
FIRST_ATTEMPT, LATER = "1700000000", "1800000000"


def rows(first: int, last: int):
    index = torch.arange(first, last)
    keys = (index[:, None] * DIM + torch.arange(DIM)).half()
    return keys, index % 11, index // 10


def build(path: Path, last: int = ROWS, *, log: Path | None = None) -> None:
    """Append rows up to ``last``; note in ``log`` how many a commit has promised to keep."""
    store = Datastore.create(
        path, DIM, entries_per_shard=PER_SHARD, vocab_size=11, resume=True, commit_seconds=1e9
    )
    with store:
        hashes = np.arange(7 * 16, dtype=np.uint8).reshape(7, 16)
        store.set_document_names([f"doc {d}" for d in range(7)], hashes)
        for number, a in enumerate(range(store.num_entries, last, APPEND)):
            store.append(*rows(a, min(a + APPEND, last)))
            if number % 2:
                store.commit()
                _promise(log, store.num_entries)
    _promise(log, last)


def _promise(log: Path | None, num_entries: int) -> None:
    if log is not None:
        log.write_text(str(num_entries))


class Faults:
    """Counts the operations that change files in one folder, and dies at one of them.

    Mode "kill" is SIGKILL; the others are power cuts: content past the last fsync becomes garbage.
    Renames, creations and removals since the last fsync of the folder are undone ("lost"), or kept
    ("kept"), or only those of the two JSON files are kept ("mixed"): a disk may do any of these.
    """

    def __init__(self, folder: Path, die_at: int | None, mode: str) -> None:
        self.folder, self.die_at, self.mode = folder, die_at, mode
        self.count = 0
        self.shadow = folder.with_name("shadow")
        self.synced: dict[int, int] = {}
        self.listed: dict[str, int] = {}
        self.real = {name: getattr(os, name) for name in ("pwrite", "fsync", "ftruncate", "mkdir")}

    def install(self) -> None:
        shutil.rmtree(self.shadow, ignore_errors=True)
        self.real["mkdir"](self.shadow)
        if self.folder.exists():
            for file in self.folder.iterdir():
                self.synced[file.stat().st_ino] = file.stat().st_size
            self._list()
        for name in self.real:
            setattr(os, name, self._wrap(self.real[name]))
        os.pwrite = self._pwrite
        os.fsync = self._fsync
        Path.replace = self._wrap(Path.replace)  # type: ignore[method-assign]
        Path.unlink = self._wrap(Path.unlink)  # type: ignore[method-assign]

    def _wrap(self, function: Callable) -> Callable:
        def counted(*arguments, **options):
            self._event()
            return function(*arguments, **options)

        return counted

    def _pwrite(self, fd: int, data, offset: int) -> int:
        if self._event():
            self.real["pwrite"](fd, data[: len(data) // 2], offset)  # torn in the middle
            self._die()
        return self.real["pwrite"](fd, data, offset)

    def _fsync(self, fd: int) -> None:
        self._event()
        self.real["fsync"](fd)
        self.synced[os.fstat(fd).st_ino] = os.fstat(fd).st_size
        if Path(f"/proc/self/fd/{fd}").readlink() == self.folder:
            self._list()

    def _list(self) -> None:
        self.listed = {file.name: file.stat().st_ino for file in self.folder.iterdir()}
        for name, inode in self.listed.items():
            copy = self.shadow / str(inode)
            if not copy.exists():
                os.link(self.folder / name, copy)

    def _event(self) -> bool:
        self.count += 1
        if self.count - 1 != self.die_at:
            return False
        if sys._getframe(1).f_code.co_name != "_pwrite":
            self._die()
        return True

    def _die(self) -> None:
        if self.mode != "twice" and self.mode != "kill" and self.folder.exists():
            self._cut_power()
        os.kill(os.getpid(), signal.SIGKILL)

    def _cut_power(self) -> None:
        if self.mode in ("lost", "mixed"):
            kept = ("meta.json", "build.json") if self.mode == "mixed" else ()
            for file in self.folder.iterdir():
                if file.name not in kept:
                    file.unlink()  # not counted: the wrapped unlink is never at die_at again
            for name, inode in self.listed.items():
                if name not in kept:
                    os.link(self.shadow / str(inode), self.folder / name)
        for file in self.folder.iterdir():
            size, safe = file.stat().st_size, self.synced.get(file.stat().st_ino, 0)
            if safe < size:
                with file.open("r+b") as content:
                    content.seek(safe)
                    content.write(b"\xa5" * (size - safe))


def in_child(work: Callable[[], None]) -> int:
    """Run ``work`` in a forked child; its exit status, negative for a signal."""
    pid = os.fork()
    if pid == 0:
        try:
            work()
            os._exit(0)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def folder_bytes(path: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted(path.iterdir())}


def open_or_unfinished(path: Path) -> str:
    """What a reader sees: number of entries (after verify), or that there is nothing finished."""
    try:
        return str(Datastore.open(path, verify=True).num_entries)
    except UnfinishedDatastoreError:
        return "unfinished"
    except ValueError as error:
        return "nothing" if "not a datastore" in str(error) else f"error: {error}"


class Trial:
    """One scenario: builds under ``work``, each killed at one operation, resumed, compared."""

    def __init__(self, work: Path, begin: int | None) -> None:
        os.environ["SOURCE_DATE_EPOCH"] = FIRST_ATTEMPT
        self.path, self.log, self.base = work / "store", work / "log", work / "base"
        build(work / "reference")
        self.reference = folder_bytes(work / "reference")
        self.begin = begin
        if begin is not None:
            build(self.base, begin)

    def reset(self) -> None:
        shutil.rmtree(self.path, ignore_errors=True)
        if self.begin is not None:
            shutil.copytree(self.base, self.path)
        self.log.write_text(str(self.begin or 0))

    def attempt(self, die_at: int | None, mode: str) -> int:
        def work() -> None:
            faults = Faults(self.path, die_at, mode)
            faults.install()
            build(self.path, log=self.log)
            self.path.with_name("count").write_text(str(faults.count))

        return in_child(work)

    def operations(self) -> int:
        self.reset()
        assert self.attempt(None, "kill") == 0
        return int(self.path.with_name("count").read_text())

    def run(self, points: list[int], mode: str) -> dict:
        """Attempts that die at ``points`` in turn, then one that does not."""
        self.reset()
        os.environ["SOURCE_DATE_EPOCH"] = FIRST_ATTEMPT
        statuses, seen, kept = [], [], []
        for point in points:
            statuses.append(self.attempt(point, mode))
            promised = int(self.log.read_text())
            seen.append(open_or_unfinished(self.path))
            begun = (self.path / "build.json").exists() or (self.path / "meta.json").exists()
            # The moment of creation is the first attempt's, once that has got so far.
            os.environ["SOURCE_DATE_EPOCH"] = LATER if begun else FIRST_ATTEMPT
            kept.append(self._committed() >= promised)
        build(self.path)
        same = folder_bytes(self.path) == self.reference
        record = {"at": points, "mode": mode, "status": statuses, "seen": seen}
        return {**record, "kept": all(kept), "same": same}

    def _committed(self) -> int:
        try:
            return Datastore.open(self.path, allow_unfinished=True, verify=True).num_entries
        except ValueError:
            return 0


def main() -> None:
    work, begin, modes = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3:]
    torch.set_num_threads(1)
    trial = Trial(work, begin if begin >= 0 else None)
    count = trial.operations()
    records = []
    for mode, step in (mode.split(":") for mode in modes):
        if mode == "twice":
            points = [[n, (n * 7) % 23] for n in range(count - 1, -1, -int(step))]
        else:  # from the last, which finishes
            points = [[n] for n in range(count - 1, -1, -int(step))]
        records += [trial.run(point, mode) for point in points]
    print(json.dumps(records))


if __name__ == "__main__":
    main()
