"""The commands that open a model: what they say of one that they refuse."""

from __future__ import annotations

import io
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest

from knnext.cli import main
from knnext.cli.parser import build_parser
from knnext.corpus import Document
from knnext.lm.load import save_lm
from knnext.lm.train import train_tokenizer
from tests.lm.every_model import every
from tests.lm.tiny_models import tiny


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("models")
    tokenizer = train_tokenizer([Document("a", "the quick brown fox " * 40)], 258)
    for name in ("llama", "bert"):
        save_lm(path / name, tiny(name) if name == "llama" else every(name), tokenizer)
    (path / "text.txt").write_text("the quick brown fox jumps\n" * 30)
    return path


def build(folder: Path, model: Path, store: Path) -> int:
    text = str(folder / "text.txt")
    options = ["--block-size", "16", "--device", "cpu", "--shares", "100,0,0"]
    return main(["build", str(store), "--model", str(model), "--corpus", text, *options])


@pytest.mark.parametrize("command", ["build", "tune", "eval", "search", "generate"])
def test_code_is_trusted_only_by_name(command: str) -> None:
    more = {
        "build": ["--corpus", "x"],
        "search": ["text"],
        "generate": ["text"],
    }.get(command, [])
    given = [command, "store", *more, "--model", "m"]
    assert build_parser().parse_args(given).trust_remote_code is False
    assert build_parser().parse_args([*given, "--trust-remote-code"]).trust_remote_code is True


def test_a_models_code_is_refused_without_asking(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    model = tmp_path / "model"
    shutil.copytree(folder / "llama", model)
    config = json.loads((model / "config.json").read_text())
    config |= {"model_type": "mine", "auto_map": {"AutoConfig": "mine.C"}}
    (model / "config.json").write_text(json.dumps(config))
    (model / "mine.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    monkeypatch.setattr(sys, "stdin", io.StringIO("y\n" * 5))
    assert build(folder, model, tmp_path / "store") == 1
    said = capsys.readouterr().err
    assert "auto_map" in said and "--trust-remote-code" in said and said.count("\n") == 1
    assert not (tmp_path / "ran").exists() and not (tmp_path / "store").exists()


def test_a_model_that_sees_the_future_is_refused(folder: Path, tmp_path: Path, capsys: Any) -> None:
    assert build(folder, folder / "bert", tmp_path / "store") == 1
    said = capsys.readouterr().err
    assert "sees the future" in said and said.count("\n") == 1
    assert not (tmp_path / "store").exists()
