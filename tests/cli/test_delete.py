"""`knnext delete` and `knnext compact`, and documents that searches are told of."""

from __future__ import annotations

import json
from argparse import Namespace
from pathlib import Path

import pytest
import torch

from knnext.cli import main
from knnext.cli.delete import filter_of, names_of
from knnext.datastore import Datastore
from knnext.index import ExactIndex, StoredCodes


@pytest.fixture
def path(tmp_path: Path) -> Path:
    with Datastore.create(tmp_path / "s", 4, vocab_size=100) as store:
        sizes = [("a", 10), ("b c", 20), ("d", 5)]
        store.append(torch.randn(35, 4), torch.arange(35), sizes)
    return tmp_path / "s"


def test_documents_are_deleted_and_compacted(path: Path, capsys: pytest.CaptureFixture) -> None:
    StoredCodes.build(Datastore.open(path))
    names = path.with_name("names")
    names.write_text("b c\n\n")
    path.with_name("s.tuning.json").write_text("{}")
    assert main(["delete", str(path), "--documents", f"@{names}", "--json"]) == 0
    said = capsys.readouterr()
    assert json.loads(said.out)["rows"] == 20 and "knnext tune" in said.err
    assert len(Datastore.open(path)) == 15
    path.with_name("s.tuning.json").unlink()
    assert main(["info", str(path)]) == 0
    assert "knnext compact" in capsys.readouterr().out
    assert main(["compact", str(path)]) == 0
    said = capsys.readouterr().out
    assert "20 rows are gone, 15 left" in said and "codes made anew" in said
    assert ExactIndex(Datastore.open(path), codes=True).search(torch.zeros(1, 4), 20)[1].max() == 14
    assert main(["info", str(path), "--verify"]) == 0
    assert main(["delete", str(path), "--documents", "a", "nobody"]) == 1
    assert "none called 'nobody'" in capsys.readouterr().err
    assert len(Datastore.open(path)) == 15
    assert main(["delete", str(path)]) == 2


def test_documents_of_a_search_come_from_the_command_line(tmp_path: Path) -> None:
    assert filter_of(Namespace()) is None
    given = tmp_path / "list"
    given.write_text("x\n y\n")
    found = filter_of(Namespace(include_documents=[["a", f"@{given}"]], exclude_documents=[["b"]]))
    assert found is not None
    assert (found.documents, found.exclude_documents) == (("a", "x", " y"), ("b",))
    assert names_of([["a"], ["b", "a"]]) == ["a", "b", "a"]
    given.write_bytes("\ufeffx\r\ny\u2028z\x0c\x85w\r\n".encode())  # as another system writes
    assert names_of([[f"@{given}"]]) == ["x", "y\u2028z\x0c\x85w"]


@pytest.mark.parametrize("command", ["search", "eval", "generate", "tune", "explore"])
def test_the_commands_that_search_take_them(command: str) -> None:
    from knnext.cli.parser import build_parser

    text = ["text"] if command in ("search", "generate") else []
    line = [command, "S", *text, "--model", "M", "--include-documents", "a", "b"]
    args = build_parser().parse_args([*line, "--exclude-documents", "c"])
    assert args.include_documents == [["a", "b"]] and args.exclude_documents == [["c"]]
