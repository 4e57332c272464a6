"""Requests to a service without a network, as the tests of this folder send them."""

from __future__ import annotations

import json
from typing import Any

import pytest

pytest.importorskip("starlette", reason="the extra serve is not installed")
pytest.importorskip("uvicorn", reason="the extra serve is not installed")

from knnext.serve.app import Service
from tests.explore.asgi import Answer, send

NAME = "small/model"
KEY = "a-key-of-this-run"
JSON = {"content-type": "application/json"}
TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'odd' %}{{ raise_exception('roles must be even') }}"
    "{% endif %}{{ m.role }}: {{ m.content }} {% endfor %}"
    "{% if add_generation_prompt %}fox{% endif %}"
)


def service_of(engine: Any, **options: Any) -> Service:
    service = Service(NAME, **options)
    service.open(engine)
    return service


def post(app: Any, path: str = "completions", headers: Any = JSON, **body: Any) -> Answer:
    return send(app, "POST", f"/v1/{path}", headers=headers, body=json.dumps(body).encode())


def events(answer: Answer) -> list[Any]:
    assert answer.status == 200
    assert answer.headers["content-type"].startswith("text/event-stream")
    lines = answer.body.decode().split("\n\n")
    assert lines[-1] == "" and lines[-2] == "data: [DONE]"
    return [json.loads(line.removeprefix("data: ")) for line in lines[:-2]]
