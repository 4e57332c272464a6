"""The routes of OpenAI's interface: Starlette answers, an `Engine` writes."""

from __future__ import annotations

import asyncio
import contextlib
import copy
import functools
import logging
import threading
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from concurrent.futures import TimeoutError as FutureTimeout
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route

from knnext.serve import asked as asking
from knnext.serve.answers import Answers, failed
from knnext.serve.asked import Asked
from knnext.serve.engine import Engine, Job
from knnext.serve.errors import Gone, Refused, late, unready
from knnext.serve.guard import Guard, body_of, disconnected, same
from knnext.serve.listening import Draining
from knnext.serve.metrics import metrics
from knnext.serve.writing import Piece

_log = logging.getLogger(__name__)

#: Bytes of a request: a thousand prompts of a thousand token ids.
MAX_BODY = 8 << 20
_HEADERS = {"Cache-Control": "no-store", "X-Content-Type-Options": "nosniff"}
#: Seconds in which an engine that looks at its limits finds that one has passed.
_GRACE = 2.0
_Parse = Callable[[dict[str, Any], Any, asking.Limits], Asked]


class Service(Draining):
    """Answers requests, once its engine is there.

    Args:
        name: of the model, as clients call it.
        host: that is listened at.
        api_key: that requests must hold. Without one, those of other sites and for other hosts are
            refused where only this machine is served.
        grace: seconds that what is under way has at the end.
    """

    def __init__(
        self, name: str, host: str = "127.0.0.1", api_key: str | None = None, grace: float = 10.0
    ) -> None:
        super().__init__(grace)
        self.name, self._created = name, int(time.time())
        self._guard = Guard(host)
        self._key = None if api_key is None else api_key.encode()
        self._engine: Engine | None = None
        self._tokenizer: Any = None
        self._closing = False
        #: Why the engine did not come, where it did not.
        self.error: BaseException | None = None
        self.counts: dict[tuple[str, int], int] = {}
        # One thread: a tokenizer cannot be called by two at once. The engine has its own.
        self._tokenizing = ThreadPoolExecutor(1, "knnext-tokenize")

    # Beginning and end

    def load(self, make: Callable[[], Engine], ready: Callable[[], None]) -> None:
        """Make the engine in a thread of its own, and say so; ends the serving where it fails."""

        def work() -> None:
            try:
                self.open(make())
                ready()
            except BaseException as error:
                self.error = error
                self.stop()

        threading.Thread(target=work, name="knnext-load", daemon=True).start()

    def open(self, engine: Engine) -> None:
        """Serve with this engine from now on."""
        self._tokenizer = copy.deepcopy(engine.tokenizer)
        self._engine = engine

    def begin(self) -> None:
        self._closing = True
        if self._engine is not None:
            self._engine.close()

    @property
    def done(self) -> bool:
        return self._engine is None or self._engine.idle

    def cut(self) -> None:
        if self._engine is not None:
            self._engine.cancel()

    def ended(self, seconds: float) -> bool:
        """Whether nothing of it is under way any more, within so many seconds."""
        end = time.monotonic() + seconds
        while not (self._engine is not None and self._engine.idle):
            if time.monotonic() > end:
                return False
            time.sleep(0.02)
        try:  # the thread that reads texts as tokens would be waited for, too
            self._tokenizing.submit(int).result(max(0.0, end - time.monotonic()))
        except FutureTimeout:
            return False
        return True

    # Routes

    def app(self) -> Starlette:
        """The ASGI application."""
        post, get = self._post, self._get
        routes = [
            Route("/v1/completions", post(asking.completion), methods=["POST"]),
            Route("/v1/chat/completions", post(asking.chat), methods=["POST"]),
            Route("/v1/models", get(self._models), methods=["GET"]),
            Route("/v1/models/{name:path}", get(self._model), methods=["GET"]),
            Route("/metrics", get(self._metrics), methods=["GET"]),
            Route("/health", self._health, methods=["GET"]),
        ]
        handlers: dict[Any, Any] = {HTTPException: self._http_error}
        return Starlette(routes=routes, exception_handlers=handlers)

    async def _health(self, request: Request) -> Response:
        """Asked by machines that watch, without a key."""
        state = "ready"
        if self._engine is None or self._closing:
            state = "closing" if self._closing else "loading"
        status = 200 if state == "ready" else 503
        return JSONResponse({"status": state}, status, headers=_HEADERS)

    def _models(self, request: Request) -> Response:
        return self._json({"object": "list", "data": [self._described()]})

    def _model(self, request: Request) -> Response:
        self._check_name(request.path_params["name"])
        return self._json(self._described())

    def _described(self) -> dict[str, Any]:
        return {"id": self.name, "object": "model", "created": self._created, "owned_by": "knnext"}

    def _metrics(self, request: Request) -> Response:
        return PlainTextResponse(metrics(self._engine, self.counts), headers=_HEADERS)

    def _post(self, parse: _Parse) -> Callable[[Request], Awaitable[Response]]:
        async def respond(request: Request) -> Response:
            try:
                self._check(request)
                response = await self._answer(request, parse)
            except Exception as error:
                response = self._refusal(error)
            return self._counted(request, response)

        return respond

    def _get(
        self, answer: Callable[[Request], Response]
    ) -> Callable[[Request], Awaitable[Response]]:
        async def respond(request: Request) -> Response:
            try:
                self._check(request)
                response = answer(request)
            except Exception as error:
                response = self._refusal(error)
            return self._counted(request, response)

        return respond

    def _check(self, request: Request) -> None:
        """Refused: who may not ask."""
        if self._key is None:
            self._guard.check_origin(request)
            return
        kind, _, key = request.headers.get("authorization", "").partition(" ")
        if kind.lower() != "bearer" or not same(key.strip(), self._key):
            raise Refused(
                401,
                "the API key is missing or wrong",
                code="invalid_api_key",
                headers={"WWW-Authenticate": "Bearer"},
            )

    def _check_name(self, name: Any) -> None:
        if name is not None and name != self.name:
            words = f"the model {name!r:.200} is not served here, but {self.name!r}"
            raise Refused(404, words, param="model", code="model_not_found")

    # Answers

    async def _answer(self, request: Request, parse: _Parse) -> Response:
        if self._engine is None:
            raise unready("the model is being loaded")
        body = await body_of(request, MAX_BODY)
        self._check_name(body.get("model"))
        engine, loop = self._engine, asyncio.get_running_loop()
        work = functools.partial(parse, body, self._tokenizer, engine.limits)
        asked = await loop.run_in_executor(self._tokenizing, work)
        told: asyncio.Queue[Piece | Exception] = asyncio.Queue()

        def tell(what: Piece | Exception) -> None:
            with contextlib.suppress(RuntimeError):  # the loop has ended, and nobody listens
                loop.call_soon_threadsafe(told.put_nowait, what)

        job = engine.submit(asked, tell)
        answers, pieces = Answers(asked, self.name), _pieces(request, job, told)
        if not asked.stream:
            return self._json(answers.whole([piece async for piece in pieces]))
        headers = {**_HEADERS, "X-Accel-Buffering": "no"}
        events = self._events(answers, pieces)
        return StreamingResponse(events, media_type="text/event-stream", headers=headers)

    async def _events(
        self, answers: Answers, pieces: AsyncGenerator[Piece, None]
    ) -> AsyncIterator[str]:
        num_new = [0] * answers.asked.num_texts
        try:
            for first in answers.first():
                yield first
            async for piece in pieces:
                num_new[piece.number] = piece.num_new
                yield answers.next(piece)
            for last in answers.last(num_new):
                yield last
        except Gone:
            return
        except Exception as error:  # the answer has begun: its last event says what is wrong
            yield failed(_told(error))
        finally:
            await pieces.aclose()

    def _json(self, found: dict[str, Any]) -> Response:
        return JSONResponse(found, headers=_HEADERS)

    def _refusal(self, error: Exception) -> Response:
        if isinstance(error, Gone):
            return Response(status_code=499)  # which nobody reads
        told = _told(error)
        return JSONResponse(told.plain, told.status, headers={**_HEADERS, **told.headers})

    async def _http_error(self, request: Request, error: Exception) -> Response:
        """Paths and methods that there are not."""
        assert isinstance(error, HTTPException)
        words = f"{request.method} {request.url.path[:200]}: {error.detail}"
        return self._counted(request, self._refusal(Refused(error.status_code, words)))

    def _counted(self, request: Request, response: Response) -> Response:
        known = {"/v1/completions", "/v1/chat/completions", "/v1/models", "/metrics"}
        path = request.url.path if request.url.path in known else "other"
        key = (path, response.status_code)
        self.counts[key] = self.counts.get(key, 0) + 1
        return response


def _told(error: Exception) -> Refused:
    """What is told of an error: what it says itself, or that it is a fault of ours."""
    if isinstance(error, Refused):
        return error
    _log.error("%s", type(error).__name__, exc_info=error)
    return Refused(500, f"{type(error).__name__}: {' '.join(str(error).split()):.300}")


async def _pieces(
    request: Request, job: Job, told: asyncio.Queue[Piece | Exception]
) -> AsyncGenerator[Piece, None]:
    """What the engine tells, until all texts are over. Gone where nobody listens any more.

    However it ends, the job is given up with it.
    """

    def leave(_: Any) -> None:
        job.cancelled = True
        told.put_nowait(Gone())

    gone = asyncio.ensure_future(disconnected(request))
    gone.add_done_callback(leave)
    left = len(job.texts)
    end = time.monotonic() + job.seconds + _GRACE
    try:
        while left:
            try:
                piece = await asyncio.wait_for(told.get(), max(0.0, end - time.monotonic()))
            except asyncio.TimeoutError:
                raise late(job.seconds) from None
            if isinstance(piece, Exception):
                raise piece
            left -= piece.finish is not None
            yield piece
    finally:
        job.cancelled = True
        gone.cancel()
