"""Asking an engine without a server, and waiting for what it tells."""

from __future__ import annotations

import queue
import threading
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from knnext.serve.asked import chat, completion

#: Seconds in which a thread that works must have answered, on a machine however slow.
PATIENCE = 600.0
PROMPTS = ["the quick", "a lazy dog é 漢字", "fox", "over the lazy dog the fox", "🦊 jumps"]


def asked(engine: Any, **body: Any) -> Any:
    return completion({"temperature": 0, **body}, engine.tokenizer, engine.limits)


def asked_in_chat(engine: Any, tokenizer: Any, **body: Any) -> Any:
    return chat({"temperature": 0, **body}, tokenizer, engine.limits)


@dataclass
class Asking:
    """A request under way."""

    engine: Any
    request: Any
    told: queue.Queue[Any] = field(default_factory=queue.Queue)

    def __post_init__(self) -> None:
        self.job = self.engine.submit(self.request, self.told.put)

    def next(self) -> Any:
        """The next piece; raises what the engine tells instead."""
        piece = self.told.get(timeout=PATIENCE)
        if isinstance(piece, Exception):
            raise piece
        return piece

    def pieces(self) -> list[list[Any]]:
        """All pieces of each text, in order."""
        found: list[list[Any]] = [[] for _ in self.job.texts]
        left = len(found)
        while left:
            piece = self.next()
            found[piece.number].append(piece)
            left -= piece.finish is not None
        return found

    def texts(self) -> list[str]:
        return ["".join(piece.text for piece in parts) for parts in self.pieces()]

    def ids(self) -> list[list[int]]:
        """What was written, as tokens."""
        self.pieces()
        return [text.ids[len(text.prompt.ids) :] for text in self.job.texts]


def ask(engine: Any, **body: Any) -> Asking:
    return Asking(engine, asked(engine, **body))


class Gate:
    """An index that can be held, that counts, and that can fail."""

    def __init__(self, index: Any) -> None:
        self._index, self.datastore = index, index.datastore
        self.open = threading.Event()
        self.open.set()
        self.entered = threading.Event()
        self.sizes: list[int] = []
        self.failing = False

    def search(self, queries: Tensor, k: int) -> Any:
        self.sizes.append(len(queries))
        self.entered.set()
        assert self.open.wait(PATIENCE)
        if self.failing:
            raise RuntimeError("the disk is gone")
        return self._index.search(queries, k)

    def tokens(self, indices: Tensor) -> Tensor:
        return self._index.tokens(indices)

    def hold(self) -> None:
        """The next search waits, and so do those after it."""
        self.entered.clear()
        self.open.clear()

    def held(self) -> None:
        """Returns when a search waits."""
        assert self.entered.wait(PATIENCE)
