"""What is refused over HTTP, and who is not let in."""

from __future__ import annotations

import json
import re
import threading
from typing import Any

import pytest

pytest.importorskip("starlette", reason="the extra serve is not installed")
pytest.importorskip("uvicorn", reason="the extra serve is not installed")

from knnext.serve.app import MAX_BODY
from tests.explore.asgi import HOST, send
from tests.explore.small import CONTEXT, K
from tests.serve.posting import JSON, KEY, NAME, events, post, service_of

# What is refused


@pytest.mark.parametrize(
    ("body", "param", "words"),
    [
        ({}, "prompt", "prompt must be"),
        ({"prompt": []}, "prompt", "prompt must be"),
        ({"prompt": [[]]}, "prompt", "prompt must be"),
        ({"prompt": [1, "a"]}, "prompt", "prompt must be"),
        ({"prompt": [True]}, "prompt", "prompt must be"),
        ({"prompt": [300]}, "prompt", r"\[0, 300\), got 300"),
        ({"prompt": [[1], [-1]]}, "prompt", "got -1"),
        ({"prompt": "\ud800"}, "prompt", "surrogate"),
        ({"prompt": [5] * 33, "max_tokens": 0}, "prompt", "the prompt has 33"),
        ({"prompt": [5] * 30, "max_tokens": 3}, "prompt", "30 in the prompt and 3 .* are 33"),
        ({"prompt": [5] * 32}, "prompt", "no room is left"),
        ({"prompt": ["a", [5] * 32]}, "prompt", "no room is left"),
        ({"prompt": ["a"] * 300}, "prompt", "at most 256"),
        ({"prompt": ["a"] * 200, "n": 2}, "n", "asks for 400"),
        ({"prompt": "a", "max_tokens": -1}, "max_tokens", "0 to 4096"),
        ({"prompt": "a", "max_tokens": 1.5}, "max_tokens", "whole number"),
        ({"prompt": "a", "max_tokens": True}, "max_tokens", "whole number"),
        ({"prompt": "a", "temperature": 2.1}, "temperature", "0 to 2"),
        ({"prompt": "a", "temperature": "1"}, "temperature", "a number"),
        ({"prompt": "a", "top_p": -0.1}, "top_p", "0 to 1"),
        ({"prompt": "a", "top_p": 10**400}, "top_p", "0 to 1"),
        ({"prompt": "a", "temperature": -(10**400)}, "temperature", "0 to 2"),
        ({"prompt": "a", "temperature": float("nan")}, "temperature", "0 to 2"),
        ({"prompt": "a", "temperature": float("inf")}, "temperature", "0 to 2"),
        ({"prompt": "a", "n": 0}, "n", "1 to 256"),
        ({"prompt": "a", "seed": 2**64}, "seed", "whole number"),
        ({"prompt": "a", "stop": ""}, "stop", "1 to 1000"),
        ({"prompt": "a", "stop": ["x"] * 17}, "stop", "at most 16"),
        ({"prompt": "a", "stop": [3]}, "stop", "1 to 1000"),
        ({"prompt": "a", "stream": 1}, "stream", "true or false"),
        ({"prompt": "a", "stream_options": {"include_usage": True}}, "stream_options", "stream: t"),
        ({"prompt": "a", "stream": True, "stream_options": {"x": 1}}, "stream_options", "must be"),
        ({"prompt": "a", "logprobs": 21}, "logprobs", "0 to 20"),
        ({"prompt": "a", "logprobs": True}, "logprobs", "whole number"),
        ({"prompt": "a", "echo": "yes"}, "echo", "true or false"),
        ({"prompt": "a", "best_of": 3}, "best_of", "equals n"),
        ({"prompt": "a", "presence_penalty": 0.5}, "presence_penalty", "not served"),
        ({"prompt": "a", "frequency_penalty": -1}, "frequency_penalty", "not served"),
        ({"prompt": "a", "logit_bias": {"3": 5}}, "logit_bias", "not served"),
        ({"prompt": "a", "suffix": "end"}, "suffix", "not served"),
        ({"prompt": "a", "tempreature": 1}, "tempreature", "unrecognized"),
        ({"prompt": "a", "half \ud800": 1}, "half \\ud800", "unrecognized"),
        ({"prompt": "a", "stream": True, "stream_options": {"include_obfuscation": True}},
         "stream_options", "include_obfuscation is not served"),
        ({"prompt": "a", "knn": 3}, "knn", "knn must be"),
        ({"prompt": "a", "knn": {"alpha": 1}}, "knn", "knn must be"),
        ({"prompt": "a", "knn": {"lmbda": 2}}, "knn.lmbda", "0 to 1"),
        ({"prompt": "a", "knn": {"temperature": 0}}, "knn.temperature", "from 1e-09"),
        ({"prompt": "a", "knn": {"k": K + 1}}, "knn.k", f"1 to {K}"),
        ({"prompt": "a", "knn": {"lmbda": 10**400}}, "knn.lmbda", "0 to 1"),
        ({"prompt": "a", "knn": {"temperature": 10**400}}, "knn.temperature", "from 1e-09"),
    ],
)  # fmt: skip
def test_what_makes_no_sense_is_named(
    app: Any, body: dict[str, Any], param: str | None, words: str
) -> None:
    answer = post(app, **body)
    error = answer.json["error"]
    assert answer.status == 400 and error["type"] == "invalid_request_error"
    assert error["param"] == param
    assert re.search(words, error["message"])


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ({}, "messages must be"),
        ({"messages": []}, "messages must be"),
        ({"messages": ["hello"]}, "a role and a content"),
        ({"messages": [{"role": "user"}]}, "must be a text"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "of type text"),
        ({"messages": [{"role": "user", "content": [{"type": "audio", "text": "a"}]}]}, "of type"),
        ({"messages": [{"role": "\ud800", "content": "a"}]}, "surrogate"),
        ({"messages": [{"role": "user", "content": "a", "name": "\ud800"}]}, "surrogate"),
        ({"messages": [{"role": "user", "content": "a", "name": 3}]}, "name of a message must be"),
        ({"messages": [{"role": "user", "content": "a"}], "max_tokens": "x",
          "max_completion_tokens": 3}, "max_tokens must be a whole number"),
        ({"messages": [{"role": "user", "content": "a"}], "max_tokens": 4,
          "max_completion_tokens": 3}, "leave one out"),
        ({"messages": [{"role": "user", "content": "a", "tool_calls": [1]}]}, "tool_calls"),
        ({"messages": [{"role": "odd", "content": "a"}]}, "roles must be even"),
        ({"messages": [{"role": "user", "content": "a"}], "tools": [{}]}, "tools is not served"),
        ({"messages": [{"role": "user", "content": "a"}], "top_logprobs": 1}, "logprobs: true"),
        ({"messages": [{"role": "user", "content": "a"}], "prompt": "a"}, "unrecognized"),
        ({"messages": [{"role": "user", "content": "the " * 40}]}, "at most 32"),
        ({"messages": [{"role": "user", "content": "a"}], "max_tokens": 32}, "at most 32"),
    ],
)  # fmt: skip
def test_chats_that_make_no_sense(chatting: Any, body: dict[str, Any], words: str) -> None:
    answer = post(chatting, "chat/completions", **body)
    error = answer.json["error"]
    assert answer.status == 400 and words in error["message"]
    if "at most 32" in words:
        assert error["param"] == "messages"


def test_messages_as_clients_send_them_back(chatting: Any) -> None:
    """With fields that hold nothing, as a client has them of an answer."""
    empty = {"refusal": None, "tool_calls": [], "function_call": None, "annotations": []}
    messages = [{"role": "assistant", "content": "the", "name": "me", **empty}]
    assert post(chatting, "chat/completions", messages=messages, max_tokens=1).status == 200


def test_without_a_template_there_is_no_chat(app: Any) -> None:
    answer = post(app, "chat/completions", messages=[{"role": "user", "content": "a"}])
    assert answer.status == 400 and "no chat template" in answer.json["error"]["message"]
    assert answer.json["error"]["code"] == "no_chat_template"


def test_neutral_fields_are_taken(app: Any) -> None:
    """Clients send fields that ask for nothing."""
    body = {"presence_penalty": 0.0, "frequency_penalty": 0, "logit_bias": {}, "best_of": 1,
            "user": "me", "suffix": None, "stop": None, "n": 1, "logprobs": None}  # fmt: skip
    assert post(app, prompt="a", max_tokens=1, **body).status == 200


@pytest.mark.parametrize(
    "extra",
    [{"knn": {"k": None}}, {"knn": {"lmbda": None, "temperature": None}}, {"knn": None},
     {"prompt_cache_key": "x", "function_call": "none"}, {"temperature": -0.0}],
)  # fmt: skip
def test_null_within_a_field_is_as_good_as_left_out(app: Any, extra: dict[str, Any]) -> None:
    body = {"prompt": "the", "max_tokens": 4, "temperature": 0}
    wanted = post(app, **body).json["choices"]
    assert post(app, **{**body, **extra}).json["choices"] == wanted
    options = {"include_usage": None, "include_obfuscation": False}
    parts = events(post(app, stream=True, stream_options=options, **{**body, **extra}))
    assert all("usage" not in part for part in parts)


def test_of_several_prompts_each_has_its_own_room(app: Any) -> None:
    """How many tokens fit by default does not depend on the other prompts of a request."""
    prompts: list[Any] = ["the", [5] * (CONTEXT - 3), [5] * 8]
    found = post(app, prompt=prompts, seed=1).json
    alone = [post(app, prompt=prompt, seed=1).json for prompt in prompts]
    assert [c["text"] for c in found["choices"]] == [a["choices"][0]["text"] for a in alone]
    written = [a["usage"]["completion_tokens"] for a in alone]
    assert written[1] == 3 and max(written) <= 16
    assert found["usage"]["completion_tokens"] == sum(written)


def test_another_model(app: Any) -> None:
    answer = post(app, prompt="a", model="gpt-4")
    assert answer.status == 404 and answer.json["error"]["code"] == "model_not_found"


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [("GET", "/v1/completions", 405), ("POST", "/v1/models", 405), ("GET", "/v2", 404),
     ("POST", "/v1/embeddings", 404)],
)  # fmt: skip
def test_other_ways_and_places(app: Any, method: str, path: str, status: int) -> None:
    answer = send(app, method, path, headers=JSON)
    assert answer.status == status
    assert answer.json["error"]["type"] == "invalid_request_error"


@pytest.mark.parametrize(
    ("raw", "kind", "status"),
    [(b"{", "application/json", 400), (b"[1]", "application/json", 400),
     (b"{}", "text/plain", 415), (b"[" * 100_000, "application/json", 400)],
)  # fmt: skip
def test_bodies_of_another_kind(app: Any, raw: bytes, kind: str, status: int) -> None:
    answer = send(app, "POST", "/v1/completions", headers={"content-type": kind}, body=raw)
    assert answer.status == status and answer.json["error"]["message"]


@pytest.mark.parametrize("head", [{}, {"content-length": str(MAX_BODY + 1)}])
def test_a_large_body_is_read_to_its_end_and_refused(app: Any, head: dict[str, str]) -> None:
    """Who still sends when the connection is closed is told of a broken one, and not why."""
    parts = [b" " * (1 << 20)] * 9
    given = {"headers": {**JSON, **head}, "body": parts}
    answer = send(app, "POST", "/v1/completions", **given)
    assert answer.status == 413 and answer.parts_left == 0
    expects = {**given["headers"], "content-length": str(9 << 20), "expect": "100-continue"}
    answer = send(app, "POST", "/v1/completions", headers=expects, body=parts)
    assert answer.status == 413 and answer.parts_left == 9  # which is told before it sends
    endless = send(app, "POST", "/v1/completions", headers=given["headers"], body=parts[:1] * 70)
    assert endless.status == 413 and endless.parts_left > 0


def test_a_text_that_cannot_fit_is_not_read_as_tokens(
    make_engine: Any, monkeypatch: pytest.MonkeyPatch, chatting: Any
) -> None:
    """Megabytes of it would hold up everybody's."""
    service = service_of(make_engine())

    def read(*args: Any, **options: Any) -> Any:
        raise AssertionError("read as tokens")

    assert service._engine is not None
    most = service._engine.limits.characters
    assert most is not None and most >= 2 * CONTEXT
    answer = post(service.app(), prompt="a" * most, max_tokens=1)
    assert "and the prompt has" in answer.json["error"]["message"]
    monkeypatch.setattr(service, "_tokenizer", read)
    for prompt in ("a" * (most + 1), ["a" * (most + 1)]):
        error = post(service.app(), prompt=prompt, max_tokens=1).json["error"]
        assert error["code"] == "context_length_exceeded" and error["param"] == "prompt"
        assert f"{most} characters" in error["message"]
    messages = [{"role": "user", "content": "a" * most}]
    error = post(chatting, "chat/completions", messages=messages).json["error"]
    assert error["param"] == "messages" and "characters" in error["message"]


def test_the_end_does_not_wait_for_a_text_that_is_read_as_tokens(make_engine: Any) -> None:
    service, gate = service_of(make_engine()), threading.Event()
    service.begin()
    assert service.ended(600)
    service._tokenizing.submit(gate.wait, 600)
    assert not service.ended(0.05)
    gate.set()
    assert service.ended(600)


# Who is let in


@pytest.mark.parametrize(
    ("given", "status"),
    [(None, 401), ("Bearer wrong", 401), (f"Basic {KEY}", 401), (f"Bearer {KEY}x", 401),
     (KEY, 401), ("Bearer é", 401), (f"Bearer {KEY}", 200), (f"bearer  {KEY}", 200)],
)  # fmt: skip
def test_keys(engine: Any, given: str | None, status: int) -> None:
    app = service_of(engine, api_key=KEY).app()
    headers = {} if given is None else {"authorization": given}
    for method, path in (("GET", "/v1/models"), ("GET", f"/v1/models/{NAME}"), ("GET", "/metrics")):
        assert send(app, method, path, headers=headers).status == status
    for path in ("completions", "chat/completions"):
        answer = post(app, path, {**JSON, **headers}, prompt="a", max_tokens=1)
        assert answer.status == (status if path == "completions" or status == 401 else 400)
        if status == 401:
            assert answer.json["error"]["code"] == "invalid_api_key"
    assert send(app, "GET", "/health").status == 200


@pytest.mark.parametrize("host", ["evil.example", "evil.example:8000", "127.0.0.1.evil.example"])
def test_other_hosts_and_sites_are_refused_without_a_key(engine: Any, host: str) -> None:
    """A web site whose name leads to this machine, and one that sends requests here."""
    app, headers = service_of(engine).app(), {**JSON, "origin": f"https://{host}"}
    raw = json.dumps({"prompt": "a", "max_tokens": 1}).encode()
    assert send(app, "POST", "/v1/completions", headers=JSON, body=raw, host=host).status == 400
    assert send(app, "POST", "/v1/completions", headers=headers, body=raw).status == 403
    for origin in ("null", "http://[", "[::1"):
        strange = {**JSON, "origin": origin}
        assert send(app, "POST", "/v1/completions", headers=strange, body=raw).status == 403
    same = {**JSON, "origin": f"http://{HOST}"}
    assert send(app, "POST", "/v1/completions", headers=same, body=raw).status == 200
    keyed = service_of(engine, api_key=KEY).app()
    headers["authorization"] = f"Bearer {KEY}"
    assert (
        send(keyed, "POST", "/v1/completions", headers=headers, body=raw, host=host).status == 200
    )
