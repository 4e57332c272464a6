"""What each process of test_sharded_processes.py does; torchrun runs it as a module."""

from __future__ import annotations

import sys
from pathlib import Path

from knnext.datastore import Datastore
from knnext.index import ShardedIndex
from knnext.ranks import RankLostError, joined
from tests.index.test_sharded import PATIENCE, Case


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


def main(folder: Path, seeds: range) -> None:
    with joined(timeout=PATIENCE) as ranks:
        for seed in seeds:
            if ranks.rank == 0:
                Case(seed, ranks.size, folder)
            ranks.gather([seed])  # it is written
            Case(seed, ranks.size, folder, make=False).check(ranks, ranks.rank)
        print(f"rank {ranks.rank} of {ranks.size}: the same in {len(seeds)} cases", flush=True)


if __name__ == "__main__" and len(sys.argv) == 2:
    search_for_ever(Path(sys.argv[1]))
elif __name__ == "__main__":
    main(Path(sys.argv[1]), range(int(sys.argv[2])))
