"""Errors: one base, the builtins that they always were, one sentence on the command line."""

from __future__ import annotations

import ast
import errno
import importlib
import os
import pickle
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest
import torch

import knnext
from knnext import Datastore, ExactIndex, FaissIndex, errors
from knnext.cli import main
from knnext.datastore.room import check_disk
from knnext.errors import KnnextError
from knnext.output import write_text

PACKAGE = Path(knnext.__file__).parent
ROOT = PACKAGE.parent
KINDS = [getattr(errors, name) for name in errors.__all__ if name != "KnnextWarning"]
BUILTINS = (ValueError, OSError, ImportError, RuntimeError)


def own_errors() -> Iterator[type[BaseException]]:
    """Every exception class of the package that is no warning, wherever it is written."""
    named = re.compile(r"^class (\w+)\([^)]*(?:Error|Exception)\b[^)]*\):", re.MULTILINE)
    for path in sorted(PACKAGE.rglob("*.py")):
        for name in named.findall(path.read_text(encoding="utf-8")):
            module = ".".join(path.relative_to(ROOT).with_suffix("").parts)
            yield getattr(importlib.import_module(module.removesuffix(".__init__")), name)


def test_every_error_of_ours_has_the_base_and_is_a_builtin() -> None:
    pytest.importorskip("starlette")
    found = list(own_errors())
    assert len(found) > len(KINDS)
    # What never leaves its room need be no builtin.
    inner = {"KnnextError", "StreamError", "Refused", "Gone"}
    for kind in found:
        assert issubclass(kind, KnnextError), kind
        assert kind.__name__ in inner or issubclass(kind, BUILTINS), kind
        assert (kind.__doc__ or "").strip(), kind


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_goes_to_another_process(kind: type[KnnextError]) -> None:
    error = pickle.loads(pickle.dumps(kind("what went wrong")))
    assert type(error) is kind and str(error) == "what went wrong"


def test_the_old_places_have_the_same_classes() -> None:
    from knnext.datastore import CorruptDatastoreError
    from knnext.index import IndexMismatchError

    assert errors.DatastoreError is knnext.DatastoreError
    assert errors.CorruptDatastoreError is CorruptDatastoreError
    assert errors.IndexMismatchError is IndexMismatchError
    assert issubclass(errors.DatastoreFullError, errors.DatastoreWriteError)


def raised(tree: ast.AST) -> Iterator[tuple[int, str]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Raise) and node.exc is not None:
            thing = node.exc.func if isinstance(node.exc, ast.Call) else node.exc
            if isinstance(thing, ast.Name):
                yield node.lineno, thing.id


BARE = {"Exception", "BaseException", "ImportError", "ModuleNotFoundError", "FileNotFoundError"}


def test_nothing_raises_a_bare_exception() -> None:
    """Nor a builtin for which there is a class of ours."""
    files = sorted(PACKAGE.rglob("*.py"))
    found = [
        f"{path.relative_to(ROOT)}:{line}: {name}"
        for path in files
        for line, name in raised(ast.parse(path.read_text(encoding="utf-8")))
        if name in BARE
    ]
    assert len(files) > 100 and not found
    planted = ast.parse("raise Exception('x')\nraise ImportError\nraise error\nraise")
    assert [name for _, name in raised(planted) if name in BARE] == ["Exception", "ImportError"]


def test_no_hint_sends_anybody_to_a_registry_that_has_not_this_package() -> None:
    for path in PACKAGE.rglob("*.py"):
        assert "pip install knnext" not in path.read_text(encoding="utf-8"), path
        assert 'pip install "knnext' not in path.read_text(encoding="utf-8"), path


@pytest.mark.parametrize("kind", KINDS)
def test_the_command_says_one_sentence(
    kind: type[KnnextError], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: object) -> None:
        raise kind("the sentence\n  in two lines")

    monkeypatch.setattr("knnext.cli.doctor.run", fail)
    assert main(["doctor"]) == 1
    out, err = capsys.readouterr()
    assert (out, err) == ("", "knnext doctor: the sentence in two lines\n")


def store(folder: Path, rows: int = 40) -> Path:
    with Datastore.create(folder, 8, torch.float16) as made:
        made.append(torch.ones(rows, 8), torch.zeros(rows, dtype=torch.int64))
    return folder


def damaged(folder: Path, _: pytest.MonkeyPatch) -> list[str]:
    path = next(store(folder).glob("keys-*"))
    os.truncate(path, path.stat().st_size - 1)
    return ["info", str(folder)]


def another_version(folder: Path, _: pytest.MonkeyPatch) -> list[str]:
    meta = store(folder) / "meta.json"
    meta.write_text(meta.read_text().replace('"format_version": 1', '"format_version": 99'))
    return ["info", str(folder)]


def unfinished(folder: Path, _: pytest.MonkeyPatch) -> list[str]:
    with suppress(KeyError), Datastore.create(folder, 8, torch.float16):
        raise KeyError
    return ["export", str(folder), f"{folder}-out", "--format", "npy"]


def no_model(folder: Path, _: pytest.MonkeyPatch) -> list[str]:
    return ["search", str(store(folder)), "text", "--model", f"{folder}/nowhere"]


def broken_model(folder: Path, _: pytest.MonkeyPatch) -> list[str]:
    model = folder.parent / "model"
    model.mkdir()
    (model / "config.json").write_text("{")
    (model / "model.safetensors").write_bytes(b"\x08" + 7 * b"\0" + b"no json!")
    (model / "tokenizer.json").write_text("{}")
    return ["search", str(store(folder)), "text", "--model", str(model)]


def no_package(folder: Path, patch: pytest.MonkeyPatch) -> list[str]:
    patch.setitem(sys.modules, "faiss", None)
    return ["index", str(store(folder))]


def no_room(folder: Path, patch: pytest.MonkeyPatch) -> list[str]:
    full = shutil._ntuple_diskusage(10, 0, 10)  # type: ignore[attr-defined]
    patch.setattr("knnext.datastore.room.shutil.disk_usage", lambda _: full)
    return ["export", str(store(folder)), f"{folder}-out", "--format", "npy"]


CASES: list[tuple[Callable[[Path, pytest.MonkeyPatch], list[str]], str]] = [
    (damaged, "CorruptDatastoreError"),
    (another_version, "FormatVersionError"),
    (unfinished, "UnfinishedDatastoreError"),
    (no_model, "MissingFileError"),
    (broken_model, "ModelError"),
    (no_package, "MissingPackageError"),
    (no_room, "DatastoreFullError"),
]


@pytest.mark.parametrize(("case", "kind"), CASES, ids=[case.__name__ for case, _ in CASES])
def test_what_really_goes_wrong(
    case: Callable[[Path, pytest.MonkeyPatch], list[str]],
    kind: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    words = case(tmp_path / "store", monkeypatch)
    assert main(words) == 1
    out, err = capsys.readouterr()
    assert out == "" and err.startswith(f"knnext {words[0]}: ") and err.count("\n") == 1, err
    # The same again, and where: its last lines name the class.
    assert main([*words, "--debug"]) == 1
    assert f"\nknnext.errors.{kind}: " in capsys.readouterr().err


def test_a_full_disk_is_an_oserror_of_that_number(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(OSError) as caught:
        check_disk(tmp_path, 1 << 62, "this", "hint")
    assert caught.value.errno == errno.ENOSPC and isinstance(caught.value, errors.NoRoomError)
    assert str(caught.value).startswith(f"{tmp_path}: this needs")

    def full(*_: object) -> None:
        raise OSError(errno.EDQUOT, "over the quota")

    monkeypatch.setattr("knnext.output._sync", full)
    with pytest.raises(errors.NoRoomError, match="over the quota") as again:
        write_text(tmp_path / "report", "x")
    assert again.value.errno == errno.EDQUOT and again.value.filename == str(tmp_path / "report")


def test_a_corpus_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(errors.CorpusError, match="nowhere"):
        knnext.load_corpus(str(tmp_path / "nowhere"))


def test_a_mismatch_is_one(tmp_path: Path) -> None:
    with (
        Datastore.open(store(tmp_path / "a")) as found,
        pytest.raises(errors.IncompatibleDatastoreError),
    ):
        found.check_compatible(dim=9)
    pytest.importorskip("faiss")
    with Datastore.open(tmp_path / "a") as a, Datastore.open(store(tmp_path / "b", 41)) as b:
        FaissIndex.build(a, tmp_path / "index", "Flat")
        with pytest.raises(errors.IndexMismatchError):
            FaissIndex.open(tmp_path / "index", b)
        with pytest.raises(errors.MissingFileError):
            FaissIndex.open(tmp_path / "nowhere", b)


def test_an_argument_that_no_call_takes_is_a_plain_error() -> None:
    index = ExactIndex.from_tensors(torch.ones(3, 4))
    with pytest.raises(ValueError) as caught:
        index.search(torch.ones(1, 4), 0)
    assert not isinstance(caught.value, KnnextError)


def test_errors_cost_no_torch() -> None:
    code = "import sys; sys.argv = ['knnext', '--help']; import knnext.errors; "
    code += "sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
