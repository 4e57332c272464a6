"""Ranks that are threads of this process, each with a gloo group of its own: real exchanges."""

from __future__ import annotations

import threading
import traceback
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch.distributed as dist

#: Seconds: of a machine many times slower than any.
PATIENCE = 120.0


def on_ranks(
    size: int, work: Callable[[Any, int], Any], *, timeout: float = PATIENCE, errors: bool = False
) -> list[Any]:
    """What ``work(group, rank)`` gives on each of `size` ranks; or, with `errors`, raises."""
    store, found = dist.HashStore(), [None] * size
    raised: list[str] = []

    def run(rank: int) -> None:
        try:
            group = dist.ProcessGroupGloo(store, rank, size, timedelta(seconds=timeout))
            found[rank] = work(group, rank)
        except Exception as error:
            found[rank] = error
            raised.append(traceback.format_exc())

    threads = [threading.Thread(target=run, args=(rank,), daemon=True) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(2 * PATIENCE)
    assert not any(thread.is_alive() for thread in threads), "ranks wait for each other"
    assert errors or not raised, "\n".join(raised)
    return found
