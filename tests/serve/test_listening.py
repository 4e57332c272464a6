"""Connections: who is idle makes room for who asks."""

from __future__ import annotations

import asyncio
import contextlib
import resource
import socket
import threading
from collections.abc import Iterator
from typing import Any

import pytest

pytest.importorskip("starlette", reason="the extra serve is not installed")
pytest.importorskip("uvicorn", reason="the extra serve is not installed")

from knnext.serve import listening
from knnext.serve.listening import Draining, Listener
from tests.serve.asking import PATIENCE

MOST = 4
ASKED = b"GET / HTTP/1.1\r\nHost: x\r\n\r\n"
BEGUN = b"GET / HTTP/1.1\r\nHost: x\r\nX-Slow: a"


class Ending(Draining):
    """Nothing is waited for."""

    done = True

    def begin(self) -> None: ...

    def cut(self) -> None: ...


class Server:
    """Answers `ok`; "/held" when it is let go."""

    def __init__(self, most: int = MOST) -> None:
        self.held = threading.Semaphore(0)
        self.go_on = threading.Event()
        self.listener, self.end = Listener("127.0.0.1", 0), Ending(0)
        self.thread = threading.Thread(
            target=self.listener.run, args=(self, self.end, most), daemon=True
        )
        self.thread.start()
        self.clients: list[socket.socket] = []

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["path"] == "/held":
            self.held.release()
            await asyncio.get_running_loop().run_in_executor(None, self.go_on.wait, PATIENCE)
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"ok"})

    def connect(self, said: bytes = b"") -> socket.socket:
        client = socket.create_connection(("127.0.0.1", self.listener.port), timeout=PATIENCE)
        self.clients.append(client)
        client.sendall(said)
        return client

    def ask(self, client: socket.socket | None = None) -> bytes:
        """The status of an answer, and the connection goes on."""
        client = client or self.connect()
        client.sendall(ASKED)
        return status(client)

    def close(self) -> None:
        self.go_on.set()
        self.end.stop()
        for client in self.clients:
            client.close()
        self.thread.join(PATIENCE)


def status(client: socket.socket) -> bytes:
    """Of the one answer that comes, without a length: its end is the end of its last chunk."""
    found = b""
    while not found.endswith((b"0\r\n\r\n", b"Service Unavailable")):
        part = client.recv(4096)
        assert part, found
        found += part
    return found.split()[1]


def ended(client: socket.socket) -> bool:
    """Whether it is closed by the other side, now or at last."""
    with contextlib.suppress(ConnectionResetError):
        return client.recv(1) == b""
    return True


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setattr(listening, "_JUST_NOW", 0.0)
    server = Server()
    yield server
    server.close()


@pytest.mark.parametrize("kind", ["never asked", "half a request", "answered"])
def test_who_is_idle_for_the_longest_makes_room(server: Server, kind: str) -> None:
    said = {"half a request": BEGUN}.get(kind, b"")
    idle = [server.connect(said) for _ in range(MOST)]
    if kind == "answered":
        assert [server.ask(client) for client in idle] == [b"200"] * MOST
    for client in idle:  # each further one costs one, in their order
        assert server.ask() == b"200"
        assert ended(client)
    # All that were there are gone, those that came are kept.
    assert [server.ask(client) for client in server.clients[MOST:]] == [b"200"] * MOST


def test_who_has_a_request_keeps_its_place(server: Server) -> None:
    """And where all have one, the next one is told so, and asks again when there is room."""
    busy = [server.connect(ASKED.replace(b"/ ", b"/held ", 1)) for _ in range(MOST)]
    for _ in busy:
        assert server.held.acquire(timeout=PATIENCE)
    assert server.ask() == b"503"
    server.go_on.set()
    assert [status(client) for client in busy] == [b"200"] * MOST
    assert server.ask() == b"200"


def test_a_crowd_that_comes_at_once_is_told_so_and_not_cut_off(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(listening, "_JUST_NOW", PATIENCE)
    server = Server()
    try:
        clients = [server.connect() for _ in range(MOST + 1)]
        # The last: that it is heard shows that all before it were taken in.
        assert server.ask(clients[-1]) == b"503"
        assert server.ask(clients[0]) == b"200"
        for _ in range(3 * MOST):  # but no crowd grows without end
            server.connect()
        assert ended(clients[1]) and ended(clients[2])
    finally:
        server.close()


@pytest.mark.parametrize("said", [b"", BEGUN])
def test_a_request_that_does_not_come_ends_the_connection(
    monkeypatch: pytest.MonkeyPatch, said: bytes
) -> None:
    monkeypatch.setattr(listening, "_IDLE", 0.01)
    server = Server()
    try:
        client = server.connect(said)
        client.settimeout(60)
        assert ended(client)
    finally:
        server.close()


def test_connections_are_fewer_than_files_may_be_open(monkeypatch: pytest.MonkeyPatch) -> None:
    limits: list[tuple[int, int]] = []
    monkeypatch.setattr(resource, "setrlimit", lambda _, given: limits.append(given))

    def allowed(soft: int, hard: int) -> int:
        monkeypatch.setattr(resource, "getrlimit", lambda _: (soft, hard))
        return listening._allowed(1024)

    assert allowed(1 << 20, 1 << 20) == allowed(-1, -1) == 1024 and not limits
    assert allowed(1024, 1 << 20) == allowed(1024, -1) == 1024
    assert all(2 * 1024 < soft < 8192 for soft, _ in limits)
    few = allowed(1024, 1024)
    assert 200 < few < 1024 and limits[-1] == (1024, 1024)
    assert allowed(16, 16) == 1
