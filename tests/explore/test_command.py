"""What the command says before it serves."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from knnext.cli import main


def refused(folder: Path, capsys: pytest.CaptureFixture[str], *options: str, code: int = 1) -> str:
    command = ["explore", str(folder / "store"), "--model", str(folder / "model")]
    assert main([*command, "--device", "cpu", *options]) == code
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
    monkeypatch.setattr("knnext.cli.explore.open_model", None)
    said = refused(folder, capsys)
    assert missing in said and "explore" in said and said.count("\n") == 1


def test_without_a_fit_it_says_what_to_do(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("starlette", reason="the extra explore is not installed")
    monkeypatch.setattr("knnext.cli.explore.open_model", None)
    assert "knnext tune" in refused(folder, capsys)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--port", "70000"], "a port from 0"),
        (["--port", "-1"], "a port from 0"),
        (["--max-tokens", "0"], "at least 1"),
        (["--seconds", "0"], "above 0"),
        (["--lmbda", "2"], "from 0 to 1"),
    ],
)
def test_options_out_of_range(
    folder: Path, capsys: pytest.CaptureFixture[str], options: list[str], words: str
) -> None:
    assert words in refused(folder, capsys, *options, code=2)


def test_a_place_where_nothing_can_listen(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("starlette", reason="the extra explore is not installed")
    pytest.importorskip("uvicorn", reason="the extra explore is not installed")
    mixture = ["--temperature", "1", "--lmbda", "0.5", "--k", "4"]
    said = refused(folder, capsys, *mixture, "--host", "192.0.2.1")  # of no machine
    assert "cannot listen at 192.0.2.1" in said
    said = refused(folder, capsys, *mixture, "--host", "no such host")
    assert "cannot listen at no such host" in said


def test_the_end_does_not_look_through_all_that_torch_holds(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Which takes the interpreter seconds, after a Ctrl-C that ends the page within one."""
    pytest.importorskip("starlette", reason="the extra explore is not installed")
    pytest.importorskip("uvicorn", reason="the extra explore is not installed")
    from knnext.explore.server import Server

    def interrupted(self: Server) -> None:
        self._listener.close()
        raise KeyboardInterrupt

    frozen: list[bool] = []
    monkeypatch.setattr(Server, "run", interrupted)
    monkeypatch.setattr("gc.freeze", lambda: frozen.append(True))
    mixture = ["--temperature", "1", "--lmbda", "0.5", "--k", "4"]
    assert refused(folder, capsys, *mixture, code=0) == "" and frozen == [True]
