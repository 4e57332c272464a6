"""The joining of parts into one datastore: which parts, what dies on the way, what is left."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from knnext.corpus import TokenizedDocuments
from knnext.datastore import (
    Datastore,
    DatastoreError,
    IncompatibleDatastoreError,
    UnfinishedDatastoreError,
    build_job,
)
from tests.datastore.parted import make_parts
from tests.datastore.streams import LENGTHS, check_same


def joining(tokenizer: Any, text: TokenizedDocuments, path: Path) -> None:
    """All parts whole, and not joined yet."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(build_job, "missing_parts", lambda *_: [1])
        make_parts(tokenizer, text, path, [1, 2, 3], 3)
    with pytest.raises(UnfinishedDatastoreError, match="3 parts are whole and not joined: `knnext"):
        Datastore.open(path)


def test_a_wrong_part_is_not_joined(
    tokenizer: Any, text: TokenizedDocuments, whole: Datastore, tmp_path: Path
) -> None:
    good, path = tmp_path / "good", tmp_path / "store"
    joining(tokenizer, text, good)
    make_parts(tokenizer, text, tmp_path / "layer", [1, 2], 3, key_layer="ffn")
    make_parts(tokenizer, text, tmp_path / "two", [1], 2)
    for wrong, message in (
        (tmp_path / "layer" / "part-00002", "key_layer: datastore has 'ffn', asked for 'att'"),
        (tmp_path / "two" / "part-00001", "parts: datastore has 2, asked for 3"),
        (good / "part-00003", "part: datastore has 3, asked for 2"),
    ):
        shutil.copytree(good, path)
        shutil.rmtree(path / "part-00002")
        shutil.copytree(wrong, path / "part-00002")
        with pytest.raises(IncompatibleDatastoreError, match=rf"not part 2 of 3.*{message}"):
            Datastore.join(path)
        shutil.rmtree(path)
    shutil.copytree(good, path)
    (path / "part-00002" / "keys-00000.bin").unlink()
    with pytest.raises(DatastoreError, match=r"part-00002/keys-00000\.bin: missing"):
        Datastore.join(path)
    check_same(Datastore.join(good), whole)
    check_same(Datastore.join(good), whole)  # once more changes nothing


class Die(BaseException):
    """Stands for a kill."""


@pytest.mark.parametrize("name", ["pwrite", "fsync", "replace"])
def test_a_death_at_every_operation_of_joining(
    tokenizer: Any,
    text: TokenizedDocuments,
    whole: Datastore,
    tmp_path: Path,
    monkeypatch: Any,
    name: str,
) -> None:
    """Nobody sees a datastore before it is one; joining again makes it, and leaves nothing."""
    good, path = tmp_path / "good", tmp_path / "store"
    joining(tokenizer, text, good)
    owner: Any = Path if name == "replace" else os
    at, died, real = 0, True, getattr(owner, name)
    while died:
        died, left = False, [at]

        def failing(*arguments: Any, left: list[int] = left, **more: Any) -> Any:
            left[0] -= 1
            if left[0] == -1:
                raise Die
            return real(*arguments, **more)

        shutil.rmtree(path, ignore_errors=True)
        shutil.copytree(good, path)
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, failing)
            try:
                Datastore.join(path)
            except Die:
                died = True
        if died and not (path / "meta.json").exists():
            with pytest.raises(UnfinishedDatastoreError):
                Datastore.open(path)
        check_same(Datastore.join(path), whole)
        files = {file.name for file in path.iterdir() if file.is_file()}
        assert files == {".lock", "meta.json", *(f.file for f in whole.meta.documents.files())}
        at += 1
    assert at > 2


def test_a_joined_datastore_moves_as_one_folder_and_reads_nothing_outside(
    tokenizer: Any, text: TokenizedDocuments, whole: Datastore, tmp_path: Path
) -> None:
    make_parts(tokenizer, text, tmp_path / "here", [1, 2], 2)
    (tmp_path / "here").rename(tmp_path / "there")
    store = Datastore.open(tmp_path / "there", verify=True)
    check_same(store, whole)
    assert "2, joined" in store.describe()
    copied = store.subsample(0.5, path=tmp_path / "half")
    assert copied.meta.parts is None
    wanted = whole.subsample(0.5)
    assert torch.equal(copied.keys[:], wanted.keys[:])
    merged = Datastore.merge([store, whole], tmp_path / "merged")
    assert len(merged) == 2 * len(whole) and merged.num_documents == 2 * len(LENGTHS)
    part = tmp_path / "there" / "part-00001"
    part.rename(tmp_path / "elsewhere")
    part.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(DatastoreError, match="part-00001: links out of the datastore"):
        Datastore.open(tmp_path / "there")
    part.unlink()
    (tmp_path / "elsewhere").rename(part)
    body = json.loads((tmp_path / "there" / "meta.json").read_text())
    assert body["format_version"] == 2 and body["parts"][0] == {"folder": "part-00001", "rows": 104}
    keys = part / "keys-00000.bin"
    content = bytearray(keys.read_bytes())
    content[9] ^= 1
    keys.write_bytes(content)
    with pytest.raises(DatastoreError, match=r"1 of 7 files .*part-00001/keys-00000\.bin"):
        Datastore.open(tmp_path / "there", verify=True)


FIXTURES = Path(__file__).parent / "fixtures"


def test_format_2_is_read_for_ever() -> None:
    """This folder must never be written anew. Its rows are those of datastore_v1."""
    store, old = (Datastore.open(FIXTURES / f"datastore_v{n}", verify=True) for n in (2, 1))
    assert store.meta.parts is not None and [p.rows for p in store.meta.parts] == [4, 0, 6]
    assert torch.equal(store.keys[:], old.keys[:]) and torch.equal(store.values[:], old.values[:])
    assert store.document_names == old.document_names
    assert store.document_offsets.tolist() == [0, 4, 4, 10]
    part = Datastore.open(FIXTURES / "datastore_v2" / "part-00003", verify=True)
    assert part.document_names == ("ü.py",)
    assert part.meta.origin == {"part": 3, "parts": 3, "first_row": 4, "first_document": 2}
