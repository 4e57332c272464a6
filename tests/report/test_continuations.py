"""Test documents continued: what was chosen and why, against the model and the index themselves."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch

from knnext.corpus import Document, tokenize
from knnext.datastore import Datastore
from knnext.datastore.build import build_datastore
from knnext.evaluation.continuation import Continuation, continuations
from knnext.evaluation.influence import Influence
from knnext.index import ExactIndex
from knnext.lm.knnlm import KNNLM
from knnext.report.continuations import Move, Shown, continuations_section, in_words

pytest.importorskip("tokenizers")
pytest.importorskip("transformers")

TEXTS = {
    "short": "Tiny.",
    "docs/<b>one</b>.md": "A neighbor is a row of the datastore, and its token came next. " * 3,
    "two": "The window slides over the text, and every state is a key of the datastore. " * 3,
}


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    from knnext.lm.train import train_tokenizer

    return train_tokenizer([Document(n, t) for n, t in TEXTS.items()], vocab_size=300)


@pytest.fixture(scope="module")
def model(tokenizer: Any) -> Any:
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(vocab_size=len(tokenizer), n_positions=64, n_embd=16, n_layer=2, n_head=2)
    return GPT2LMHeadModel(config).eval()


@pytest.fixture(scope="module")
def text(tokenizer: Any) -> Any:
    return tokenize([Document(n, t) for n, t in TEXTS.items()], tokenizer)


@pytest.fixture(scope="module")
def store(
    tokenizer: Any, model: Any, text: Any, tmp_path_factory: pytest.TempPathFactory
) -> Datastore:
    path = tmp_path_factory.mktemp("continued") / "store"
    return build_datastore(model, tokenizer, text, path, key_dtype=torch.float32)


@pytest.fixture(scope="module")
def found(model: Any, tokenizer: Any, text: Any, store: Datastore) -> list[Continuation]:
    own = model.generation_config
    made = list(
        continuations(
            model,
            ExactIndex(store),
            tokenizer,
            text,
            k=4,
            temperature=0.01,
            lmbda=0.9,
            new_tokens=9,
        )
    )
    assert model.generation_config is own
    return made


def test_documents_are_the_first_of_enough_length(found: Any, text: Any) -> None:
    assert [one.document for one in found] == list(TEXTS)[1:]
    for one in found:
        number = text.names.index(one.document)
        first, last = text.document_offsets[number : number + 2]
        assert one.prompt == text.tokens[first:last].tolist()[-(64 - 9) :]


def test_each_token_is_the_likeliest_of_its_system(found: Any, model: Any, store: Any) -> None:
    mixed = KNNLM(model, ExactIndex(store), 4, 0.01, 0.9)
    differ = 0
    for one in found:
        for tokens, system in ((one.base, model), (one.mixed, mixed)):
            ids = torch.tensor([one.prompt + tokens])
            with torch.no_grad():
                logits = system(input_ids=ids).logits[0]
            assert logits[len(one.prompt) - 1 : -1].argmax(1).tolist() == tokens
        differ += one.base != one.mixed
    assert differ  # or nothing was tested


def test_influences_name_the_base_token_and_the_row(found: Any, model: Any, store: Any) -> None:
    for one in found:
        ids = torch.tensor([one.prompt + one.mixed])
        with torch.no_grad():
            log_p = model(input_ids=ids).logits[0].log_softmax(1)[len(one.prompt) - 1 : -1]
        for row, token, why in zip(log_p, one.mixed, one.influences, strict=True):
            assert why.base_token == int(row.argmax())
            assert why.p_lm == pytest.approx(float(row[token].exp()), rel=1e-4)
            assert (why.row >= 0) == (why.p_knn > 0)
            if why.row >= 0:
                assert int(store.values[why.row : why.row + 1]) == token


def test_words_mark_what_moved_and_escape_it(found: Any, store: Any, tokenizer: Any) -> None:
    shown = in_words(found, store, tokenizer)
    for one, ids in zip(shown, found, strict=True):
        assert one.prompt + "".join(one.mixed) == tokenizer.decode(
            (ids.prompt + ids.mixed)[-60 - 9 :]
        )
        moved = [
            number
            for number, (token, why) in enumerate(zip(ids.mixed, ids.influences, strict=True))
            if token != why.base_token
        ]
        assert [move.number for move in one.moves] == moved
        for move in one.moves:
            assert move.text == one.mixed[move.number] != move.instead
            if move.neighbor:
                assert move.neighbor[1] == tokenizer.decode([ids.mixed[move.number]])
    page = continuations_section(shown)
    assert "<b>one" not in page and "&lt;b&gt;one" in page
    pairs = re.findall(r'<div class="pair">.*?\n</div>', page, re.S)
    marks = sum(pair.count("<mark>") for pair in pairs)
    assert len(pairs) == 2 and marks == sum(len(one.moves) for one in shown) > 0


def test_long_prompts_and_small_chances_are_short() -> None:
    long = Shown("d", "\n".join(map(str, range(30))), False, "x", ["x"], [])
    page = continuations_section([long])
    assert "…22\n23" in page and "\n29</p>" in page and "21" not in page
    short = Shown("d", "one\ntwo", False, "x", ["x"], [])
    assert ">one\ntwo</p>" in continuations_section([short])
    move = Move(0, "\n\t<b>", " a", 1.23e-5, 0.25, None)
    page = continuations_section([Shown("d", "p", False, "x", ["y"], [move])])
    assert "<code>⏎⇥&lt;b&gt;</code>" in page and "<code>␣a</code>" in page
    assert "1.2·10⁻⁵ → 0.25" in page


def test_nothing_and_no_neighbor(store: Any, tokenizer: Any) -> None:
    assert continuations_section([]) == ""
    alone = Influence(0.5, 0.0, 0.5, [], base_token=3, row=-1)
    (one,) = in_words([Continuation("d", [1, 2], [3], [4], [alone])], store, tokenizer)
    assert one.moves[0].neighbor is None and not one.cut
    same = Shown("d", "p", False, "x", ["x"], [])
    page = continuations_section([same])
    assert "the same" in page and "<details>" not in page and "0 of 1 tokens" in page
