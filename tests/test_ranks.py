"""Ranks that wait for each other: as long as one gets on, and no longer."""

from __future__ import annotations

import threading
from contextlib import suppress
from itertools import count
from typing import Any

import pytest

from knnext import ranks as module
from knnext.ranks import RankFailedError, RankLostError, Ranks
from tests.index.threads import PATIENCE, on_ranks


def counted(monkeypatch: pytest.MonkeyPatch, enough: int) -> threading.Event:
    """Set when a rank has said so often that it is at work."""
    said, reached, gather = count(1), threading.Event(), Ranks.gather

    def counting(self: Ranks, numbers: Any) -> list[list[int]]:
        if numbers == [module._BUSY] and next(said) >= enough:
            reached.set()
        return gather(self, numbers)

    monkeypatch.setattr(Ranks, "gather", counting)
    return reached


def test_a_rank_that_gets_on_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its work takes longer than any exchange may."""
    spent = count()
    monkeypatch.setattr(module, "_processor_seconds", lambda: float(next(spent)))
    reached = counted(monkeypatch, 6)  # quarters of the time that an exchange may take

    def work(group: Any, rank: int) -> int:
        ranks = Ranks(group, timeout=2.0)
        slow = ranks.all_or_none("waiting", lambda: rank == 1 or reached.wait(PATIENCE))
        assert slow
        with pytest.raises(RankFailedError if rank else OSError, match=r"rank 0 of 2|no room"):
            ranks.all_or_none("failing", lambda: failing(rank))
        return ranks.all_or_none("going on", lambda: rank)

    assert on_ranks(2, work) == [0, 1]


def failing(rank: int) -> None:
    if rank == 0:
        raise OSError("no room")


def test_a_rank_that_stands_still_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_processor_seconds", lambda: 1.0)
    given_up = threading.Event()

    def work(group: Any, rank: int) -> None:
        ranks = Ranks(group, timeout=1.0)
        if rank == 0:
            with suppress(RankLostError):  # by whoever was the last to wait
                ranks.all_or_none("hanging", lambda: given_up.wait(PATIENCE))
            return
        try:
            with pytest.raises(RankLostError, match="did not answer within 1 s"):
                ranks.all_or_none("hanging", lambda: None)
        finally:
            given_up.set()

    on_ranks(2, work)


def test_an_interrupt_waits_for_nobody() -> None:
    def work(group: Any, rank: int) -> None:
        if rank == 0:
            with pytest.raises(KeyboardInterrupt):
                Ranks(group, timeout=PATIENCE).all_or_none("working", interrupted)

    on_ranks(2, work)


def interrupted() -> None:
    raise KeyboardInterrupt


def test_a_process_alone_waits_for_nobody() -> None:
    assert Ranks().all_or_none("working", lambda: 3) == 3
