"""From model and text to a datastore: the rows, their documents, and going on after a stop."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from knnext.corpus import Document, TokenizedDocuments
from knnext.datastore import DatastoreError, IncompatibleDatastoreError, build_job
from knnext.datastore.build import build_datastore
from knnext.lm.hidden_states import hidden_states
from knnext.lm.load import model_identity, tokenizer_hash
from knnext.lm.train import train_tokenizer
from tests.lm.tiny_models import VOCAB, random_tokens, tiny

LENGTHS = [40, 7, 90, 3, 60]
WINDOWS: dict[str, Any] = {"block_size": 16, "stride": 8, "batch_size": 2}


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return train_tokenizer([Document("a", "some text to learn from\n" * 9)], vocab_size=260)


@pytest.fixture(scope="module")
def text() -> TokenizedDocuments:
    tokens = random_tokens(sum(LENGTHS)).numpy().astype(np.int32)
    offsets = np.cumsum([0, *LENGTHS])
    tokens[offsets[:-1]] = 1
    names = [f"doc {i}" for i in range(len(LENGTHS))]
    return TokenizedDocuments(tokens, offsets, names, np.ones(5, int), np.ones(5, int))


def test_rows_are_the_stream(tokenizer: Any, text: TokenizedDocuments, tmp_path: Path) -> None:
    model = tiny("gpt2")
    store = build_datastore(model, tokenizer, text, tmp_path / "store", corpus="five", **WINDOWS)
    batches = list(hidden_states(model, text.tokens, **WINDOWS))
    assert len(store) == len(text) - 1
    assert torch.equal(store.keys[0 : len(store)], torch.cat([b.keys for b in batches]))
    assert store.values[0 : len(store)].tolist() == text.tokens[1:].tolist()
    assert (store.dim, store.dtype, store.key_layer) == (32, torch.float16, "att")
    assert (store.vocab_size, store.meta.corpus) == (VOCAB, "five")
    assert store.meta.tokenizer_hash == tokenizer_hash(tokenizer)
    assert (store.meta.model_id, store.meta.model_revision) == model_identity(model)


def test_a_row_belongs_to_the_document_of_its_target(
    tokenizer: Any, text: TokenizedDocuments, tmp_path: Path
) -> None:
    store = build_datastore(tiny("gpt2"), tokenizer, text, tmp_path / "store", **WINDOWS)
    assert list(store.document_names) == text.names
    rows = torch.arange(len(store))
    assert store.document_of(rows).tolist() == text.document_of(rows.numpy() + 1).tolist()
    # the separator that opens a document is that document's, though its state is the one before
    first = store.document_offsets[1:-1]
    assert (store.values[0 : len(store)][first] == 1).all()


def files(folder: Path) -> dict[str, bytes]:
    return {
        p.name: p.read_bytes() for p in folder.rglob("*") if p.suffix != ".json" and p.is_file()
    }


@pytest.mark.parametrize("stop", [1, 2, 5, 11])
def test_a_stopped_build_goes_on_to_the_same_bytes(
    tokenizer: Any, text: TokenizedDocuments, tmp_path: Path, stop: int, monkeypatch: Any
) -> None:
    model = tiny("gpt2")
    build_datastore(model, tokenizer, text, tmp_path / "whole", **WINDOWS)

    def breaking(*args: Any, **kwargs: Any) -> Iterator[Any]:
        for i, batch in enumerate(hidden_states(*args, **kwargs)):
            if i == stop:
                raise KeyboardInterrupt
            yield batch

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(build_job, "hidden_states", breaking)
        build_datastore(model, tokenizer, text, tmp_path / "broken", **WINDOWS)
    again = build_datastore(model, tokenizer, text, tmp_path / "broken", **WINDOWS)
    assert len(again) == len(text) - 1
    assert files(tmp_path / "broken") == files(tmp_path / "whole")


def test_a_finished_build_is_opened_as_it_is(
    tokenizer: Any, text: TokenizedDocuments, tmp_path: Path
) -> None:
    model = tiny("gpt2")
    build_datastore(model, tokenizer, text, tmp_path / "store", **WINDOWS)
    before = files(tmp_path / "store")
    again = build_datastore(model, tokenizer, text, tmp_path / "store", **WINDOWS)
    assert len(again) == len(text) - 1 and list(again.document_names) == text.names
    assert files(tmp_path / "store") == before
    with pytest.raises(DatastoreError):
        build_datastore(model, tokenizer, text, tmp_path / "store", resume=False, **WINDOWS)


def test_another_build_is_refused(tokenizer: Any, text: TokenizedDocuments, tmp_path: Path) -> None:
    model, other = tiny("gpt2"), copy.deepcopy(tiny("gpt2"))
    with torch.no_grad():
        other.transformer.h[0].mlp.c_fc.weight.add_(1e-3)
    build_datastore(model, tokenizer, text, tmp_path / "store", **WINDOWS)
    changed = copy.deepcopy(text)
    changed.tokens[5] = 9
    for arguments, options in (
        ((other, tokenizer, text), WINDOWS),
        ((model, tokenizer, changed), WINDOWS),
        ((model, tokenizer, text), {**WINDOWS, "stride": 4}),
        ((model, tokenizer, text), {**WINDOWS, "key_layer": "ffn"}),
        ((model, train_tokenizer([Document("b", "zzz")], 258), text), WINDOWS),
    ):
        with pytest.raises(IncompatibleDatastoreError):
            build_datastore(*arguments, tmp_path / "store", **options)


def test_identity_is_of_weights_and_not_of_paths(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    tiny("gpt2").save_pretrained(tmp_path / "a")
    moved = AutoModelForCausalLM.from_pretrained(tmp_path / "a", trust_remote_code=False)
    assert model_identity(moved) == model_identity(tiny("gpt2"))
    assert model_identity(tiny("llama")) != model_identity(tiny("mistral"))


def test_a_slow_tokenizer_has_no_hash() -> None:
    with pytest.raises(TypeError, match="fast"):
        tokenizer_hash(object())
