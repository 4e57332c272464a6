"""One rank works, and the others hold shards for it: for programs that know nothing of ranks.

Rank 0 is a `Lead`: it opens exact indexes and searches them when it likes, and calls the others to
other work that is theirs too (`call`). The others `serve`: they
do their part of each, and sleep between. While rank 0 is busy with something else a thread of its
own says now and then that it is there, so that others know a long wait from a lost rank.
"""

from __future__ import annotations

import importlib
import json
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar
from weakref import finalize

import torch
from torch import Tensor

from knnext.index.exact import ExactIndex
from knnext.index.filter import Filter
from knnext.index.sharded import ShardedIndex, ShardRecall
from knnext.ranks import RankFailedError, RankLostError, Ranks, local_rank

if TYPE_CHECKING:
    from knnext.datastore import Datastore

Made = TypeVar("Made")

#: What rank 0 says, with the number of an index.
_BUSY, _OPEN, _SEARCH, _CLOSE, _CALL, _END = range(6)
_TAG = 9
_leads: list[Lead] = []


class Lead:
    """Rank 0's hold on the others. Made by `leading`."""

    def __init__(self, ranks: Ranks) -> None:
        self.ranks = ranks
        self.lock = threading.RLock()
        self._indexes = 0
        self._closed: list[int] = []
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._say_busy, daemon=True)

    def open(self, datastore: Datastore, options: dict[str, Any]) -> LedIndex:
        """An index that all ranks hold; gone with its last reference."""
        place = {
            "path": str(datastore.path.absolute()),
            "fingerprint": datastore.fingerprint,
            "options": {name: _plain(value) for name, value in options.items()},
        }
        with self.lock:
            self._indexes += 1
            self.say(_OPEN, self._indexes, json.dumps(place))
            return LedIndex(self, self._indexes, datastore, options)

    def call(self, what: str, mine: Callable[[Ranks], Made], arguments: dict[str, Any]) -> Made:
        """See `call`."""
        with self.lock:
            self.say(_CALL, 0, json.dumps([what, arguments]))
            return mine(self.ranks)

    def say(self, what: int, number: int = 0, text: str = "") -> None:
        """To all others, and before it which indexes are no longer wanted."""
        with self.lock:
            while self._closed:
                self._tell(_CLOSE, self._closed.pop(), "")
            self._tell(what, number, text)

    def _tell(self, what: int, number: int, text: str) -> None:
        data = torch.frombuffer(bytearray(text.encode() + b"\0"), dtype=torch.uint8)
        head = torch.tensor([what, number, len(data)], dtype=torch.int64, device="cpu")
        for tensor in (head, data):
            self.ranks.exchange([(peer, tensor) for peer in self.ranks.others], [], _TAG).wait()

    def _say_busy(self) -> None:
        while not self._ended.wait(self.ranks.timeout / 4):
            with suppress(RankLostError), self.lock:  # whoever searches next will be told
                if not self._ended.is_set():
                    self._tell(_BUSY, 0, "")


class LedIndex(ShardedIndex):
    """A `ShardedIndex` of rank 0, whose searches the others are called to."""

    def __init__(
        self, lead: Lead, number: int, datastore: Datastore, options: dict[str, Any]
    ) -> None:
        super().__init__(datastore, lead.ranks, **options)
        self._lead, self._number = lead, number
        self._whole: LedIndex | None = None
        finalize(self, lead._closed.append, number)

    def search(
        self,
        queries: Tensor,
        k: int,
        exclude_documents: Tensor | Sequence[int] | None = None,
        *,
        filter: Filter | Sequence[Filter | None] | None = None,
    ) -> tuple[Tensor, Tensor]:
        with self._lead.lock:
            self._lead.say(_SEARCH, self._number)
            return super().search(queries, k, exclude_documents, filter=filter)

    def restricted(self, filter: Filter | None) -> LedIndex:
        other = super().restricted(filter)
        if other is not self:
            other._whole = self  # with which the others let their shards go
        return other

    @contextmanager
    def together(self) -> Iterator[ShardedIndex]:
        """The others come to every search as it is."""
        yield self

    def recall(self, queries: Tensor, k: int) -> ShardRecall:
        """Of an exact search."""
        return ShardRecall(len(queries), k, 1.0)


@contextmanager
def leading(ranks: Ranks) -> Iterator[None]:
    """Within, `open_exact` of rank 0 opens indexes of which all ranks hold rows; others `serve`."""
    lead, end = Lead(ranks), "failed"
    _leads.append(lead)
    lead._thread.start()
    try:
        yield
        end = ""
    finally:
        _leads.remove(lead)
        lead._ended.set()
        with suppress(RankLostError):
            lead.say(_END, 0, end)


def open_exact(datastore: Datastore, **options: Any) -> ExactIndex | ShardedIndex:
    """`ExactIndex` with these options, its rows divided among ranks where this one is leading."""
    if _leads and _is_stored(datastore):
        return _leads[-1].open(datastore, options)
    return ExactIndex(datastore, **options)


def open_faiss(datastore: Datastore, path: str | Path, **options: Any) -> ShardedIndex:
    """A finished FAISS index, its rows divided among the ranks that this one is leading."""
    return _leads[-1].open(datastore, {**options, "faiss": str(Path(path).absolute())})


def is_leading() -> bool:
    """Whether other ranks would come to a `call`."""
    return bool(_leads)


def call(what: str, mine: Callable[[Ranks], Made], **arguments: Any) -> Made:
    """What `mine(ranks)` gives, while each other rank does `what(ranks, kept, **arguments)`.

    Args:
        what: a function of this package, as "knnext.module:name". What it may throw it throws
            within `ranks.all_or_none`, as `mine` does, so that nobody waits for who has failed.
            `kept` is a dict that lives as long as the rank serves.
        mine: rank 0's part of it.
        arguments: plain values.
    """
    return _leads[-1].call(what, mine, arguments)


def serve(ranks: Ranks, complain: Callable[[Exception], None]) -> None:
    """What the other ranks do until rank 0 ends. An error of one search is said, not raised.

    Raises:
        RankFailedError: rank 0 ended by an error.
        RankLostError: it has gone, or does not answer.
    """
    from knnext.datastore import Datastore

    indexes: dict[int, ShardedIndex] = {}
    kept: dict[str, Any] = {}
    while True:
        what, number, text = _hear(ranks)
        try:
            if what == _END:
                break
            if what == _CLOSE:
                indexes.pop(number, None)
            elif what == _OPEN:
                place = json.loads(text)
                store = Datastore.open(place["path"])
                indexes[number] = ShardedIndex(store, ranks, **device_here(place["options"]))
            elif what == _CALL:
                name, arguments = json.loads(text)
                module, _, function = name.partition(":")
                getattr(importlib.import_module(module), function)(ranks, kept, **arguments)
            elif what == _SEARCH:
                indexes[number].search(
                    torch.empty(
                        0, indexes[number].datastore.dim, dtype=torch.float32, device="cpu"
                    ),
                    1,
                )
        except RankLostError:
            raise
        except Exception as error:
            complain(error)
    if text:
        raise RankFailedError(f"rank 0 of {ranks.size} failed; it says why")


def _hear(ranks: Ranks) -> tuple[int, int, str]:
    head = torch.empty(3, dtype=torch.int64, device="cpu")
    ranks.exchange([], [(0, head)], _TAG).wait()
    what, number, size = head.tolist()
    data = torch.empty(size, dtype=torch.uint8, device="cpu")
    ranks.exchange([], [(0, data)], _TAG).wait()
    return what, number, bytes(data.tolist())[:-1].decode()


def _is_stored(datastore: Datastore) -> bool:
    """Whether another process finds the same rows at the path: a view is of others."""
    return datastore.is_whole and not datastore.unfinished


def _plain(value: Any) -> Any:
    return value if value is None or isinstance(value, bool | int | float | str) else str(value)


def device_here(options: dict[str, Any]) -> dict[str, Any]:
    """Options of rank 0; where it uses a GPU, each rank its own."""
    if str(options.get("device")).startswith("cuda"):
        number = local_rank() % max(1, torch.cuda.device_count())
        return {**options, "device": f"cuda:{number}"}
    return options
