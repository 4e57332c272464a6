"""ShardedIndex against ExactIndex of the whole, in every bit; the ranks are threads."""

from __future__ import annotations

import copy
import pickle
import random
import threading
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from knnext.datastore import Datastore
from knnext.index import ExactIndex, Filter, Index, ShardedIndex, StoredCodes, check_exactness
from knnext.index.sharded_rounds import NEIGHBOR_BYTES
from knnext.ranks import RankFailedError, RankLostError, Ranks
from tests.index.test_exact import DIM, grid_keys, make_datastore
from tests.index.threads import PATIENCE, on_ranks

Found = tuple[Tensor, Tensor]
ROWS = 1403
DOCUMENTS = [("a", 400), ("b", 3), ("c", 7), ("d", 493), ("e", 500)]


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Datastore:
    """Ties wherever one looks, in two files, with documents of all sizes."""
    folder = tmp_path_factory.mktemp("sharded")
    return make_datastore(folder / "ds", grid_keys(ROWS), documents=DOCUMENTS)


def sharded(store: Datastore, group: Any, **options: Any) -> ShardedIndex:
    return ShardedIndex(store, group, timeout=PATIENCE, **options)


def assert_same(found: Found, wanted: Found) -> None:
    assert torch.equal(found[0], wanted[0])
    assert torch.equal(found[1], wanted[1])


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


class Case:
    """A datastore, how it is divided, and what each rank asks of it: all drawn from a seed.

    `make` writes the datastore; without it the one that another process has written is opened.
    """

    def __init__(self, seed: int, size: int, folder: Path, *, make: bool = True) -> None:
        rng, generator = random.Random(seed), torch.Generator().manual_seed(seed)
        rows, dim = rng.choice([1, 2, 17, 300, 1500]), rng.choice([1, 7, 24, 65, 128])
        dtype = rng.choice([torch.float16, torch.bfloat16, torch.float32])
        keys = torch.randn(rows, dim, generator=generator)
        kind = rng.choice(["gauss", "far", "twice", "grid"])
        if kind == "far":
            keys = keys * 0.01 + 100
        elif kind == "twice":
            keys = keys[torch.arange(rows) // 2]
        elif kind == "grid":
            keys = keys.round()
        metric, per_file = rng.choice(["l2", "ip"]), rng.choice([700, 100_000])
        cut = rng.randint(1, rows)
        documents = [("a", cut), *([("b", rows - cut)] if cut < rows else [])]
        coded, sampled, path = rng.random() < 0.5, rng.random() < 0.3, folder / str(seed)
        if make:
            made = {"metric": metric, "entries_per_shard": per_file}
            store = make_datastore(path, keys.to(dtype), documents=documents, **made)
            if coded:
                StoredCodes.build(store)
        store = Datastore.open(path)
        self.store = store.subsample(0.5, seed) if sampled else store
        self.options = {
            "refine": rng.random() < 0.7,
            "resident_bytes": rng.choice([0, 1 << 30]),
            "chunk_bytes": rng.choice([1000, 1 << 28]),
            "query_batch": rng.choice([3, 4096]),
            "exchange_bytes": rng.choice([1, 20_000, 1 << 29]),
        }
        rows = self.store.num_entries
        inner = sorted(rng.randint(0, rows) for _ in range(size - 1))
        self.options["bounds"] = rng.choice([None, [0, *inner, rows]])
        self.k = rng.choice([1, 3, 64, 200])
        self.asked = []
        for _ in range(size):
            count = rng.choice([0, 1, 5, 70])
            mine = torch.randn(count, dim, generator=generator)
            if rows and count:  # half of them are keys: they meet themselves, or their doubles
                which = torch.randint(0, rows, (count // 2 + 1,), generator=generator)
                mine[: len(which)] = self.store.keys[which].to(mine.dtype)
            each = torch.randint(-1, len(documents), (count,), generator=generator)
            mine = mine.to(rng.choice([dtype, torch.float32, torch.float64]))
            self.asked.append((mine, rng.choice([None, [0], each])))

    def check(self, group: Any, rank: int) -> None:
        queries, excluded = self.asked[rank]
        exact = ExactIndex(self.store, refine=self.options["refine"])
        index = sharded(self.store, group, **self.options)
        found = index.search(queries, self.k, excluded)
        assert_same(found, exact.search(queries, self.k, excluded))


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


def test_faiss_on_every_shard_tells_its_recall(tmp_path: Path) -> None:
    pytest.importorskip("faiss")
    keys = torch.randn(1200, 16, generator=torch.Generator().manual_seed(1)).half()
    store = make_datastore(tmp_path / "ds", keys, documents=[("a", 700), ("b", 500)])
    queries = keys[::40].clone()
    exact = ExactIndex(store)

    def work(group: Any, rank: int) -> float:
        index = sharded(
            store, group, bounds=[0, 500, 500, 1200], faiss=True, rescore=True, gpu=False
        )
        mine = queries[rank::3]
        assert_same(index.search(mine, 9), exact.search(mine, 9))  # flat, and rescored
        found = index.search(mine, 9, [0])
        assert (found[1] >= 700).all()
        assert "FAISS" in index.describe() or rank == 1
        again = sharded(
            store, group, bounds=[0, 500, 500, 1200], faiss=True, path=tmp_path / "lists",
            factory="IVF16,PQ4", nprobe=1, gpu=False,
        )  # fmt: skip
        told = again.recall(mine, 9)
        assert told.num_queries == 30
        return told.recall

    recalls = on_ranks(3, work)
    assert len(set(recalls)) == 1 and 0 < recalls[0] < 1
    assert {path.name for path in (tmp_path / "lists").iterdir()} == {"0-500", "500-1200"}
