"""Who is let in, how much is taken, and what is answered."""

from __future__ import annotations

import asyncio
import json
import threading
from typing import Any

import pytest

pytest.importorskip("starlette", reason="the extra explore is not installed")

from knnext.explore.server import Service
from knnext.explore.session import Limit, TooLong
from knnext.explore.worker import Busy, Worker
from knnext.serve import guard as guard_module
from knnext.serve.guard import MAX_BODY, Guard
from tests.explore.asgi import HOST, Answer, hang_up, send
from tests.explore.small import TEXT, K

TOKEN = "secret-of-this-run"
JSON = {"content-type": "application/json", "x-knnext-token": TOKEN}


@pytest.fixture(scope="module")
def app(session: Any) -> Any:
    return Service(session, Guard("127.0.0.1", TOKEN), {"model": "<m>"}, 60.0).app()


def post(app: Any, what: str, body: Any, **options: Any) -> Answer:
    options.setdefault("headers", JSON)
    raw = body if isinstance(body, bytes | list) else json.dumps(body).encode()
    return send(app, "POST", f"/api/{what}", body=raw, **options)


def write_body(**changes: Any) -> dict[str, Any]:
    given = {"text": "the fox", "tokens": 3, "temperature": 0.1, "lmbda": 0.5, "k": 4, "seed": 0}
    return {**given, **changes}


# Who is let in


@pytest.mark.parametrize("host", [HOST, "localhost:1234", "localhost", "[::1]:8000", "LOCALHOST:9"])
def test_the_page_is_given_to_who_has_the_token(app: Any, host: str) -> None:
    answer = send(app, "GET", f"/?token={TOKEN}", host=host)
    assert answer.status == 200 and b"What do the neighbors say" in answer.body
    assert TOKEN.encode() not in answer.body and b"&lt;m&gt;" in answer.body
    assert "connect-src 'self'" in answer.headers["content-security-policy"]
    assert answer.headers["referrer-policy"] == "no-referrer"
    assert answer.headers["cache-control"] == "no-store"


@pytest.mark.parametrize(
    "path", ["/", "/?token=", "/?token=wrong", f"/?token={TOKEN}x", f"/?token={TOKEN[:-1]}",
             "/?token=%C3%A9%ED%A0%80", f"/?Token={TOKEN}"],
)  # fmt: skip
def test_a_wrong_token_gets_nothing(app: Any, path: str) -> None:
    answer = send(app, "GET", path)
    assert answer.status == 403 and b"neighbors say" not in answer.body


@pytest.mark.parametrize("what", ["read", "write", "nearest", "occurrences", "spans"])
@pytest.mark.parametrize("token", [None, "", "wrong", "\xff"])
def test_no_question_without_the_token(app: Any, what: str, token: str | None) -> None:
    headers = {"content-type": "application/json"} | (
        {} if token is None else {"x-knnext-token": token}
    )
    body = {**write_body(), "count": 3, "rows": [1]}
    assert post(app, what, body, headers=headers).status == 403
    # In the address it is for the page alone: a form of another site could send it along.
    assert post(app, f"{what}?token={TOKEN}", body, headers=headers).status == 403


@pytest.mark.parametrize(
    "host", ["evil.example", "evil.example:8000", "127.0.0.1.evil.example", "", "[::1",
             "localhost.evil.example", "192.168.0.7:8000", "user@evil.example", None],
)  # fmt: skip
def test_a_foreign_host_gets_nothing(app: Any, host: str | None) -> None:
    assert send(app, "GET", f"/?token={TOKEN}", host=host).status == 400
    assert post(app, "read", {"text": TEXT}, host=host).status == 400


def test_two_hosts_get_nothing(app: Any) -> None:
    two = [("host", "evil.example"), *JSON.items()]
    assert post(app, "read", {"text": TEXT}, headers=two).status == 400


@pytest.mark.parametrize(
    ("name", "value", "status"),
    [
        ("origin", f"http://{HOST}", 200),
        ("origin", "http://evil.example", 403),
        ("origin", "null", 403),
        ("origin", "http://127.0.0.1:9", 403),  # another page of this machine
        ("origin", f"http://{HOST}.evil.example", 403),
        ("origin", "", 403),
        ("sec-fetch-site", "same-origin", 200),
        ("sec-fetch-site", "cross-site", 403),
        ("sec-fetch-site", "same-site", 403),
    ],
)
def test_other_sites_are_refused(app: Any, name: str, value: str, status: int) -> None:
    headers = {**JSON, name: value}
    assert post(app, "spans", {"rows": [1]}, headers=headers).status == status


@pytest.mark.parametrize(
    ("bound", "host", "allowed"),
    [
        ("127.0.0.1", "10.0.0.5:80", False),
        ("0.0.0.0", "10.0.0.5:80", True),
        ("0.0.0.0", "evil.example:80", False),
        ("0.0.0.0", "localhost", True),
        ("10.0.0.5", "10.0.0.5:80", True),
        ("gpu.example", "gpu.example:80", True),
        ("::", "[2001:db8::1]:80", True),
    ],
)
def test_names_of_an_open_address(session: Any, bound: str, host: str, allowed: bool) -> None:
    service = Service(session, Guard(bound, TOKEN), {}, 1.0)
    answer = send(service.app(), "GET", f"/?token={TOKEN}", host=host)
    assert answer.status == (200 if allowed else 400)


# How much is taken


def test_a_large_body_is_refused(app: Any) -> None:
    huge = json.dumps({"text": "a" * MAX_BODY}).encode()
    told = {**JSON, "content-length": str(len(huge))}
    assert post(app, "read", huge, headers=told).status == 413
    # Nor where it does not say how long it is, or says it wrong.
    assert post(app, "read", [huge[:1000], huge[1000:]]).status == 413
    assert post(app, "read", huge, headers={**JSON, "content-length": "5"}).status == 413
    assert post(app, "read", huge, headers={**JSON, "content-length": "-1"}).status == 413


def test_a_body_that_does_not_come_is_not_waited_for(
    app: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(guard_module, "_BODY_SECONDS", 0.01)

    async def hang() -> dict[str, Any]:
        await asyncio.sleep(600)
        raise AssertionError

    class Request:
        headers = JSON

        async def stream(self) -> Any:
            yield b"{"
            await hang()

    with pytest.raises(guard_module.Refused, match="in time") as refused:
        asyncio.run(guard_module.body_of(Request()))  # type: ignore[arg-type]
    assert refused.value.status == 408


@pytest.mark.parametrize(
    ("body", "kind", "status"),
    [
        (b"{}", "text/plain", 415),
        (b"{}", "application/x-www-form-urlencoded", 415),
        (b"", "application/json", 400),
        (b"{", "application/json", 400),
        (b"[]", "application/json", 400),
        (b"\xff", "application/json", 400),
        (b"[" * 100_000, "application/json", 400),
    ],
)
def test_bodies_of_another_kind(app: Any, body: bytes, kind: str, status: int) -> None:
    assert post(app, "read", body, headers={**JSON, "content-type": kind}).status == status


@pytest.mark.parametrize(
    ("what", "body", "words"),
    [
        ("read", {}, "text"),
        ("read", {"text": ""}, "text"),
        ("read", {"text": 5}, "text"),
        ("read", {"text": "\ud800"}, "surrogate"),
        ("nearest", {"text": "a"}, "count"),
        ("nearest", {"text": "a", "count": 0}, "count"),
        ("nearest", {"text": "a", "count": True}, "count"),
        ("nearest", {"text": "a", "count": 10**9}, "count"),
        ("occurrences", {"text": "a", "count": 1.5}, "count"),
        ("spans", {"rows": 5}, "rows"),
        ("spans", {"rows": ["1"]}, "rows"),
        ("spans", {"rows": [-1]}, "rows"),
        ("spans", {"rows": [2**80]}, "rows"),
        ("spans", {"rows": [1] * 65}, "rows"),
        ("write", write_body(tokens=0), "tokens"),
        ("write", write_body(tokens=10**6), "tokens"),
        ("write", write_body(temperature=0), "temperature"),
        ("write", write_body(temperature=float("nan")), "temperature"),
        ("write", write_body(lmbda=1.5), "lmbda"),
        ("write", write_body(k=K + 1), "k must"),
        ("write", write_body(seed=-1), "seed"),
        ("write", write_body(lmbda=10**400), "lmbda"),
        ("write", write_body(temperature=-(10**400)), "temperature"),
    ],
)
def test_what_makes_no_sense_is_named(app: Any, what: str, body: Any, words: str) -> None:
    answer = post(app, what, body)
    assert answer.status == 400 and words in answer.json["error"]


@pytest.mark.parametrize(("method", "path"), [("GET", "/api/read"), ("POST", "/"), ("GET", "/x")])
def test_other_ways_and_places(app: Any, method: str, path: str) -> None:
    assert send(app, method, f"{path}?token={TOKEN}", headers=JSON).status in (404, 405)


# What is answered


def test_the_five_questions(app: Any) -> None:
    read = post(app, "read", {"text": TEXT})
    assert read.status == 200 and "".join(read.json["texts"]) == TEXT
    spans = post(app, "spans", {"rows": read.json["rows"][0][:3]}).json
    assert [one["row"] for one in spans] == read.json["rows"][0][:3]
    assert len(post(app, "nearest", {"text": TEXT, "count": 3}).json["neighbors"]) == 3
    assert post(app, "occurrences", {"text": "fox", "count": 3}).json["total"] > 3
    written = post(app, "write", write_body())
    lines = [json.loads(line) for line in written.body.splitlines()]
    assert lines[0] == {"prompt": lines[0]["prompt"], "note": ""}
    assert [line["side"] for line in lines[1:]] == ["mixture", "base"] * 3


def test_a_fault_of_ours_is_told_and_does_not_end_the_server(
    session: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    app = Service(session, Guard("127.0.0.1", TOKEN), {}, 60.0).app()
    monkeypatch.setattr(session, "read", lambda *_: 1 / 0)
    answer = post(app, "read", {"text": "a"})
    assert answer.status == 500 and "ZeroDivisionError" in answer.json["error"]
    assert "ZeroDivisionError" in caplog.text
    assert post(app, "spans", {"rows": [1]}).status == 200


def test_a_fault_in_the_midst_of_writing_is_the_last_line(
    session: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from knnext.explore.session import Writing

    app = Service(session, Guard("127.0.0.1", TOKEN), {}, 60.0).app()
    monkeypatch.setattr(Writing, "step", lambda *_: 1 / 0)
    lines = post(app, "write", write_body()).body.splitlines()
    assert "ZeroDivisionError" in json.loads(lines[-1])["error"]


# One at a time


def test_one_search_at_a_time_and_few_that_wait() -> None:
    worker, running, most = Worker(most_waiting=3), [], []
    begun, free = threading.Event(), threading.Event()

    def work(limit: Limit) -> int:
        running.append(1)
        most.append(len(running))
        begun.set()
        free.wait(600)
        running.pop()
        return len(most)

    async def ask() -> list[Any]:
        first = asyncio.ensure_future(worker.run(work, 600))
        await asyncio.to_thread(begun.wait, 600)
        waiting = [asyncio.ensure_future(worker.run(work, 600)) for _ in range(3)]
        await asyncio.sleep(0)
        with pytest.raises(Busy, match="waiting"):
            await worker.run(work, 600)
        free.set()
        return await asyncio.gather(first, *waiting)

    assert asyncio.run(ask()) == [1, 2, 3, 4]
    assert set(most) == {1}


def test_who_gives_up_frees_the_place() -> None:
    worker, free, done = Worker(), threading.Event(), []

    def hold(limit: Limit) -> None:
        free.wait(600)
        limit.check()

    async def ask() -> None:
        held = asyncio.ensure_future(worker.run(hold, 600))
        given_up = asyncio.ensure_future(worker.run(lambda limit: done.append("x"), 600))
        await asyncio.sleep(0)
        given_up.cancel()
        held.cancel()
        with pytest.raises(asyncio.CancelledError):
            await given_up
        free.set()
        assert await worker.run(lambda limit: 7, 600) == 7

    asyncio.run(ask())
    assert not done  # what nobody waits for is not begun


def test_those_who_wait_no_more_leave_room_for_others() -> None:
    worker, free = Worker(most_waiting=2), threading.Event()

    async def ask() -> None:
        begun = threading.Event()
        held = asyncio.ensure_future(worker.run(lambda limit: begun.set() or free.wait(600), 600))
        await asyncio.to_thread(begun.wait, 600)
        for _ in range(3):  # who stops, and asks again
            waiting = [asyncio.ensure_future(worker.run(lambda limit: 1, 600)) for _ in range(2)]
            await asyncio.sleep(0)
            for one in waiting:
                one.cancel()
            await asyncio.gather(*waiting, return_exceptions=True)
        last = asyncio.ensure_future(worker.run(lambda limit: 7, 600))
        await asyncio.sleep(0)
        free.set()
        assert await held and await last == 7

    asyncio.run(ask())


@pytest.mark.parametrize("what", ["read", "nearest", "occurrences", "write"])
def test_who_closes_the_connection_is_not_worked_for(
    session: Any, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    """As Stop does: a long search is given up, and the next question does not wait for it."""
    limits: list[Limit] = []
    entered, free = threading.Event(), threading.Event()

    def work(*given: Any, **options: Any) -> None:
        entered.set()
        assert free.wait(600)

    monkeypatch.setattr(session, what, work)
    service = Service(session, Guard("127.0.0.1", TOKEN), {}, 600.0)
    run = service.worker.run

    async def watched(work: Any, seconds: float) -> Any:
        return await run(lambda limit: limits.append(limit) or work(limit), seconds)

    monkeypatch.setattr(service.worker, "run", watched)
    hang_up(service.app(), f"/api/{what}", JSON, json.dumps(write_body(count=3)).encode(), entered)
    free.set()
    assert limits[0].cancelled


def test_work_that_looks_at_no_limit_is_answered_all_the_same(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from knnext.explore import worker as module
    from knnext.explore.server import _words

    monkeypatch.setattr(module, "_GRACE", 0.01)
    free = threading.Event()

    async def ask() -> None:
        with pytest.raises(asyncio.TimeoutError) as found:
            await Worker().run(lambda limit: free.wait(600), 0.01)
        free.set()
        assert _words(found.value) == (503, "this took too long, and was given up")

    asyncio.run(ask())


def test_errors_come_back() -> None:
    def late(limit: Limit) -> None:
        limit.cancelled = True
        limit.check()

    async def ask() -> None:
        worker = Worker()
        with pytest.raises(ZeroDivisionError):
            await worker.run(lambda limit: 1 / 0, 600)
        with pytest.raises(TooLong):
            await worker.run(late, 600)
        assert await worker.run(lambda limit: 7, 600) == 7

    asyncio.run(ask())
