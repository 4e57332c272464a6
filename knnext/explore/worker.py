"""One thread for the model and the search: they are asked one thing at a time."""

from __future__ import annotations

import asyncio
import contextlib
import queue
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

from knnext.errors import KnnextError
from knnext.explore.session import Limit

Result = TypeVar("Result")
#: Seconds in which work that looks at its limit finds that it is over, and says so itself.
_GRACE = 1.0


class Busy(KnnextError, RuntimeError):
    """So many wait already that one more would wait too long."""


class Worker:
    """Runs what it is given in order, in a thread of its own.

    The thread is a daemon: a search that is in the midst of its work must not hold up the end of
    the program.
    """

    def __init__(self, most_waiting: int = 4) -> None:
        self._jobs: queue.Queue[tuple[Callable[[Limit], Any], _Ask]] = queue.Queue(most_waiting)
        self.idle = threading.Event()
        self.idle.set()
        threading.Thread(target=self._work, name="knnext-explore", daemon=True).start()

    async def run(self, work: Callable[[Limit], Result], seconds: float) -> Result:
        """What `work` gives, within so many seconds of its beginning.

        Raises:
            Busy: too many wait already.
            TimeoutError: it did not end in time; what it does then goes unheard.
            Exception: what `work` raises.
        """
        loop = asyncio.get_running_loop()
        ask = _Ask(Limit(seconds), loop, loop.create_future(), loop.create_future())
        self._forget()
        try:
            self._jobs.put_nowait((work, ask))
        except queue.Full:
            raise Busy("other searches are waiting already; try again in a moment") from None
        try:
            # Those before it have their time first.
            await asyncio.wait_for(ask.begun, seconds * (1 + self._jobs.maxsize))
            return await asyncio.wait_for(ask.answer, seconds + _GRACE)
        finally:
            ask.limit.cancelled = True

    def _forget(self) -> None:
        """Who waits no more takes no place."""
        with self._jobs.mutex:
            kept = [job for job in self._jobs.queue if not job[1].limit.cancelled]
            self._jobs.queue.clear()
            self._jobs.queue.extend(kept)

    def _work(self) -> None:
        while True:
            work, ask = self._jobs.get()
            if ask.limit.cancelled:
                continue
            self.idle.clear()
            try:
                ask.limit.restart()
                ask.tell(ask.begun.set_result, None)
                ask.tell(ask.answer.set_result, work(ask.limit))
            except BaseException as error:  # whoever asked is told
                ask.tell(ask.answer.set_exception, error)
            finally:
                self.idle.set()


@dataclass
class _Ask:
    """Who waits, in which loop, and until when."""

    limit: Limit
    loop: asyncio.AbstractEventLoop
    begun: asyncio.Future[None]
    answer: asyncio.Future[Any]

    def tell(self, outcome: Callable[[Any], None], value: Any) -> None:
        """Set a future, from another thread; one that is done already is left alone."""

        def set_it() -> None:
            with contextlib.suppress(asyncio.InvalidStateError):
                outcome(value)

        with contextlib.suppress(RuntimeError):  # the loop has ended, and nobody listens
            self.loop.call_soon_threadsafe(set_it)
