"""Exchanges between GPUs, by the rules of NCCL, where there are none (tests/index/pretend_gpus)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from knnext.datastore import Datastore
from knnext.index import ExactIndex, ShardedIndex
from knnext.ranks import RankFailedError, RankLostError, Ranks
from tests.index.pretend_gpus import GPU, OnGpu, Pretended, nccl
from tests.index.test_exact import grid_keys, make_datastore
from tests.index.threads import PATIENCE, on_ranks

ROWS = 903


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Datastore:
    folder = tmp_path_factory.mktemp("nccl")
    return make_datastore(folder / "ds", grid_keys(ROWS), documents=[("a", 400), ("b", 503)])


def on_gpus(store: Datastore, group: Any, **options: Any) -> ShardedIndex:
    """Shards that are searched on the CPU, and whose messages lie on GPUs."""
    index = ShardedIndex(store, group, timeout=PATIENCE, **options)
    index._exchange_device = GPU
    index.ranks.connect(GPU)
    return index


def test_what_is_pretended_is_refused_where_a_gpu_would_refuse_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with nccl(monkeypatch), OnGpu():
        there, here = torch.ones(3, device=GPU), torch.ones(3)
        assert there.is_cuda and (there + there).is_cuda and not there.cpu().is_cuda
        assert torch.equal(there.cpu(), here) and here.to(GPU).is_cuda
        with pytest.raises(AssertionError, match="on a GPU and on the CPU"):
            _ = there + here
        there[:2] = here[:2] * 2
        assert there.cpu().tolist() == [2, 2, 1]


@pytest.mark.parametrize("exchange_bytes", [20_000, 1 << 29])
@pytest.mark.parametrize("bounds", [None, [0, 5, 5, ROWS], [0, 0, 0, ROWS]], ids=str)
def test_searches_over_gpus_are_those_of_one_process(
    store: Datastore,
    monkeypatch: pytest.MonkeyPatch,
    bounds: list[int] | None,
    exchange_bytes: int,
) -> None:
    exact = ExactIndex(store)
    queries = [grid_keys(count, seed=9 + count) for count in (7, 0, 13)]
    excluded: list[Any] = [torch.randint(-1, 2, (7,)), torch.empty(0, dtype=torch.int64), [0]]

    def work(group: Any, rank: int) -> None:
        with OnGpu():
            index = on_gpus(store, group, bounds=bounds, exchange_bytes=exchange_bytes)
            mine, k = queries[rank], 30 + 10 * rank
            for without in (None, excluded[rank]):
                for given in (mine, mine.to(GPU)):
                    found = index.search(given, k, without)
                    assert all(one.is_cuda == given.is_cuda for one in found)
                    wanted = exact.search(mine, k, without)
                    assert torch.equal(found[0].cpu(), wanted[0])
                    assert torch.equal(found[1].cpu(), wanted[1])

    with nccl(monkeypatch) as counts:
        on_ranks(3, work)
    assert counts["connected"] == 3 and counts["bundles"] > 0


def test_a_failed_shard_is_an_error_of_all_and_the_next_search_works(
    store: Datastore, monkeypatch: pytest.MonkeyPatch
) -> None:
    queries = grid_keys(5, seed=3)

    def work(group: Any, rank: int) -> None:
        with OnGpu():
            index = on_gpus(store, group)
            assert index.local is not None
            if rank == 1:
                broken = index.local.search_groups
                index.local.search_groups = None  # type: ignore[assignment,method-assign]
            with pytest.raises(RankFailedError if rank != 1 else TypeError):
                index.search(queries, 4)
            if rank == 1:
                index.local.search_groups = broken  # type: ignore[method-assign]
            assert torch.equal(index.search(queries, 4)[1], ExactIndex(store).search(queries, 4)[1])

    with nccl(monkeypatch):
        on_ranks(2, work)


def test_a_wait_for_a_gpu_has_an_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """NCCL's `wait` without a time returns at once, and what was received would be anything."""

    def work(group: Any, rank: int) -> None:
        ranks = Ranks(group, timeout=PATIENCE)
        with OnGpu():
            ranks.connect(GPU)
            if rank == 0:
                room = torch.empty(3, device=GPU)
                ranks.timeout = 0.5
                with pytest.raises(RankLostError, match=r"did not answer within 0\.5 s"):
                    ranks.exchange([], [(1, room)]).wait()
                assert isinstance(room, Pretended)
        ranks.timeout = PATIENCE
        ranks.gather([rank])

    with nccl(monkeypatch):
        on_ranks(2, work)


def test_a_group_with_nccl_is_left_at_once_where_a_rank_was_lost(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """What is under way never ends, and to destroy the group would wait for it."""
    import torch.distributed as dist

    from knnext import ranks as module

    said: list[str] = []
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.setenv(name, "0" if name == "RANK" else "2")
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.delenv("TORCH_NCCL_ASYNC_ERROR_HANDLING", raising=False)
    begun = iter([False, True, False, True])
    monkeypatch.setattr(dist, "is_initialized", lambda: next(begun))
    monkeypatch.setattr(dist, "init_process_group", lambda what, timeout: said.append(what))
    monkeypatch.setattr(dist, "destroy_process_group", lambda: said.append("destroyed"))
    monkeypatch.setattr(
        dist.distributed_c10d, "_abort_process_group", lambda: said.append("aborted")
    )
    monkeypatch.setattr(torch.cuda, "set_device", lambda number: said.append(f"cuda:{number}"))
    monkeypatch.setattr(module, "Ranks", lambda *_, **__: Ranks())
    with pytest.raises(RankLostError), module.joined("cuda:1"):
        import os

        assert os.environ["TORCH_NCCL_ASYNC_ERROR_HANDLING"] == "0"
        raise RankLostError("lost")
    with module.joined("cuda:1"):
        pass
    both = ["cuda:1", "cpu:gloo,cuda:nccl"]
    assert said == [*both, "aborted", *both, "destroyed"]
