"""How this process was started: alone, or as one of torchrun's ranks. Imports nothing heavy."""

from __future__ import annotations

import os

#: Seconds. Ranks differ by what one of them computes between two exchanges, never by more.
DEFAULT_TIMEOUT = 1800.0

#: What torchrun, or a script in its place, says to each process.
_VARIABLES = ("RANK", "WORLD_SIZE", "MASTER_ADDR")


def launched() -> tuple[int, int]:
    """(rank, number of ranks) as torchrun's environment has them; (0, 1) without one."""
    found = [os.environ.get(name) for name in _VARIABLES]
    if None in found:
        return 0, 1
    try:
        rank, size = (int(text or "") for text in found[:2])
    except ValueError:
        rank, size = -1, -1
    if not 0 <= rank < size:
        raise ValueError(
            f"RANK and WORLD_SIZE must be a number below another, got {found[0]!r} and {found[1]!r}"
        )
    return rank, size


def local_rank() -> int:
    """Which of the ranks of this machine this is, by which one of its GPUs is taken."""
    return int(os.environ.get("LOCAL_RANK") or 0)
