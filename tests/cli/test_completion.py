"""Shell completion, as a real bash does it with the printed script."""

from __future__ import annotations

import argparse
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from knnext.cli import main
from knnext.cli.completion import SHELLS, place_of
from knnext.cli.parser import build_parser

#: A shell function that prints what bash would offer for a command line, a word a line.
OFFER = """
offer() {
    local words=("$@")
    COMP_WORDS=("${words[@]}"); COMP_CWORD=$((${#words[@]} - 1))
    COMP_LINE="${words[*]}"; COMP_POINT=${#COMP_LINE}; COMPREPLY=()
    _shtab_knnext "knnext" "${words[COMP_CWORD]}" "${words[COMP_CWORD - 1]}"
    printf '%s\\n' "${COMPREPLY[@]}"
}
"""


@pytest.fixture(scope="module")
def script(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("shtab")
    words = [sys.executable, "-m", "knnext", "--print-completion", "bash"]
    done = subprocess.run(words, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    path = tmp_path_factory.mktemp("completion") / "knnext.bash"
    path.write_text(done.stdout)
    return path


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("place")
    for name in ("wiki.store", "wicked model"):
        (folder / name).mkdir()
    (folder / "wide.npz").touch()
    return folder


def offered(script: Path, place: Path, *words: str) -> set[str]:
    """What bash, with nothing of Python on its path, offers for the last of the words."""
    code = f"source {script}\n{OFFER}\noffer {shlex.join(('knnext', *words))}"
    path = {"PATH": "/nonexistent"}
    bash = shutil.which("bash") or "bash"
    done = subprocess.run(
        [bash, "--norc", "-c", code], cwd=place, env=path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return {line.rstrip() for line in done.stdout.splitlines() if line.strip()}


def commands() -> dict[str, argparse.ArgumentParser]:
    action = next(a for a in build_parser()._actions if isinstance(a, argparse._SubParsersAction))
    return dict(action.choices)


def test_commands(script: Path, place: Path) -> None:
    assert offered(script, place, "") >= set(commands())
    assert offered(script, place, "ex") == {n for n in commands() if n.startswith("ex")}


def test_options(script: Path, place: Path) -> None:
    assert offered(script, place, "eval", "--lm") == {"--lmbda"}
    assert {"--temperature", "--token-log"} <= offered(script, place, "eval", "--t")
    assert offered(script, place, "eval", "--dt") == set()  # refused with another one's name


def test_choices(script: Path, place: Path) -> None:
    assert offered(script, place, "build", "--metric", "") == {"l2", "ip"}
    assert offered(script, place, "--print-completion", "") == set(SHELLS)
    assert {"padding", "all"} <= offered(script, place, "experiment", "")


@pytest.mark.parametrize("command", ["info", "eval", "build", "search", "export"])
def test_folders(script: Path, place: Path, command: str) -> None:
    assert offered(script, place, command, "wi") == {"wiki.store", "wicked model"}


def test_files(script: Path, place: Path) -> None:
    found = offered(script, place, "eval", "wiki.store", "--scores", "wi")
    assert found == {"wiki.store", "wicked model", "wide.npz"}
    assert "wiki.store" in offered(script, place, "eval", "wiki.store", "--model", "wi")


def test_every_place_is_known() -> None:
    """An argument whose name says that it is one, and that nothing completes."""
    spoken = ("folder", "file", "path")
    for name, command in commands().items():
        for action in command._actions:
            words = f"{action.dest} {action.metavar or ''}".lower()
            if any(word in words for word in spoken) and action.nargs != 0:
                assert place_of(action), f"{name}: {action.dest}"
        assert not any(a.dest == "datastore" and not place_of(a) for a in command._actions)


@pytest.mark.parametrize("shell", SHELLS)
def test_every_shell(shell: str, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("shtab")
    assert main(["--print-completion", shell]) == 0
    out = capsys.readouterr().out
    assert "lmbda" in out and "knnext" in out
    checker = shutil.which(shell)
    if checker:
        assert subprocess.run([checker, "-n"], input=out, text=True).returncode == 0


def test_without_the_package_it_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "shtab", None)
    assert main(["--print-completion", "bash"]) == 1
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1
    assert err.startswith('knnext: shell completion needs shtab: pip install ".[completion]"')
