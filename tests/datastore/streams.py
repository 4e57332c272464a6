"""Streams of documents of given lengths, and what it takes to make a datastore of one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from knnext.corpus import Document, TokenizedDocuments
from knnext.datastore import Datastore
from knnext.lm.train import train_tokenizer
from tests.lm.tiny_models import random_tokens

#: Documents of no token, of one, of many batches; two at the end that have no rows.
LENGTHS = [1, 0, 40, 7, 0, 0, 90, 3, 1, 60, 0, 0]
WINDOWS: dict[str, Any] = {"block_size": 16, "stride": 8, "batch_size": 2}


def some_tokenizer() -> Any:
    return train_tokenizer([Document("a", "some text to learn from\n" * 9)], vocab_size=260)


def stream(lengths: list[int], *, hashed: bool = True) -> TokenizedDocuments:
    tokens = random_tokens(sum(lengths)).numpy().astype(np.int32)
    offsets, count = np.cumsum([0, *lengths]), len(lengths)
    names = [f"döc {i}" for i in range(count)]
    hashes = np.arange(count * 16, dtype=np.uint8).reshape(count, 16) if hashed else None
    ones = np.ones(count, int)
    return TokenizedDocuments(tokens, offsets, names, ones, ones, hashes)


def check_same(store: Datastore, whole: Datastore) -> None:
    """Keys, values and the files of documents have the same bytes; the rest agrees."""
    again = Datastore.open(store.path, verify=True)
    assert again.fingerprint == store.fingerprint and len(again) == len(whole)
    for name in ("keys", "values"):
        got, want = (getattr(one, name)[0 : len(one)].view(torch.uint8) for one in (again, whole))
        assert torch.equal(got, want)
    found, wanted = again.meta.documents, whole.meta.documents
    assert found == wanted
    for file in () if wanted is None else wanted.files():
        assert contents(again.path / file.file) == contents(whole.path / file.file)
    same = ("dim", "dtype", "metric", "key_layer", "origin", "text", "vocab_size", "model_revision")
    assert all(getattr(again.meta, name) == getattr(whole.meta, name) for name in same)
    assert not (again.path / "build.json").exists() and not again.unfinished


def contents(path: Path) -> bytes:
    return path.read_bytes()
