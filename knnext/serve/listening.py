"""A bound socket, and uvicorn on it until Ctrl-C."""

from __future__ import annotations

import asyncio
import socket
import time
from collections.abc import Callable
from typing import Any

import uvicorn

_BACKLOG = 512
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
            connections: at most, further ones are refused with 503.
        """
        config = uvicorn.Config(
            app,
            log_config=None,
            log_level="critical",
            access_log=False,
            lifespan="off",
            ws="none",
            http="h11",
            loop="asyncio",
            server_header=False,
            proxy_headers=False,
            limit_concurrency=connections,
            backlog=_BACKLOG,
            # Many clients keep idle ones for 5 seconds: a request must not meet the closing.
            timeout_keep_alive=5 if draining is None else 75,
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
