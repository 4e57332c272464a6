"""What the command says before it serves."""

from __future__ import annotations

import sys
import threading
from pathlib import Path
from typing import Any

import pytest

from knnext.cli import main

MIXTURE = ["--temperature", "1", "--lmbda", "0.5", "--k", "4"]


def refused(folder: Path, capsys: pytest.CaptureFixture[str], *options: str, code: int = 1) -> str:
    command = ["serve", str(folder / "store"), "--model", str(folder / "model"), "--device", "cpu"]
    assert main([*command, "--port", "0", *options]) == code
    return capsys.readouterr().err


@pytest.mark.parametrize("missing", ["starlette", "uvicorn"])
def test_a_missing_extra_is_said_before_a_model_is_loaded(
    folder: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    missing: str,
) -> None:
    for name in ("starlette", "uvicorn"):
        monkeypatch.setitem(sys.modules, name, type(sys)(name))
    monkeypatch.setitem(sys.modules, missing, None)
    monkeypatch.setattr("knnext.cli.serve.open_model", None)
    said = refused(folder, capsys)
    assert missing in said and "explore" in said and said.count("\n") == 1


@pytest.fixture
def no_model(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("starlette", reason="the extra serve is not installed")
    pytest.importorskip("uvicorn", reason="the extra serve is not installed")
    monkeypatch.setattr("knnext.cli.serve.open_model", None)


def test_without_a_fit_it_says_what_to_do(
    folder: Path, capsys: pytest.CaptureFixture[str], no_model: None
) -> None:
    assert "knnext tune" in refused(folder, capsys)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--port", "70000"], "a port from 0"),
        (["--max-batch", "0"], "at least 1"),
        (["--queue", "0"], "at least 1"),
        (["--max-tokens", "0"], "at least 1"),
        (["--seconds", "0"], "above 0"),
        (["--grace", "-1"], "above 0"),
        (["--lmbda", "2"], "from 0 to 1"),
    ],
)
def test_options_out_of_range(
    folder: Path, capsys: pytest.CaptureFixture[str], options: list[str], words: str
) -> None:
    assert words in refused(folder, capsys, *options, code=2)


@pytest.mark.parametrize("key", ["", " ", "a b ", "clé", "a\nb"])
@pytest.mark.parametrize("by_name", [False, True])
def test_keys_that_no_request_can_hold(
    folder: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    no_model: None,
    key: str,
    by_name: bool,
) -> None:
    if by_name:
        monkeypatch.setenv("KNNEXT_API_KEY", key)
    options = [] if by_name else ["--api-key", key]
    assert "the API key must be" in refused(folder, capsys, *MIXTURE, *options)


def test_a_place_where_nothing_can_listen(
    folder: Path, capsys: pytest.CaptureFixture[str], no_model: None
) -> None:
    for host in ("192.0.2.1", "no such host"):  # of no machine
        assert f"cannot listen at {host}" in refused(folder, capsys, *MIXTURE, "--host", host)


def test_a_port_that_is_taken(
    folder: Path, capsys: pytest.CaptureFixture[str], no_model: None
) -> None:
    from knnext.serve.listening import Listener

    taken = Listener("127.0.0.1", 0)
    try:
        said = refused(folder, capsys, *MIXTURE, "--port", str(taken.port))
    finally:
        taken.close()
    assert f"cannot listen at 127.0.0.1:{taken.port}" in said


@pytest.mark.parametrize("first", ["the load", "the server"])
def test_a_load_that_fails_is_the_commands_error(
    folder: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    no_model: None,
    first: str,
) -> None:
    from knnext.serve.listening import Listener, _Server

    serving = threading.Event()
    run, main_loop = Listener.run, _Server.main_loop

    def fail(*args: Any) -> Any:
        if first == "the server":
            assert serving.wait(60)
        raise ValueError("these weights are not whole")

    def run_later(self: Any, app: Any, draining: Any, **options: Any) -> None:
        for thread in threading.enumerate() if first == "the load" else ():
            if thread.name == "knnext-load":
                thread.join(60)
        run(self, app, draining, **options)

    async def serve(self: Any) -> None:
        serving.set()
        await main_loop(self)

    monkeypatch.setattr(Listener, "run", run_later)
    monkeypatch.setattr(_Server, "main_loop", serve)
    monkeypatch.setattr("knnext.cli.serve.open_model", fail)
    assert "these weights are not whole" in refused(folder, capsys, *MIXTURE)


def test_the_end_does_not_look_through_all_that_torch_holds(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Which takes the interpreter seconds."""
    pytest.importorskip("starlette", reason="the extra serve is not installed")
    pytest.importorskip("uvicorn", reason="the extra serve is not installed")
    from knnext.serve.listening import Listener

    def interrupted(self: Listener, app: Any, service: Any, **options: Any) -> None:
        for thread in threading.enumerate():
            if thread.name == "knnext-load":
                thread.join(300)
        service.begin()
        raise KeyboardInterrupt

    frozen: list[bool] = []
    monkeypatch.setattr(Listener, "run", interrupted)
    monkeypatch.setattr("gc.freeze", lambda: frozen.append(True))
    assert refused(folder, capsys, *MIXTURE, code=0) == "" and frozen == [True]


@pytest.mark.parametrize(("host", "key"), [("0.0.0.0", "secret"), ("0.0.0.0", None), ("::", None)])
def test_an_open_address_is_warned_of(
    folder: Path,
    capsys: pytest.CaptureFixture[str],
    no_model: None,
    host: str,
    key: str | None,
) -> None:
    from knnext.cli.serve import _warning

    said = _warning(host, key is not None)
    assert host in said and "unencrypted" in said
    assert ("who knows the API key" in said) == (key is not None)
