"""A child that dies at one of its operations, as it would by `kill -9` or a lost machine."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any


def dies_at(
    operations: Mapping[Any, Iterable[str]],
    point: int | None,
    count_file: Path,
    *,
    passed_over: Callable[[str, tuple[Any, ...]], bool] = lambda name, arguments: False,
) -> None:
    """Kill this process at the operation number ``point`` of those by (owner, names), from now on.

    None counts them into ``count_file``. Of a ``pwrite`` the first half is done.
    """
    done = 0

    def wrap(owner: Any, name: str) -> None:
        real = getattr(owner, name)

        def counted(*arguments: Any, **options: Any) -> Any:
            nonlocal done
            if passed_over(name, arguments):
                return real(*arguments, **options)
            done += 1
            if done - 1 == point:
                if name == "pwrite":
                    fd, data, offset = arguments
                    real(fd, data[: len(data) // 2], offset)
                os.kill(os.getpid(), signal.SIGKILL)
            if point is None:
                count_file.write_text(str(done))
            return real(*arguments, **options)

        setattr(owner, name, counted)

    for owner, names in operations.items():
        for name in names:
            wrap(owner, name)
