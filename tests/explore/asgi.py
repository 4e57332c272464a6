"""Requests to an ASGI application, without a server."""

from __future__ import annotations

import asyncio
import json
import threading
from typing import Any

HOST = "127.0.0.1:8000"


class Answer:
    """``parts_left``: of the request's body, which nobody read."""

    def __init__(
        self, status: int, headers: dict[str, str], body: bytes, parts_left: int = 0
    ) -> None:
        self.status, self.headers, self.body = status, headers, body
        self.parts_left = parts_left

    @property
    def json(self) -> Any:
        return json.loads(self.body)


def send(
    app: Any,
    method: str,
    path: str,
    *,
    headers: dict[str, str] | list[tuple[str, str]] | None = None,
    body: bytes | list[bytes] = b"",
    host: str | None = HOST,
) -> Answer:
    """The answer to one request; a body that is a list comes in parts."""
    return asyncio.run(_send(app, method, path, headers or {}, body, host))


def hang_up(
    app: Any, path: str, headers: dict[str, str], body: bytes, entered: threading.Event
) -> None:
    """Post, and close the connection when the event comes; returns when nothing is done for it.

    Fails where a task is left, which nobody would wait for, and asyncio would complain of.
    """

    async def run() -> None:
        coming = [{"type": "http.request", "body": body, "more_body": False}]

        async def receive() -> Any:
            if coming:
                return coming.pop()
            await asyncio.to_thread(entered.wait, 300)
            return {"type": "http.disconnect"}

        async def give(message: Any) -> None:
            pass

        scope = _scope("POST", path, "", [*headers.items(), ("host", HOST)])
        await asyncio.wait_for(app(scope, receive, give), 300)
        for _ in range(5):  # those that were cancelled end in the loop's next turns
            await asyncio.sleep(0)
        assert asyncio.all_tasks() == {asyncio.current_task()}

    asyncio.run(run())


def _scope(method: str, path: str, query: str, pairs: list[tuple[str, str]]) -> dict[str, Any]:
    return {
        "type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": method,
        "path": path, "raw_path": path.encode(), "query_string": query.encode(), "root_path": "",
        "scheme": "http", "client": ("127.0.0.1", 1), "server": ("127.0.0.1", 8000),
        "headers": [(n.lower().encode(), v.encode("latin-1")) for n, v in pairs],
    }  # fmt: skip


async def _send(
    app: Any, method: str, path: str, headers: Any, body: bytes | list[bytes], host: str | None
) -> Answer:
    pairs = list(headers.items() if isinstance(headers, dict) else headers)
    pairs += [("host", host)] if host is not None else []
    path, _, query = path.partition("?")
    scope = _scope(method, path, query, pairs)
    parts = body if isinstance(body, list) else [body]
    coming = [{"type": "http.request", "body": p, "more_body": True} for p in parts[:-1]]
    coming.append({"type": "http.request", "body": parts[-1], "more_body": False})
    sent: list[dict[str, Any]] = []
    gone = asyncio.Event()

    async def receive() -> dict[str, Any]:
        if coming:
            return coming.pop(0)
        await gone.wait()  # whoever listens for the end of the connection waits
        return {"type": "http.disconnect"}

    async def give(message: dict[str, Any]) -> None:
        sent.append(message)

    await app(scope, receive, give)
    left = len(coming)
    gone.set()
    found = {n.decode(): v.decode() for n, v in sent[0]["headers"]}
    return Answer(sent[0]["status"], found, b"".join(m.get("body", b"") for m in sent[1:]), left)
