"""ShardedIndex against ExactIndex of the whole, in every bit; the ranks are threads."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from knnext.datastore import Datastore
from knnext.index import ExactIndex, Filter, Index, ShardedIndex, StoredCodes, check_exactness
from knnext.index.sharded_rounds import NEIGHBOR_BYTES
from knnext.ranks import RankFailedError
from tests.index.sharded_cases import ROWS, Case, assert_same, sharded, store
from tests.index.test_exact import DIM, grid_keys, make_datastore
from tests.index.threads import on_ranks

__all__ = ["store"]  # a fixture


@pytest.mark.parametrize("exchange_bytes", [1, 20_000, 1 << 29])
@pytest.mark.parametrize(
    "cut",
    [
        {},
        {"bounds": [0, 5, 5, ROWS]},
        {"bounds": [0, 0, 0, ROWS]},
        {"bounds": [0, ROWS - 1, ROWS, ROWS]},
        {"weights": [1, 0, 2.5]},
    ],
    ids=str,
)
def test_every_cut_gives_the_bits_of_one_process(
    store: Datastore, cut: dict[str, Any], exchange_bytes: int
) -> None:
    exact = ExactIndex(store)
    queries = [grid_keys(count, seed=9 + count) for count in (7, 0, 13)]
    excluded = [torch.randint(-1, 5, (7,)), torch.empty(0, dtype=torch.int64), [0, 3]]

    def work(group: Any, rank: int) -> None:
        index = sharded(store, group, exchange_bytes=exchange_bytes, **cut)
        mine, k = queries[rank], 30 + 100 * rank
        for without in (None, excluded[rank]):
            found = index.search(mine, k, without)
            assert_same(found, exact.search(mine, k, without))
        tokens = index.tokens(found[1])
        assert tokens.dtype == torch.int32
        assert torch.equal(tokens, exact.tokens(found[1]))
        assert_same(index.search(mine.double(), 3), exact.search(mine.double(), 3))

    on_ranks(3, work)


@pytest.mark.parametrize(
    "seeds",
    [range(8), *(pytest.param(range(n, n + 8), marks=pytest.mark.slow) for n in (8, 16, 24, 32))],
    ids=str,
)
def test_random_stores_of_all_kinds(tmp_path: Path, seeds: range) -> None:
    for seed in seeds:
        size = 2 + seed % 3
        on_ranks(size, Case(seed, size, tmp_path).check)


@pytest.mark.parametrize("exchange_bytes", [4_000, 1 << 29])
def test_filters_travel_to_every_shard(store: Datastore, exchange_bytes: int) -> None:
    """Each rank with one of its own: the bits of one process."""
    exact, rows = ExactIndex(store), torch.arange(ROWS)
    queries = [grid_keys(count, seed=9 + count) for count in (7, 0, 13)]
    names = list(store.document_names)
    masks = torch.rand(13, ROWS, generator=torch.Generator().manual_seed(1)) < 0.3
    filters: list[list[Any]] = [
        [
            Filter(mask=rows % 3 == 0),
            [None, *[Filter(rows=[4, 5, ROWS - 1])] * 5, Filter(documents=names[:1])],
            Filter(own_rows=torch.tensor([0, 5, -1, 9, 100, 3, ROWS - 1]), exclude_rows=[8]),
            Filter(documents=torch.tensor([0, 1, 2, -1, 0, 1, 2])),
        ],
        [None, [], None, Filter(documents=names[1:])],
        [
            Filter(documents=names[2:], exclude_documents=torch.arange(13) % 3 - 1),
            Filter(mask=masks),
            None,
            Filter(rows=[]),
        ],
    ]

    def work(group: Any, rank: int) -> None:
        index = sharded(store, group, exchange_bytes=exchange_bytes, bounds=[0, 33, 33, ROWS])
        for given in filters[rank]:
            found = index.search(queries[rank], 30 + rank, filter=given)
            assert_same(found, exact.search(queries[rank], 30 + rank, filter=given))
        narrow = Filter(documents=names[:2])
        found = index.restricted(narrow).search(queries[rank], 9)
        assert_same(found, exact.search(queries[rank], 9, filter=narrow))
        with pytest.raises(ValueError if rank == 2 else RankFailedError):
            index.search(queries[rank], 3, filter=Filter(rows=[ROWS]) if rank == 2 else None)

    on_ranks(3, work)


def test_queries_and_keys_that_are_not_numbers(tmp_path: Path) -> None:
    keys = grid_keys(60).float()
    queries = grid_keys(6, seed=1).float()
    queries[2, 3], queries[3] = float("nan"), 1e30
    store = make_datastore(tmp_path / "ds", keys)
    wanted = ExactIndex(store).search(queries, 9)
    assert (wanted[1][2] == -1).all()  # finds nothing, which is no failed shard

    def work(group: Any, rank: int) -> None:
        assert_same(sharded(store, group).search(queries, 9), wanted)

    on_ranks(2, work)


def test_a_datastore_without_rows(tmp_path: Path) -> None:
    store = make_datastore(tmp_path / "ds", grid_keys(0))

    def work(group: Any, rank: int) -> None:
        index = sharded(store, group)
        distances, indices = index.search(grid_keys(3), 2)
        assert distances.isinf().all() and (indices == -1).all()
        assert (index.tokens(indices) == -1).all()

    on_ranks(2, work)


@pytest.mark.parametrize("options", [{}, {"resident_bytes": 0, "codes": False}], ids=str)
def test_traffic_and_memory_are_as_stated(store: Datastore, options: dict[str, Any]) -> None:
    """Q x D x 2 bytes to each other shard, Q x k x 12 back from it, whatever the rounds."""
    bounds, counts, k = [0, 20, 700, ROWS], (40, 0, 11), 25

    def work(group: Any, rank: int) -> tuple[int, int]:
        index = sharded(store, group, bounds=bounds, exchange_bytes=50_000, **options)
        begun = index.ranks.sent, index.ranks.received
        index.search(grid_keys(counts[rank], seed=rank), k)
        return index.ranks.sent - begun[0], index.ranks.received - begun[1]

    widths = [min(k, stop - start) for start, stop in pairwise(bounds)]
    for rank, (sent, received) in enumerate(on_ranks(3, work)):
        others = [r for r in range(3) if r != rank]
        asked = counts[rank] * DIM * 2 * len(others)
        assert sent == asked + sum(counts[r] for r in others) * widths[rank] * NEIGHBOR_BYTES
        asked = sum(counts[r] for r in others) * DIM * 2
        back = counts[rank] * sum(widths[r] for r in others) * NEIGHBOR_BYTES
        assert received == asked + back


def test_without_a_group_or_alone_in_one_it_is_an_exact_index(store: Datastore) -> None:
    exact, queries = ExactIndex(store), grid_keys(9, seed=3)
    index = ShardedIndex(store)
    assert isinstance(index, Index)
    assert (index.ranks.rank, index.ranks.size, index.bounds) == (0, 1, [0, ROWS])

    def work(group: Any, rank: int) -> None:
        alone = sharded(store, group)
        for one in (index, alone):
            for excluded in (None, [1], torch.full((9,), 4)):
                assert_same(one.search(queries, 40, excluded), exact.search(queries, 40, excluded))
            assert one.recall(queries, 40).recall == 1
            with one.together():
                one.search(queries, 2)
        assert alone.ranks.sent == alone.ranks.received == 0

    on_ranks(1, work)
    assert check_exactness(index, queries, 5).exact
    assert "1 ranks" in index.describe()


def test_ranks_search_as_often_as_each_likes(store: Datastore) -> None:
    exact = ExactIndex(store)

    def work(group: Any, rank: int) -> None:
        index = sharded(store, group)
        with index.together(), index.together():
            for turn in range(3 * rank):
                queries = grid_keys(1 + turn, seed=10 * rank + turn)
                assert_same(index.search(queries, 5 + turn), exact.search(queries, 5 + turn))
        assert_same(index.search(grid_keys(2), 3), exact.search(grid_keys(2), 3))

    on_ranks(3, work)


def test_codes_are_used_by_all_or_by_none(tmp_path: Path) -> None:
    store = make_datastore(tmp_path / "ds", grid_keys(900))
    StoredCodes.build(store)
    wanted = ExactIndex(store, codes=False).search(grid_keys(5), 7)

    def work(group: Any, rank: int) -> None:
        index = sharded(store, group)
        assert index.local is not None and index.local.codes is not None  # type: ignore[union-attr]
        assert_same(index.search(grid_keys(5), 7), wanted)
        mixed = sharded(store, group, codes="auto" if rank else False)
        assert mixed.local.codes is None  # type: ignore[union-attr]
        assert_same(mixed.search(grid_keys(5), 7), wanted)

    on_ranks(2, work)
