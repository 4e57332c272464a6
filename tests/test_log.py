"""What the library says, and to whom: the logger "knnext", warnings of one class, never print."""

from __future__ import annotations

import ast
import io
import logging
import os
import re
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import knnext
from knnext import Datastore, ExactIndex
from knnext.cli import main
from knnext.datastore.export import export_rows
from knnext.errors import KnnextWarning
from knnext.progress import progress
from knnext.say import LEVELS, LOGGER, as_typed

PACKAGE = Path(knnext.__file__).parent
#: Files that are programs, and speak for themselves.
PROGRAMS = {"cli", "__main__.py"}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    with Datastore.create(tmp_path / "store", 8, torch.float16) as made:
        made.append(torch.ones(40, 8), torch.zeros(40, dtype=torch.int64))
    return tmp_path / "store"


@pytest.fixture(autouse=True)
def as_before() -> Iterator[None]:
    level, handlers = LOGGER.level, list(LOGGER.handlers)
    yield
    assert LOGGER.handlers == handlers, "a handler was left"
    assert LOGGER.level == level
    LOGGER.setLevel(level)


def calls(path: Path) -> Iterator[ast.Call]:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call):
            yield node


def library() -> list[Path]:
    files = [p for p in PACKAGE.rglob("*.py") if not PROGRAMS & set(p.relative_to(PACKAGE).parts)]
    assert len(files) > 100
    return files


def test_the_library_prints_nothing() -> None:
    for path in library():
        tree = ast.parse(path.read_text(encoding="utf-8"))
        found = [n for n in ast.walk(tree) if isinstance(n, ast.Name) and n.id == "print"]
        assert not found, f"{path}:{found[0].lineno} prints"
        for call in calls(path):
            assert not ast.unparse(call.func).endswith("traceback.print_exception"), path


def test_a_path_in_a_command_to_copy_is_quoted() -> None:
    assert as_typed("my texts/it's") == """'my texts/it'"'"'s'"""
    assert as_typed(Path("wiki.store")) == "wiki.store"
    command = re.compile(r"`knnext [a-z]+ \{(?!as_typed\(|repo_id\}|folder\})[^}]+\}")
    for path in PACKAGE.rglob("*.py"):
        assert not command.findall(path.read_text(encoding="utf-8")), path


def test_every_warning_is_of_our_class() -> None:
    ours = {"KnnextWarning", "CorpusNote", "FallbackWarning"}
    found = 0
    for path in PACKAGE.rglob("*.py"):
        for call in calls(path):
            if ast.unparse(call.func) in ("warnings.warn", "_warnings.warn"):
                kind = ast.unparse(call.args[1]) if len(call.args) > 1 else "none"
                assert kind.rpartition(".")[2] in ours, f"{path}:{call.lineno}: {kind}"
                found += 1
    assert found > 10
    from knnext.corpus.documents import CorpusNote
    from knnext.ops._library import FallbackWarning

    assert issubclass(CorpusNote, KnnextWarning) and issubclass(FallbackWarning, KnnextWarning)


def test_every_logger_is_below_ours() -> None:
    for path in library():
        for call in calls(path):
            if ast.unparse(call.func) == "logging.getLogger" and call.args:
                name = ast.unparse(call.args[0])
                assert name in ("__name__", "'knnext'", "'bitsandbytes.autograd._functions'"), path


def test_it_is_silent_until_it_is_asked(
    folder: Path, capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert any(isinstance(handler, logging.NullHandler) for handler in LOGGER.handlers)
    with Datastore.open(folder) as store:
        ExactIndex(store).search(torch.ones(2, 8), 3)
        export_rows(store, tmp_path / "out", "npy")
    assert capfd.readouterr() == ("", "")


def test_a_program_captures_it(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    with (
        caplog.at_level(logging.DEBUG, "knnext"),
        Datastore.create(folder.parent / "two", 8, torch.float16) as made,
    ):
        made.append(torch.ones(3, 8), torch.zeros(3, dtype=torch.int64))
    found = [(record.name, record.levelname) for record in caplog.records]
    assert ("knnext.datastore.writer", "DEBUG") in found
    assert "committed 3 rows" in caplog.text


def corpus(folder: Path, copies: int = 2) -> Path:
    folder.mkdir()
    for number in range(30):
        (folder / f"{number}.txt").write_text(f"text {number % (30 // copies)}")
    return folder


def test_levels_and_warnings(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "knnext"), pytest.warns(KnnextWarning):
        knnext.load_corpus(str(corpus(tmp_path / "texts")))
    assert [r.levelname for r in caplog.records] == ["INFO"] and "documents: " in caplog.text
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.simplefilter("ignore", KnnextWarning)
        knnext.load_corpus(str(tmp_path / "texts"))


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("level", LEVELS)
def test_the_level_governs_progress_too(level: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("knnext.progress.DELAY", 0.0)
    monkeypatch.setattr("knnext.progress.INTERVAL", -1.0)
    before = LOGGER.level
    try:
        LOGGER.setLevel(level.upper())
        with progress(3, "reading", file=(out := Terminal())) as bar:
            bar.update()
    finally:
        LOGGER.setLevel(before)
    assert bool(out.getvalue()) == (level in ("debug", "info"))


INFO = "import knnext, logging; log = logging.getLogger('knnext.x'); "
INFO += "[getattr(log, n)('%s it is', n) for n in ('debug', 'info', 'warning', 'error')]"


@pytest.mark.parametrize(
    ("told", "said"), [("", []), ("INFO", ["info", "warning", "error"]), ("error", ["error"])]
)
def test_the_variable(told: str, said: list[str]) -> None:
    env = {**os.environ, "KNNEXT_LOG": told}
    done = subprocess.run([sys.executable, "-c", INFO], env=env, capture_output=True, text=True)
    lines = [line for line in done.stderr.splitlines() if "it is" in line]
    assert [line.split("knnext.x: ")[1].split()[0] for line in lines] == said, done.stderr
    assert done.stdout == "" and done.returncode == 0


def test_a_wrong_level_is_said_and_nothing_ends() -> None:
    env = {**os.environ, "KNNEXT_LOG": "loud"}
    done = subprocess.run([sys.executable, "-c", INFO], env=env, capture_output=True, text=True)
    assert done.returncode == 0
    assert "KNNEXT_LOG must be one of debug, info, warning, error, got 'loud'" in done.stderr


def speak(*_: object) -> dict[str, int]:
    logging.getLogger("knnext.x").debug("all of it")
    logging.getLogger("knnext.x").info("some of it")
    logging.getLogger("knnext.x").warning("take care")
    warnings.warn("a note", KnnextWarning, stacklevel=1)
    return {"found": 1}


@pytest.mark.parametrize(
    ("options", "wanted"),
    [
        ([], ["take care", "note: a note"]),
        (["--verbose"], ["some of it", "take care", "note: a note"]),
        (["-vv"], ["all of it", "some of it", "take care", "note: a note"]),
        (["--quiet"], []),
    ],
)
@pytest.mark.filterwarnings("default")
def test_the_command_is_as_loud_as_it_is_told(
    options: list[str],
    wanted: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("knnext.cli.doctor.run", speak)
    monkeypatch.setattr(warnings, "showwarning", warnings.showwarning)
    assert main(["doctor", "--json", *options]) == 0
    out, err = capsys.readouterr()
    assert out == '{"found": 1}\n'
    lines = err.splitlines()
    assert len(lines) == len(wanted), err
    assert all(line.endswith(words) for line, words in zip(lines, wanted, strict=True)), err


def test_loud_and_quiet_are_one_or_the_other(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "-v", "-q"]) == 2
    assert "not allowed with" in capsys.readouterr().err


def test_an_error_is_said_however_quiet(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info", str(tmp_path / "nowhere"), "--quiet"]) == 1
    assert capsys.readouterr().err.startswith("knnext info: ")


def test_a_log_line_takes_the_place_of_a_progress_line(monkeypatch: pytest.MonkeyPatch) -> None:
    from knnext.say import log_on_stderr

    monkeypatch.setattr(sys, "stderr", out := Terminal())
    with log_on_stderr("info"):
        logging.getLogger("knnext.x").info("here")
    assert out.getvalue().startswith("\r\x1b[K") and out.getvalue().endswith(" here\n")
