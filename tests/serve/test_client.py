"""The command in a process of its own, driven by OpenAI's client: where that is installed."""

from __future__ import annotations

import json
import subprocess
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from tests.serve.asking import PATIENCE, PROMPTS
from tests.serve.serving import KEY, served

openai = pytest.importorskip("openai", reason="the client openai is not installed")
pytest.importorskip("starlette", reason="the extra serve is not installed")
pytest.importorskip("uvicorn", reason="the extra serve is not installed")

pytestmark = pytest.mark.slow
TEMPLATE = "{% for m in messages %}{{ m.content }} {% endfor %}"


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[tuple[subprocess.Popen[str], str]]:
    path = folder / "model" / "tokenizer_config.json"
    before = path.read_text()
    path.write_text(json.dumps({**json.loads(before), "chat_template": TEMPLATE}))
    try:
        with served(folder) as found:
            yield found
    finally:
        path.write_text(before)


@pytest.fixture(scope="module")
def client(server: Any) -> Any:
    with openai.OpenAI(base_url=f"{server[1]}/v1", api_key=KEY, timeout=PATIENCE) as client:
        yield client


def test_the_client_is_answered(client: Any) -> None:
    assert [model.id for model in client.models.list()] == ["small"]
    assert client.models.retrieve("small").owned_by == "knnext"
    done = client.completions.create(
        model="small", prompt=PROMPTS[:2], max_tokens=5, temperature=0, logprobs=2, echo=True
    )
    assert [choice.index for choice in done.choices] == [0, 1]
    for choice, prompt in zip(done.choices, PROMPTS, strict=False):
        assert choice.text.startswith(prompt) and choice.finish_reason == "length"
        assert choice.logprobs.token_logprobs[0] is None
        assert all(0 <= share <= 1 for share in choice.logprobs.knn_shares[1:])
    assert done.usage.completion_tokens == 10
    asked = client.completions.create(
        model="small", prompt=PROMPTS[0], max_tokens=3, extra_body={"knn": {"lmbda": 0}}, logprobs=0
    )
    assert asked.choices[0].logprobs.knn_shares == [0, 0, 0]


def test_the_client_is_streamed_to(client: Any) -> None:
    body = {"model": "small", "prompt": PROMPTS[3], "max_tokens": 8, "temperature": 0, "n": 2}
    whole = client.completions.create(**body)
    usage: dict[str, Any] = {"stream": True, "stream_options": {"include_usage": True}}
    parts = list(client.completions.create(**body, **usage))
    assert parts[-1].usage == whole.usage
    for choice in whole.choices:
        text = "".join(c.text for part in parts for c in part.choices if c.index == choice.index)
        assert text == choice.text


def test_the_client_chats(client: Any) -> None:
    messages = [{"role": "user", "content": PROMPTS[2]}]
    body = {"model": "small", "messages": messages, "max_tokens": 6, "seed": 2}
    done = client.chat.completions.create(**body, logprobs=True, top_logprobs=2)
    assert done.choices[0].message.role == "assistant"
    assert len(done.choices[0].logprobs.content) == done.usage.completion_tokens
    parts = client.chat.completions.create(**body, stream=True)
    deltas = [part.choices[0].delta.content or "" for part in parts]
    assert "".join(deltas) == done.choices[0].message.content


def test_the_client_is_told_what_is_wrong(client: Any, server: Any) -> None:
    with pytest.raises(openai.BadRequestError) as wrong:
        client.completions.create(model="small", prompt="a", max_tokens=1, presence_penalty=1)
    assert wrong.value.param == "presence_penalty"
    with pytest.raises(openai.NotFoundError):
        client.completions.create(model="other", prompt="a")
    other = openai.OpenAI(base_url=f"{server[1]}/v1", api_key="wrong")
    with other, pytest.raises(openai.AuthenticationError):
        other.models.list()


def mixed_bodies(count: int) -> list[dict[str, Any]]:
    """Requests of every kind; none of them twice the same."""
    drawing = [{"temperature": 0}, {"seed": 1}, {"seed": 2, "top_p": 0.8, "n": 2}]
    shapes = [{}, {"logprobs": 2}, {"stream": True}, {"prompt": PROMPTS}]
    extras = [{}, {"echo": True, "logprobs": 0}, {"knn": {"lmbda": 0.9, "k": 3}}]
    found = []
    for number in range(count):
        body: dict[str, Any] = {"prompt": PROMPTS[number % 5], "max_tokens": 1 + number % 7}
        body |= drawing[number % 3] | shapes[number % 4] | extras[number // 12 % 3]
        found.append(body)
    return found


def answer_of(client: Any, body: dict[str, Any]) -> list[tuple[int, str, str | None]]:
    given = {key: value for key, value in body.items() if key != "knn"}
    extra = {"extra_body": {"knn": body["knn"]}} if "knn" in body else {}
    done = client.completions.create(model="small", **given, **extra)
    if not body.get("stream"):
        return [(c.index, c.text, c.finish_reason) for c in done.choices]
    texts: dict[int, str] = {}
    ends: dict[int, str] = {}
    for part in done:
        for choice in part.choices:
            texts[choice.index] = texts.get(choice.index, "") + choice.text
            if choice.finish_reason:
                ends[choice.index] = choice.finish_reason
    return [(index, texts[index], ends[index]) for index in sorted(texts)]


def test_under_load_nothing_is_lost_and_nothing_wrong(client: Any, server: Any) -> None:
    """Many at once get what each got alone; some hang up in between; memory does not grow."""
    process, address = server
    bodies = mixed_bodies(36)
    alone = [answer_of(client, body) for body in bodies]
    before = memory(process.pid)

    def hang_up(number: int) -> None:
        body = {"model": "small", "prompt": "the", "max_tokens": 20, "stream": True, "seed": number}
        stream = client.completions.create(**body)
        next(iter(stream))
        stream.close()

    with ThreadPoolExecutor(24) as pool:
        for _ in range(2):
            leaving = [pool.submit(hang_up, number) for number in range(8)]
            together = list(pool.map(lambda body: answer_of(client, body), bodies))
            assert together == alone
            for one in leaving:
                one.result()
    # What an allocator keeps is far less than what requests would, were they kept.
    assert memory(process.pid) < before + (64 << 20)
    request = urllib.request.Request(
        f"{address}/metrics", headers={"Authorization": f"Bearer {KEY}"}
    )
    text = urllib.request.urlopen(request, timeout=PATIENCE).read().decode()
    values = dict(line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))
    assert values["knnext_texts_waiting"] == "0"
    assert int(values["knnext_searches_total"]) <= int(values["knnext_steps_total"])
    written = int(values["knnext_new_tokens_total"])
    assert int(values["knnext_steps_total"]) < written  # more than one text a step


def memory(pid: int) -> int:
    """Bytes that a process holds."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        pytest.skip("no /proc here to read a process's memory from")
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmRSS"))
