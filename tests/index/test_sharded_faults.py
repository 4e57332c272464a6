"""ShardedIndex where a rank errs, fails, goes or hangs: all learn of it; the ranks are threads."""

from __future__ import annotations

import copy
import pickle
import threading
from typing import Any

import pytest
import torch

from knnext.datastore import Datastore
from knnext.index import ExactIndex, ShardedIndex
from knnext.ranks import RankFailedError, RankLostError, Ranks
from tests.index.sharded_cases import ROWS, assert_same, sharded, store
from tests.index.test_exact import grid_keys
from tests.index.threads import PATIENCE, on_ranks

__all__ = ["store"]  # a fixture


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ((grid_keys(3)[:, 1:], 5, None), "queries must be"),
        ((grid_keys(3), 0, None), "k must be"),
        ((grid_keys(3), 5, [99]), "exclude_documents must hold"),
        ((grid_keys(3), 5, torch.zeros(2, dtype=torch.int64)), "exclude_documents as a tensor"),
        ((grid_keys(3).long(), 5, None), "floating point"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_bad_argument_of_one_rank_is_an_error_of_all(
    store: Datastore, bad: tuple[Any, ...], message: str
) -> None:
    wanted = ExactIndex(store).search(grid_keys(3), 5)

    def work(group: Any, rank: int) -> None:
        index = sharded(store, group)
        kind: type[Exception] = RankFailedError if rank else ValueError
        if not rank and "floating" in message:
            kind = TypeError
        said = "rank 0 of 2 refused" if rank else message
        with pytest.raises(kind, match=said):
            index.search(*(bad if rank == 0 else (grid_keys(3), 5)))
        assert_same(index.search(grid_keys(3), 5), wanted)  # and they go on

    on_ranks(2, work)


def test_a_shard_that_cannot_be_read_is_an_error_of_all_who_asked(store: Datastore) -> None:
    wanted = ExactIndex(store).search(grid_keys(3), 5)

    def work(group: Any, rank: int) -> None:
        index = sharded(store, group, exchange_bytes=1)  # a round a query
        whole = index.local
        if rank == 1:
            index.local = copy.copy(whole)
            index.local.search_groups = fail  # type: ignore[union-attr, method-assign]
        with pytest.raises(OSError if rank == 1 else RankFailedError) as caught:
            index.search(grid_keys(3), 5)
        assert ("disk" if rank == 1 else "rank 1 of 3 failed") in str(caught.value)
        index.local = whole
        assert_same(index.search(grid_keys(3), 5), wanted)

    def fail(*_: Any) -> Any:
        raise OSError("the disk is gone")

    on_ranks(3, work)


@pytest.mark.parametrize(
    ("first", "second", "message"),
    [
        ({"metric": "l2"}, {"metric": "ip"}, "must be given the same"),
        ({}, {"bounds": [0, 1, ROWS]}, "must be given the same"),
        ({}, {"refine": False}, "must be given the same"),
    ],
)
def test_ranks_must_be_given_the_same(
    store: Datastore, first: dict[str, Any], second: dict[str, Any], message: str
) -> None:
    def work(group: Any, rank: int) -> None:
        with pytest.raises(ValueError, match=message):
            sharded(store, group, **(second if rank else first))

    on_ranks(2, work)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bounds": [0, ROWS]}, "bounds must be 3 ascending rows"),
        ({"bounds": [0, ROWS + 1, ROWS]}, "bounds must be 3 ascending rows"),
        ({"bounds": [0, 1, 5]}, "bounds must be 3 ascending rows"),
        ({"weights": [1]}, "weights must be 2 numbers"),
        ({"weights": [0, 0]}, "weights must be 2 numbers"),
        ({"weights": [float("nan"), 1]}, "weights must be 2 numbers"),
        ({"weights": [1, 1], "bounds": [0, 1, ROWS]}, "not both"),
        ({"metric": "cosinus"}, "metric must be"),
        ({"chunk_bytes": 0}, "chunk_bytes must be"),
    ],
    ids=str,
)
def test_bad_options_are_said_by_all(
    store: Datastore, options: dict[str, Any], message: str
) -> None:
    found = on_ranks(2, lambda group, _: sharded(store, group, **options), errors=True)
    assert all(isinstance(one, ValueError) and message in str(one) for one in found), found
    found = on_ranks(
        2, lambda group, rank: sharded(store, group, **(options if rank else {})), errors=True
    )
    assert isinstance(found[0], RankFailedError) and "rank 1 of 2 failed" in str(found[0])
    assert isinstance(found[1], ValueError)


@pytest.mark.parametrize(
    ("hangs", "cause"), [(False, "one has gone"), (True, "one did not answer within 1 s")]
)
def test_a_rank_that_has_gone_or_hangs_ends_the_others(
    store: Datastore, hangs: bool, cause: str
) -> None:
    ended = threading.Event()

    def work(group: Any, rank: int) -> None:
        index = ShardedIndex(store, group, timeout=1.0 if hangs else PATIENCE)
        if rank == 1:
            if hangs:
                ended.wait(PATIENCE)
            return
        try:
            with pytest.raises(RankLostError, match=f"lost the other ranks in .*{cause}"):
                index.search(grid_keys(3), 2)
        finally:
            ended.set()

    on_ranks(2, work)


def test_it_is_not_pickled(store: Datastore) -> None:
    with pytest.raises(TypeError, match="process group"):
        pickle.dumps(ShardedIndex(store))


def test_ranks_need_a_time_to_wait() -> None:
    with pytest.raises(ValueError, match="timeout must be above 0"):
        Ranks(timeout=0)
