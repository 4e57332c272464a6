"""What is asked over HTTP, and what is answered; the beginning, the end, and what goes wrong."""

from __future__ import annotations

import json
import threading
import time
from typing import Any

import pytest

pytest.importorskip("starlette", reason="the extra serve is not installed")
pytest.importorskip("uvicorn", reason="the extra serve is not installed")

from knnext.serve import app as app_module
from knnext.serve.app import Service
from tests.explore.asgi import hang_up, send
from tests.explore.small import CONTEXT
from tests.serve.asking import PATIENCE, ask
from tests.serve.posting import JSON, NAME, events, post, service_of

# What is answered


def test_a_completion(app: Any, engine: Any) -> None:
    found = post(app, model=NAME, prompt="the quick", max_tokens=5, temperature=0).json
    assert found["object"] == "text_completion" and found["model"] == NAME
    assert found["id"].startswith("cmpl-") and found["created"] > 1_700_000_000
    (choice,) = found["choices"]
    (text,) = ask(engine, prompt="the quick", max_tokens=5).texts()
    assert choice == {"index": 0, "text": text, "logprobs": None, "finish_reason": "length"}
    asking = ask(engine, prompt="the quick", max_tokens=0)
    given = len(asking.job.texts[0].prompt.ids)
    usage = {"prompt_tokens": given, "completion_tokens": 5, "total_tokens": given + 5}
    assert found["usage"] == usage


def test_several_prompts_and_choices(app: Any) -> None:
    """Choice p * n + i is the i-th of prompt p, as it would be alone."""
    body = {"max_tokens": 4, "temperature": 1, "seed": 4, "n": 2}
    found = post(app, prompt=["the quick", "fox"], **body).json
    assert [choice["index"] for choice in found["choices"]] == [0, 1, 2, 3]
    for place, prompt in enumerate(["the quick", "fox"]):
        alone = post(app, prompt=prompt, **body).json["choices"]
        got = found["choices"][2 * place : 2 * place + 2]
        assert [c["text"] for c in got] == [c["text"] for c in alone]
    assert found["usage"]["completion_tokens"] == 16


def test_a_prompt_of_ids_is_read_as_it_is(app: Any, opened: Any) -> None:
    ids = opened.tokenizer("the quick", add_special_tokens=False)["input_ids"]
    body = {"max_tokens": 3, "temperature": 0, "echo": True, "logprobs": 1}
    bare = post(app, prompt=ids, **body).json["choices"][0]
    led = post(app, prompt=[[opened.tokenizer.bos_token_id, *ids]], **body).json["choices"][0]
    text = post(app, prompt="the quick", **body).json["choices"][0]
    assert led == text and bare["logprobs"]["token_ids"][: len(ids)] == ids
    assert led["logprobs"]["token_ids"][: len(ids) + 1] == [opened.tokenizer.bos_token_id, *ids]


def test_log_probs_have_the_shape_that_harnesses_read(app: Any) -> None:
    body = {"prompt": ["the quick brown", "a"], "max_tokens": 1, "logprobs": 1, "echo": True}
    for choice in post(app, temperature=0, **body).json["choices"]:
        found = choice["logprobs"]
        names = ("tokens", "token_logprobs", "top_logprobs", "text_offset", "token_ids")
        assert len({len(found[name]) for name in (*names, "knn_shares")}) == 1
        assert found["token_logprobs"][0] is None is found["top_logprobs"][0]
        for token, log_p, top, share in zip(
            found["tokens"][1:], found["token_logprobs"][1:], found["top_logprobs"][1:],
            found["knn_shares"][1:], strict=True,
        ):  # fmt: skip
            assert top[token] == log_p <= max(top.values()) <= 0 and 0 <= share <= 1
        last = found["top_logprobs"][-1]
        assert max(last, key=lambda name: last[name]) == found["tokens"][-1]  # which is greedy


def test_log_zero_is_a_number(app: Any) -> None:
    body = {"prompt": "the quick", "max_tokens": 1, "logprobs": 20, "temperature": 0}
    found = post(app, knn={"lmbda": 1, "k": 1}, **body).json["choices"][0]["logprobs"]
    assert min(found["top_logprobs"][0].values()) == -9999.0
    assert found["knn_shares"] == [1.0]


@pytest.mark.parametrize("echo", [False, True])
@pytest.mark.parametrize("n", [1, 3])
def test_a_stream_is_the_answer_in_parts(app: Any, n: int, echo: bool) -> None:
    body = {
        "prompt": ["a lazy 🦊", "漢字"], "max_tokens": 7, "seed": 1, "n": n, "logprobs": 2,
        "echo": echo,
    }  # fmt: skip
    whole = post(app, **body).json
    usage: dict[str, Any] = {"stream_options": {"include_usage": True}}
    parts = events(post(app, stream=True, **usage, **body))
    assert len({part["id"] for part in parts}) == 1
    assert parts[-1]["choices"] == [] and parts[-1]["usage"] == whole["usage"]
    for choice in whole["choices"]:
        mine = [p["choices"][0] for p in parts[:-1] if p["choices"][0]["index"] == choice["index"]]
        assert "".join(part["text"] for part in mine) == choice["text"]
        assert [part["finish_reason"] for part in mine[:-1]] == [None] * (len(mine) - 1)
        assert mine[-1]["finish_reason"] == choice["finish_reason"]
        for name, values in choice["logprobs"].items():
            joined = [v for part in mine for v in (part["logprobs"] or {}).get(name, [])]
            assert len(joined) == len(values)
            if name in ("tokens", "token_ids", "text_offset"):
                assert joined == values
    assert all("usage" not in part for part in events(post(app, stream=True, **body)))


def test_a_chat(chatting: Any, opened: Any) -> None:
    messages = [{"role": "user", "content": "the quick"}]
    parts = [
        {"role": "user", "content": [{"type": "text", "text": part} for part in ("the", " quick")]}
    ]
    body = {"messages": messages, "max_tokens": 5, "temperature": 0, "logprobs": True}
    found = post(chatting, "chat/completions", top_logprobs=2, **body).json
    assert found["object"] == "chat.completion"
    (choice,) = found["choices"]
    assert choice["message"]["role"] == "assistant"
    ids = opened.tokenizer("user: the quick fox", add_special_tokens=False)["input_ids"]
    plain = post(chatting, prompt=ids, max_tokens=5, temperature=0, logprobs=2).json["choices"][0]
    assert choice["message"]["content"] == plain["text"]
    content = choice["logprobs"]["content"]
    assert [one["token_id"] for one in content] == plain["logprobs"]["token_ids"]
    assert [one["knn_share"] for one in content] == plain["logprobs"]["knn_shares"]
    assert all(len(one["top_logprobs"]) == 2 for one in content)
    assert content[0]["bytes"] == list(content[0]["token"].encode())
    again = post(chatting, "chat/completions", **{**body, "messages": parts}).json
    assert again["choices"][0]["message"] == choice["message"]
    streamed = events(post(chatting, "chat/completions", stream=True, **body))
    deltas = [part["choices"][0]["delta"] for part in streamed]
    assert deltas[0]["role"] == "assistant" and streamed[0]["object"] == "chat.completion.chunk"
    assert "".join(delta.get("content", "") for delta in deltas) == choice["message"]["content"]
    assert streamed[-1]["choices"][0]["finish_reason"] == choice["finish_reason"]


def test_a_chat_ends_where_the_context_does(chatting: Any) -> None:
    messages = [{"role": "user", "content": "the"}]
    found = post(chatting, "chat/completions", messages=messages, seed=1).json
    assert found["usage"]["total_tokens"] <= CONTEXT


def test_models(app: Any) -> None:
    found = send(app, "GET", "/v1/models").json
    assert found["object"] == "list" and [one["id"] for one in found["data"]] == [NAME]
    assert send(app, "GET", f"/v1/models/{NAME}").json == found["data"][0]
    missing = send(app, "GET", "/v1/models/other")
    assert missing.status == 404 and missing.json["error"]["code"] == "model_not_found"


def test_metrics_are_counted(app: Any, engine: Any) -> None:
    post(app, prompt="a", max_tokens=2)
    post(app, prompt=7)
    end = time.monotonic() + PATIENCE
    while not engine.idle and time.monotonic() < end:  # it answers before it has cleared away
        time.sleep(0.01)
    text = send(app, "GET", "/metrics").body.decode()
    values = dict(line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))
    assert int(values['knnext_http_answers_total{path="/v1/completions",status="400"}']) >= 1
    assert int(values["knnext_new_tokens_total"]) >= 2 and values["knnext_texts_live"] == "0"


# Beginning, end, and what goes wrong


def test_health(make_engine: Any) -> None:
    service = Service(NAME)
    app = service.app()
    assert send(app, "GET", "/health").status == 503
    assert send(app, "GET", "/health").json == {"status": "loading"}
    answer = post(app, prompt="a")
    assert answer.status == 503 and answer.headers["retry-after"]
    assert "being loaded" in answer.json["error"]["message"]
    assert send(app, "GET", "/v1/models").status == 200
    service.open(make_engine())
    assert send(app, "GET", "/health").json == {"status": "ready"}
    service.begin()
    assert send(app, "GET", "/health").json == {"status": "closing"}
    assert send(app, "GET", "/health").status == post(app, prompt="a").status == 503


def test_a_load_that_fails_ends_the_serving() -> None:
    service, ended = Service(NAME), []
    over = threading.Event()
    service.stopping = over.set

    def fail() -> Any:
        raise ValueError("no such model")

    service.load(fail, lambda: ended.append("ready"))
    assert over.wait(60) and str(service.error) == "no such model" and not ended


def test_a_full_queue_is_told(engine: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from knnext.serve.errors import busy

    def full(*given: Any) -> Any:
        raise busy("5 texts are waiting already", 7)

    monkeypatch.setattr(engine, "submit", full)
    answer = post(service_of(engine).app(), prompt="a", stream=True)
    assert answer.status == 429 and answer.headers["retry-after"] == "7"
    assert answer.json["error"]["type"] == "rate_limit_error"


@pytest.mark.parametrize("stream", [False, True])
def test_a_fault_of_ours(make_engine: Any, monkeypatch: pytest.MonkeyPatch, stream: bool) -> None:
    """In the midst of a stream it is the last event, without an end that would look well."""
    engine = make_engine()
    search, count = engine.mixer.search, []

    def failing(*given: Any) -> Any:
        count.append(1)
        if len(count) == 3:
            raise RuntimeError("the disk is gone")
        return search(*given)

    monkeypatch.setattr(engine.mixer, "search", failing)
    app = service_of(engine).app()
    answer = post(app, prompt="the quick", max_tokens=8, temperature=0, stream=stream)
    if stream:
        lines = answer.body.decode().split("\n\n")[:-1]
        last = json.loads(lines[-1].removeprefix("data: "))
        assert answer.status == 200 and len(lines) >= 2 and "[DONE]" not in answer.body.decode()
    else:
        last = answer.json
        assert answer.status == 500
    assert (
        last["error"]["type"] == "server_error" and "the disk is gone" in last["error"]["message"]
    )
    assert post(app, prompt="the quick", max_tokens=2).status == 200


@pytest.mark.parametrize("stream", [False, True])
def test_who_hangs_up_is_not_written_for(make_engine: Any, stream: bool) -> None:
    engine = make_engine()
    jobs: list[Any] = []
    submit = engine.submit
    engine.submit = lambda *given: jobs.append(submit(*given)) or jobs[-1]
    search = engine.mixer.search
    gate, entered = threading.Event(), threading.Event()

    def held(*given: Any) -> Any:
        entered.set()
        assert gate.wait(300)
        return search(*given)

    engine.mixer.search = held
    app = service_of(engine).app()
    raw = json.dumps({"prompt": "the", "max_tokens": 20, "stream": stream}).encode()
    hang_up(app, "/v1/completions", JSON, raw, entered)
    assert jobs[0].cancelled
    gate.set()
    assert len(jobs[0].texts[0].ids) < 20


def test_time_is_up_though_the_engine_is_stuck(
    make_engine: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a search that looks at no limit."""
    monkeypatch.setattr(app_module, "_GRACE", 0.01)
    engine, gate = make_engine(seconds=0.01), threading.Event()
    monkeypatch.setattr(engine.mixer, "search", lambda *given: gate.wait(300))
    answer = post(service_of(engine).app(), prompt="a")
    gate.set()
    assert answer.status == 504 and answer.headers["x-should-retry"] == "false"
