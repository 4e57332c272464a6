"""Work in several threads that an interrupt does not wait for, as a file may take an hour."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from queue import Empty, SimpleQueue
from typing import TypeVar

Item = TypeVar("Item")


def each(
    items: Sequence[Item], work: Callable[[Item], None], done: Callable[[Item], None], size: int
) -> None:
    """``work`` of every item, by up to ``size`` threads, and here ``done`` when it has ended.

    The first error ends it: what is under way is waited for, and the error raised. An interrupt is
    raised at once; what is under way then ends with the process.
    """
    todo: SimpleQueue[Item] = SimpleQueue()
    ended: SimpleQueue[tuple[Item, BaseException | None]] = SimpleQueue()
    enough = threading.Event()
    for item in items:
        todo.put(item)

    def run() -> None:
        while not enough.is_set():
            try:
                item = todo.get_nowait()
            except Empty:
                return
            try:
                work(item)
            except BaseException as error:
                enough.set()
                ended.put((item, error))
            else:
                ended.put((item, None))

    # Those of an executor would be waited for at the end of Python, whatever is done here.
    crew = [threading.Thread(target=run, daemon=True) for _ in range(min(size, len(items)))]
    for thread in crew:
        thread.start()
    try:
        for _ in items:
            item, error = ended.get()
            if error is not None:
                raise error
            done(item)
    except KeyboardInterrupt:
        enough.set()
        raise
    except BaseException:
        enough.set()
        for thread in crew:
            thread.join()
        raise
