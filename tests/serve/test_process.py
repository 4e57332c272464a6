"""The command in a process of its own: it begins, answers, and ends when it is told so."""

from __future__ import annotations

import json
import signal
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import pytest

from tests.serve.asking import PATIENCE, PROMPTS
from tests.serve.serving import KEY, served

pytest.importorskip("starlette", reason="the extra serve is not installed")
pytest.importorskip("uvicorn", reason="the extra serve is not installed")

pytestmark = pytest.mark.slow


def begin(address: str, **body: Any) -> Any:
    """The answer to a stream, begun."""
    raw = json.dumps({"stream": True, **body}).encode()
    headers = {"Content-Type": "application/json", "Authorization": f"Bearer {KEY}"}
    request = urllib.request.Request(f"{address}/v1/completions", raw, headers)
    return urllib.request.urlopen(request, timeout=PATIENCE)


def events(answer: Any) -> list[str]:
    """What is left of it."""
    lines = answer.read().decode().split("\n\n")
    return [line.strip().removeprefix("data: ") for line in lines if line.strip()]


def test_what_is_under_way_is_answered(folder: Path) -> None:
    """What comes after Ctrl-C is not, and nothing is left behind."""
    before = sorted(path.name for path in folder.rglob("*"))
    with served(folder, "--grace", str(PATIENCE)) as (process, address):
        with urllib.request.urlopen(f"{address}/health", timeout=PATIENCE) as health:
            assert json.load(health) == {"status": "ready"}
        with begin(address, prompt=PROMPTS, max_tokens=20, n=8) as answer:
            answer.readline()
            process.send_signal(signal.SIGINT)
            *parts, done = events(answer)
        ends = [json.loads(part)["choices"][0]["finish_reason"] for part in parts]
        assert done == "[DONE]" and len([end for end in ends if end]) == 8 * len(PROMPTS)
        out, _ = process.communicate(timeout=PATIENCE)
        assert process.returncode == 0 and "Traceback" not in out, out
        with pytest.raises(urllib.error.URLError):
            urllib.request.urlopen(f"{address}/health", timeout=PATIENCE)
    assert sorted(path.name for path in folder.rglob("*")) == before


def test_what_does_not_end_is_ended(folder: Path) -> None:
    """Past the grace those who wait are told, and the process ends as the signal has it."""
    with served(folder, "--grace", "0.01", "--max-batch", "1") as (process, address):
        with begin(address, prompt=["the"] * 200, max_tokens=25) as answer:
            answer.readline()
            process.send_signal(signal.SIGTERM)
            last = json.loads(events(answer)[-1])
        assert "shutting down" in last["error"]["message"]
        out, _ = process.communicate(timeout=PATIENCE)
        assert process.returncode == -signal.SIGTERM and "Traceback" not in out, out
