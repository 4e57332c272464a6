"""What each process of test_sharded_processes.py does; torchrun runs it as a module."""

from __future__ import annotations

import sys
from pathlib import Path

from knnext.ranks import joined
from tests.index.test_sharded import PATIENCE, Case


def main(folder: Path, seeds: range) -> None:
    with joined(timeout=PATIENCE) as ranks:
        for seed in seeds:
            if ranks.rank == 0:
                Case(seed, ranks.size, folder)
            ranks.gather([seed])  # it is written
            Case(seed, ranks.size, folder, make=False).check(ranks, ranks.rank)
        print(f"rank {ranks.rank} of {ranks.size}: the same in {len(seeds)} cases", flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), range(int(sys.argv[2])))
