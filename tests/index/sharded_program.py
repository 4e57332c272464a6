"""What each process of test_sharded_processes.py does; torchrun runs it as a module."""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from knnext.datastore import Datastore
from knnext.index import ExactIndex, ShardedIndex
from knnext.ranks import RankLostError, Ranks, joined, local_rank
from tests.index.sharded_cases import Case
from tests.index.test_exact import grid_keys, make_datastore
from tests.index.threads import PATIENCE


def search_for_ever(folder: Path) -> None:
    """Until another rank is lost, which is then said; the first rank tells of its first search."""
    index, turn = None, 0
    try:
        with joined(timeout=PATIENCE) as ranks:
            ranks.timeout = 8.0  # once they have found each other
            index = ShardedIndex(Datastore.open(folder), ranks, exchange_bytes=1)
            while True:
                index.search(index.datastore.keys[:50], 20)
                if turn == 0 and ranks.rank == 0:
                    print("searching", flush=True)
                turn += 1
    except RankLostError as error:
        sys.exit(f"lost: {error}")


def main(folder: Path, seeds: range, device: str) -> None:
    with joined(device, PATIENCE) as ranks:
        if device != "cpu":
            over_gpus(ranks, folder, f"{device}:{local_rank()}")
        for seed in seeds:
            if ranks.rank == 0:
                Case(seed, ranks.size, folder)
            ranks.gather([seed])  # it is written
            Case(seed, ranks.size, folder, make=False).check(ranks, ranks.rank)
        print(f"rank {ranks.rank} of {ranks.size}: the same in {len(seeds)} cases", flush=True)


def over_gpus(ranks: Ranks, folder: Path, device: str) -> None:
    """Shards on GPUs, whose messages go by NCCL: the answers of the whole, before all else."""
    path = folder / "gpus"
    if ranks.rank == 0:
        make_datastore(path, grid_keys(903))
    ranks.gather([0])  # it is written
    store = Datastore.open(path)
    for size in (1 << 29, 20_000):
        index = ShardedIndex(store, ranks, device=device, exchange_bytes=size)
        assert index._exchange_device.type == "cuda", "the messages do not go by NCCL"
        queries = grid_keys(40, seed=ranks.rank).to(device)
        found, wanted = index.search(queries, 50), ExactIndex(store).search(queries.cpu(), 50)
        assert all(torch.equal(one.cpu(), other) for one, other in zip(found, wanted, strict=True))
    print(f"rank {ranks.rank} of {ranks.size}: the same over NCCL on {device}", flush=True)


if __name__ == "__main__" and len(sys.argv) == 2:
    search_for_ever(Path(sys.argv[1]))
elif __name__ == "__main__":
    main(Path(sys.argv[1]), range(int(sys.argv[2])), (*sys.argv, "cpu")[3])
