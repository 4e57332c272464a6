"""Exact search of one datastore by several processes, each of which holds a share of its rows.

    torchrun --nproc-per-node 2 examples/many_ranks.py STORE

Queries travel, keys never; the answers are those of one process, to the bit.
"""

from __future__ import annotations

import sys

import torch

from knnext import Datastore, ExactIndex, ShardedIndex
from knnext.ranks import joined


def main() -> None:
    store = Datastore.open(sys.argv[1])
    with joined() as ranks:
        index = ShardedIndex(store, ranks.group)
        # Each rank asks for what it needs: here for the neighbors of rows of its own choice.
        rows = torch.arange(ranks.rank, 64, ranks.size)
        distances, indices = index.search(store.keys[rows], k=16)
        alone = ExactIndex(store).search(store.keys[rows], k=16)
        same = torch.equal(distances, alone[0]) and torch.equal(indices, alone[1])
        print(f"rank {ranks.rank}: {len(rows)} queries, the answers of one process: {same}")


if __name__ == "__main__":
    main()
