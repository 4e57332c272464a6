"""One rank that works and others that hold rows for it; the ranks are threads."""

from __future__ import annotations

import gc
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from knnext.datastore import Datastore
from knnext.index import ExactIndex, ShardedIndex
from knnext.index.sharded_crew import leading, open_exact, serve
from knnext.ranks import RankFailedError, RankLostError, Ranks
from tests.index.test_exact import grid_keys, make_datastore
from tests.index.threads import PATIENCE, on_ranks


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Datastore:
    folder = tmp_path_factory.mktemp("crew")
    return make_datastore(folder / "ds", grid_keys(903), documents=[("a", 400), ("b", 503)])


def crew(lead: Any, *, size: int = 3, timeout: float = PATIENCE) -> list[Any]:
    """What rank 0's `lead(ranks)` gives, and what each other complains of until the end."""

    def work(group: Any, rank: int) -> Any:
        ranks = Ranks(group, timeout=timeout)
        if rank == 0:
            with leading(ranks):
                return lead(ranks)
        said: list[str] = []
        serve(ranks, lambda error: said.append(str(error)))
        return said

    return on_ranks(size, work, errors=True)


def test_a_program_that_knows_nothing_of_ranks_is_served(store: Datastore) -> None:
    exact = ExactIndex(store)

    def lead(ranks: Ranks) -> str:
        first, second = open_exact(store), open_exact(store, metric="ip", resident_bytes=0)
        for turn in range(3):
            queries = grid_keys(4 * turn, seed=turn)
            for one, wanted in ((first, exact), (second, ExactIndex(store, metric="ip"))):
                for excluded in (None, [1]):
                    found, want = (
                        one.search(queries, 9, excluded),
                        wanted.search(queries, 9, excluded),
                    )
                    assert torch.equal(found[0], want[0]) and torch.equal(found[1], want[1])
        assert isinstance(first, ShardedIndex) and first.ranks.received > 0
        assert first.recall(queries, 9).recall == 1
        with first.together():
            first.search(queries, 1)
        del first, one
        gc.collect()
        assert second.search(queries, 9)[0].shape == (8, 9)
        return "done"

    assert crew(lead) == ["done", [], []]
    assert isinstance(open_exact(store), ExactIndex)  # nobody leads any more


def test_experiments_search_with_the_rows_of_all(store: Datastore) -> None:
    from knnext.experiments.lab import searches
    from knnext.experiments.lab.family import Setting

    queries, setting = grid_keys(20, seed=4), Setting()
    wanted = searches.search(store, queries, 7, setting, None, 1)

    def lead(ranks: Ranks) -> bool:
        found = searches.search(store, queries, 7, setting, None, 1)
        assert ranks.received > 0
        return torch.equal(found[0], wanted[0]) and torch.equal(found[1], wanted[1])

    assert crew(lead) == [True, [], []]


def test_views_are_searched_by_the_one_who_has_them(store: Datastore) -> None:
    assert crew(lambda _: type(open_exact(store.subsample(0.5))))[0] is ExactIndex


def test_an_error_of_all_leaves_the_others_ready(store: Datastore, tmp_path: Path) -> None:
    def lead(ranks: Ranks) -> int:
        with pytest.raises(ValueError, match="metric must be"):
            open_exact(store, metric="cosinus")
        index = open_exact(store)
        with pytest.raises(ValueError, match="k must be"):
            index.search(grid_keys(2), 0)
        return int(index.search(grid_keys(2), 5)[1].numel())

    found = crew(lead)
    assert found[0] == 10
    for said in found[1:]:
        assert len(said) == 2 and "metric must be" in said[0] and "rank 0 of 3 refused" in said[1]


def test_others_end_where_the_first_fails() -> None:
    def lead(ranks: Ranks) -> None:
        raise OSError("no room")

    found = crew(lead)
    assert isinstance(found[0], OSError)
    assert all(isinstance(one, RankFailedError) and "rank 0 of 3" in str(one) for one in found[1:])


def test_others_wait_for_a_first_that_is_busy_and_not_for_one_that_is_lost() -> None:
    """The second waits for three times its patience while the first computes, then loses it."""
    ended = threading.Event()

    def work(group: Any, rank: int) -> None:
        ranks = Ranks(group, timeout=1.0)
        if rank == 0:
            with leading(ranks):
                assert not ended.wait(3.0)
            return
        serve(ranks, lambda error: None)
        try:
            with pytest.raises(RankLostError):
                serve(ranks, lambda error: None)
        finally:
            ended.set()

    on_ranks(2, work)
