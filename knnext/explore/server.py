"""The page and its five questions, over HTTP: Starlette answers, uvicorn serves."""

from __future__ import annotations

import asyncio
import functools
import html
import json
import logging
import secrets
from collections.abc import AsyncIterator, Callable, Coroutine
from typing import Any

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from knnext import __version__
from knnext.explore.session import MOST_NEW_TOKENS, Limit, Session, TooLong
from knnext.explore.worker import Busy, Worker
from knnext.report import explorer_parts, fill, part, script_json
from knnext.serve.errors import Gone, Refused
from knnext.serve.guard import Guard, body_of, disconnected, number_in, text_in
from knnext.serve.listening import Listener

_log = logging.getLogger(__name__)

#: Only what the page brings itself runs; it may ask this server alone, and stand in no other page.
_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; style-src 'unsafe-inline'; "
    "script-src 'unsafe-inline'; img-src data:; connect-src 'self'; base-uri 'none'; "
    "form-action 'none'; frame-ancestors 'none'",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "Cache-Control": "no-store",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
}
_MOST_NEIGHBORS = 32


class Service:
    """The answers to the page's requests.

    Args:
        session: what answers.
        guard: which requests are looked at.
        facts: names and values shown at the page's foot.
        seconds: that one search, or one reading, may take.
    """

    def __init__(
        self, session: Session, guard: Guard, facts: dict[str, str], seconds: float
    ) -> None:
        self.session, self.guard, self.facts, self.seconds = session, guard, facts, seconds
        self.worker = Worker()

    def app(self) -> Starlette:
        """The ASGI application."""
        answers = {
            "read": self.read,
            "write": self.write,
            "nearest": self.nearest,
            "occurrences": self.occurrences,
            "spans": self.spans,
        }
        routes = [Route("/", self.page, methods=["GET"])]
        routes += [
            Route(f"/api/{name}", self._answering(answer), methods=["POST"])
            for name, answer in answers.items()
        ]
        return Starlette(routes=routes)

    async def page(self, request: Request) -> Response:
        try:
            self.guard.check(request, request.query_params.get("token"))
        except Refused as refused:
            return _refusal(refused)
        return HTMLResponse(render(self.session, self.facts), headers=_HEADERS)

    def _answering(
        self, answer: Callable[[dict[str, Any]], Coroutine[Any, Any, Any]]
    ) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        async def respond(request: Request) -> Response:
            try:
                self.guard.check(request, request.headers.get("x-knnext-token"))
                found = await _unless_gone(request, answer(await body_of(request)))
            except Gone:
                return Response(status_code=499)  # which nobody reads
            except Exception as error:
                return _refusal(error)
            if isinstance(found, Response):
                return found
            return JSONResponse(found, headers=_HEADERS)

        return respond

    async def read(self, body: dict[str, Any]) -> Any:
        return await self._run(functools.partial(self.session.read, text_in(body)))

    async def nearest(self, body: dict[str, Any]) -> Any:
        count = number_in(body, "count", 1, _MOST_NEIGHBORS, whole=True)
        return await self._run(functools.partial(self.session.nearest, text_in(body), count))

    async def occurrences(self, body: dict[str, Any]) -> Any:
        count = number_in(body, "count", 1, _MOST_NEIGHBORS, whole=True)
        return await self._run(functools.partial(self.session.occurrences, text_in(body), count))

    async def spans(self, body: dict[str, Any]) -> Any:
        rows = body.get("rows")
        if not isinstance(rows, list) or any(type(row) is not int for row in rows):
            raise Refused(400, "rows must be a list of whole numbers")
        return await self._run(lambda limit: self.session.spans(rows))

    async def write(self, body: dict[str, Any]) -> Response:
        text = text_in(body)
        given = {
            "tokens": number_in(body, "tokens", 1, MOST_NEW_TOKENS, whole=True),
            "temperature": number_in(body, "temperature", 1e-9, 1e9),
            "lmbda": number_in(body, "lmbda", 0, 1),
            "k": number_in(body, "k", 1, self.session.k, whole=True),
            "draw": body.get("draw") is True,
            "seed": number_in(body, "seed", 0, 2**53, whole=True),
        }
        writing = await self._run(lambda limit: self.session.write(text, **given))

        async def lines() -> AsyncIterator[str]:
            try:
                yield json.dumps({"prompt": writing.prompt, "note": writing.note}) + "\n"
                while not writing.done:
                    for step in await self._run(writing.step):
                        yield json.dumps(step) + "\n"
            except Exception as error:  # the answer has begun: its last line says what is wrong
                yield json.dumps({"error": _words(error)[1]}) + "\n"

        headers = {**_HEADERS, "X-Accel-Buffering": "no"}
        return StreamingResponse(lines(), media_type="application/x-ndjson", headers=headers)

    async def _run(self, work: Callable[[Limit], Any]) -> Any:
        return await self.worker.run(work, self.seconds)


async def _unless_gone(request: Request, answer: Coroutine[Any, Any, Any]) -> Any:
    """The answer; given up where whoever asked has gone, as after Stop: the next can ask."""
    work = asyncio.ensure_future(answer)
    gone = asyncio.ensure_future(disconnected(request))
    try:
        await asyncio.wait({work, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not work.done():
            raise Gone
        return work.result()
    finally:
        work.cancel()
        gone.cancel()


def _refusal(error: Exception) -> Response:
    status, words = _words(error)
    return JSONResponse({"error": words}, status, headers=_HEADERS)


def _words(error: Exception) -> tuple[int, str]:
    """Status and words: the asker's doing, too much at once, or a fault of ours."""
    if isinstance(error, Refused):
        return error.status, str(error)
    if isinstance(error, Busy | TooLong):
        return 503, str(error)
    if isinstance(error, asyncio.TimeoutError):
        return 503, "this took too long, and was given up"
    if isinstance(error, ValueError):
        return 400, " ".join(str(error).split())
    _log.error("%s", type(error).__name__, exc_info=error)
    return 500, f"{type(error).__name__}: {' '.join(str(error).split())}"


def render(session: Session, facts: dict[str, str]) -> str:
    """The page as text; the token is not in it."""
    data = {
        "k": session.k,
        "temperature": session.temperature,
        "lmbda": session.lmbda,
        "max_tokens": session.max_tokens,
        "max_new_tokens": MOST_NEW_TOKENS,
    }
    shown = "".join(f"<dt>{html.escape(n)}</dt><dd>{html.escape(v)}</dd>" for n, v in facts.items())
    return fill(
        part("knnext.explore", "page.html"),
        {
            **explorer_parts(),
            "live_style": part("knnext.explore", "live.css"),
            "live": part("knnext.explore", "live.js"),
            "facts": f'<dl class="facts">{shown}</dl>',
            "entries": f"{session.store.num_entries:,}",
            "data": script_json(data),
            "version": html.escape(__version__),
        },
    )


class Server:
    """A bound socket and what will serve on it; `run` returns after Ctrl-C.

    Args:
        session, facts, seconds: see `Service`.
        host, port: to bind to; port 0 takes any free one.
        token: of the address; by default one that nobody can guess.
    """

    def __init__(
        self,
        session: Session,
        facts: dict[str, str],
        *,
        host: str = "127.0.0.1",
        port: int = 0,
        seconds: float = 60.0,
        token: str | None = None,
    ) -> None:
        self.host, self.token = host, token or secrets.token_urlsafe(24)
        self._listener = Listener(host, port)
        self.port = self._listener.port
        self.service = Service(session, Guard(host, self.token), facts, seconds)

    @property
    def address(self) -> str:
        """What a person opens."""
        return f"{self._listener.url}/?token={self.token}"

    def run(self) -> None:
        """Serve until Ctrl-C or SIGTERM, whose usual effects then follow.

        Answers have no effects that would have to be whole: who waits for one is not waited for.
        """
        self._listener.run(self.service.app())
