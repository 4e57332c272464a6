"""A bound socket, and uvicorn on it until Ctrl-C."""

from __future__ import annotations

import asyncio
import resource
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

_BACKLOG, _LEAST_BACKLOG = 512, 16
#: Seconds without a request, or with one that does not come whole, after which a connection ends.
#: Many clients keep idle ones for 5 seconds: a request must not meet the closing.
_IDLE, _PAGE_IDLE = 75.0, 5.0
#: Seconds that a connection without a request is spared: its request may be under way.
_JUST_NOW = 1.0
#: Files that others than connections may open meanwhile.
_OTHER_FILES = 64
#: Seconds in which those who were cut short are told so.
_FAREWELL = 5


class Listener:
    """Listens at once, so that who comes before it serves waits and is not refused.

    Args:
        host, port: to bind to; port 0 takes any free one.

    OSError where nothing can listen there.
    """

    def __init__(self, host: str, port: int) -> None:
        self.host = host
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self._socket = socket.socket(family, socket.SOCK_STREAM)
        try:
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            self._socket.bind((host, port))
            self._socket.listen(_BACKLOG)
        except OSError as error:
            self._socket.close()
            place = f"{host}:{port}"
            raise OSError(error.errno, f"cannot listen at {place}: {error.strerror}") from None
        self.port = int(self._socket.getsockname()[1])

    @property
    def url(self) -> str:
        """By which it is reached from this machine, without a slash at the end."""
        host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(self.host, self.host)
        return f"http://{f'[{host}]' if ':' in host else host}:{self.port}"

    def run(self, app: Any, draining: Draining | None = None, connections: int = 32) -> None:
        """Serve until Ctrl-C or SIGTERM, whose usual effects then follow.

        Args:
            app: an ASGI application; what fails it says itself.
            draining: what is to end before connections are closed.
            connections: at most. A further one takes the place of the one that has been without a
                request for the longest, and is refused with 503 where all have one.
        """
        connections = _allowed(connections)
        config = uvicorn.Config(
            app,
            log_config=None,
            log_level="critical",
            access_log=False,
            lifespan="off",
            ws="none",
            http=_Connection,
            loop="asyncio",
            server_header=False,
            proxy_headers=False,
            limit_concurrency=connections + 1,  # that many are too many
            backlog=_backlog(connections),
            timeout_keep_alive=_PAGE_IDLE if draining is None else _IDLE,
            timeout_graceful_shutdown=0 if draining is None else _FAREWELL,
            h11_max_incomplete_event_size=32 << 10,
        )
        with self._socket:
            server = _Server(config, draining)
            if draining is not None:
                draining.stopping = lambda: setattr(server, "should_exit", True)
                if draining.stopped:  # before there was a server to tell
                    server.should_exit = True
            server.run(sockets=[self._socket])

    def close(self) -> None:
        self._socket.close()


class Draining:
    """What is asked at the end: told that it comes, waited for, and then ended.

    Args:
        seconds: to wait for it. A second Ctrl-C cuts the wait short.
    """

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        #: Tells the server, from any thread; set while one runs.
        self.stopping: Callable[[], None] = lambda: None
        self.stopped = False

    def stop(self) -> None:
        """End the serving, from any thread, also one that is yet to begin."""
        self.stopped = True
        self.stopping()

    def begin(self) -> None:
        """Take nothing more."""
        raise NotImplementedError

    @property
    def done(self) -> bool:
        """Whether nothing is under way."""
        raise NotImplementedError

    def cut(self) -> None:
        """End what is under way."""
        raise NotImplementedError


class _Server(uvicorn.Server):  # type: ignore[misc]
    """Answers on while it drains, also those who ask how it is."""

    def __init__(self, config: uvicorn.Config, draining: Draining | None) -> None:
        super().__init__(config)
        self._draining = draining

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        if self._draining is not None:
            self._draining.begin()
            end = time.monotonic() + self._draining.seconds
            while not (self._draining.done or self.force_exit or time.monotonic() > end):
                await asyncio.sleep(0.05)
            self._draining.cut()
        await super().shutdown(sockets)


class _Connection(H11Protocol):  # type: ignore[misc]
    """Gives its place up where it has no request, or only a beginning of one, and others come."""

    timeout_keep_alive_task: asyncio.TimerHandle | None

    def connection_made(self, transport: asyncio.Transport) -> None:
        self.idle_since = self.loop.time()
        super().connection_made(transport)
        self._make_room()
        self._limit_idling()

    def data_received(self, data: bytes) -> None:
        self._make_room()
        super().data_received(data)
        self._limit_idling()

    def on_response_complete(self) -> None:
        self.idle_since = self.loop.time()
        super().on_response_complete()

    @property
    def idle(self) -> bool:
        """Whether there is no request that is yet to be answered."""
        return self.cycle is None or self.cycle.response_complete

    def _limit_idling(self) -> None:
        """End it in time, however slowly the bytes of its next request come."""
        if self.idle and self.timeout_keep_alive_task is None:
            end = self.idle_since + self.timeout_keep_alive
            self.timeout_keep_alive_task = self.loop.call_at(end, self.timeout_keep_alive_handler)

    def _make_room(self) -> None:
        """Close who has been idle for the longest, where there are too many for a request now."""
        over = len(self.connections) - self.limit_concurrency + 1
        if over <= 0:
            return
        idle = [other for other in self.connections if other.idle and other is not self]
        idle.sort(key=lambda other: other.idle_since)
        for other in idle[:over]:
            # Many that come at once are told 503 rather than cut off before they could ask.
            young = self.loop.time() - other.idle_since < _JUST_NOW
            if young and len(self.connections) < _most(self.limit_concurrency):
                break
            # It may not read what it was sent, so nothing is waited for.
            other.transport.abort()
            self.connections.discard(other)


def _most(connections: int) -> int:
    """Held at most, where many come at once."""
    return connections + connections // 2


def _allowed(connections: int) -> int:
    """As many connections as this process may have files, which it is allowed where it can be."""
    used = len(list(Path("/dev/fd").iterdir())) + _OTHER_FILES
    wanted = used + _most(connections + 1) + _backlog(connections)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY or soft >= wanted:
        return connections
    soft = 2 * wanted if hard == resource.RLIM_INFINITY else min(2 * wanted, hard)
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    return connections if soft >= wanted else max(1, (soft - used) // 2 - 2)


def _backlog(connections: int) -> int:
    """That many are taken in before any of them is looked at."""
    return min(_BACKLOG, max(_LEAST_BACKLOG, connections // 2))
