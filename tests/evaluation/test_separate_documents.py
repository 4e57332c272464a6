"""Scores of documents one by one: which tokens, which words, and what is said where."""

from __future__ import annotations

import json
import re
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from knnext.corpus import TokenizedDocuments
from knnext.corpus.tokenized import WORDS
from knnext.datastore import Datastore
from knnext.evaluation import evaluate, search_stream, write_token_log
from knnext.evaluation.scores import StreamScores
from knnext.evaluation.tune import tune
from knnext.index import ExactIndex
from tests.evaluation.noise import NoiseIndex, text_of, tiny_gpt2

LENGTHS = (30, 1, 39, 2, 28)
OWN = sum(length - 1 for length in LENGTHS)


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny_gpt2()


def score(model: Any, **options: Any) -> StreamScores:
    text = options.pop("text", text_of(*LENGTHS))
    return search_stream(model, NoiseIndex(), text, k=4, allow_overlap=True, **options)


def test_each_document_is_scored_as_if_it_were_alone(model: Any) -> None:
    text = text_of(*LENGTHS)
    apart = score(model, text=text, separate_documents=True)
    assert apart.num_tokens == OWN
    bounds = text.document_offsets
    parts = []
    for first, last in pairwise(bounds):
        if last - first < 2:
            continue
        zero = np.zeros(1, np.int64)
        own = TokenizedDocuments(
            text.tokens[first:last], np.array([0, last - first]), ["a"], zero, zero
        )
        parts.append(score(model, text=own))
    wanted = torch.cat([part.log_p_lm for part in parts])
    torch.testing.assert_close(apart.log_p_lm, wanted, atol=1e-5, rtol=1e-5)
    assert torch.equal(apart.targets, torch.cat([part.targets for part in parts]))
    assert (text.tokens[apart.positions.numpy()] == apart.targets.numpy()).all()
    assert not apart.ends_document.any() and apart.num_words.sum() == OWN
    ids = np.repeat(range(len(LENGTHS)), [length - 1 for length in LENGTHS])
    assert apart.document_ids.tolist() == ids.tolist()
    across = score(model, text=text)
    assert across.num_tokens == len(text) - 1 and across.positions is None
    assert not torch.equal(across.log_p_lm[apart.positions - 1], apart.log_p_lm)
    # the first document has nothing before it in either way
    torch.testing.assert_close(across.log_p_lm[:29], apart.log_p_lm[:29])


def test_words_are_those_of_the_documents(model: Any) -> None:
    result = evaluate(score(model, separate_documents=True), 1.0, 0.2)
    assert result.num_words == OWN and result.num_tokens == OWN
    assert result.base.word == pytest.approx(result.base.token)
    across = evaluate(score(model), 1.0, 0.2)
    assert across.num_words == OWN + len(LENGTHS) - 1  # and the marks


@pytest.mark.parametrize(
    ("text", "counts"),
    [
        ("", (0, 0, 1)),
        ("two words", (2, 2, 2)),
        (" = Title = \n\n A b \n", (5, 8, 7)),
        ("a\tb\u00a0c\n", (3, 4, 4)),
    ],
)
def test_three_ways_to_count_words(text: str, counts: tuple[int, int, int]) -> None:
    found = tuple(WORDS[name](text) for name in ("marks", "wikitext", "harness"))
    assert found == counts
    assert found[2] == len(re.split(r"\s+", text))


def test_marks_are_words_by_the_usual_count_alone(model: Any, tmp_path: Path) -> None:
    text = text_of(*LENGTHS)
    text.words = "harness"
    scores = score(model, text=text)
    scores.save(tmp_path / "scores.npz")
    for one in (scores, StreamScores.load(tmp_path / "scores.npz")):
        assert one.words == "harness" and evaluate(one, 1.0, 0.2).num_words == OWN


def test_positions_are_kept_and_logged(model: Any, tmp_path: Path) -> None:
    scores = score(model, separate_documents=True)
    scores.save(tmp_path / "scores.npz")
    loaded = StreamScores.load(tmp_path / "scores.npz")
    assert torch.equal(loaded.positions, scores.positions)
    write_token_log(loaded, tmp_path / "log.jsonl", 1.0, 0.3)
    rows = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [row["position"] for row in rows] == scores.positions.tolist()
    assert rows[29]["document"] == "d2"
    tune(loaded, [1.0], [0.1, 0.2])


def test_pieces_and_excluded_documents_go_by_what_is_scored(model: Any, tmp_path: Path) -> None:
    with Datastore.create(tmp_path / "ds", 16, torch.float16, key_layer="att") as store:
        store.append(torch.randn(90, 16), torch.randint(0, 40, (90,)), [("x", 40), ("y", 50)])
    index = ExactIndex(Datastore.open(tmp_path / "ds"))
    banned = torch.arange(OWN) % 3 - 1
    options = {"k": 7, "separate_documents": True, "exclude_documents": banned}
    one = search_stream(model, index, text_of(*LENGTHS), **options)
    cut = search_stream(model, index, text_of(*LENGTHS), query_batch=9, batch_size=1, **options)
    assert torch.equal(one.indices, cut.indices) and torch.equal(one.targets, cut.targets)
    found = index.datastore.document_of(one.indices)
    assert (found != banned[:, None]).all()


def test_as_the_datastore_was_built(model: Any) -> None:
    index = NoiseIndex()
    index.datastore.meta.origin = {"separate_documents": True}
    scores = search_stream(model, index, text_of(*LENGTHS), k=4, allow_overlap=True)
    assert scores.num_tokens == OWN
    other = NoiseIndex()
    other.datastore.fingerprint = "other"
    with pytest.raises(ValueError, match="built with different separate_documents"):
        search_stream(model, {"a": index, "b": other}, text_of(*LENGTHS), k=4, allow_overlap=True)


def test_documents_without_a_token(model: Any) -> None:
    with pytest.raises(ValueError, match="no document with a token"):
        score(model, text=text_of(1, 1, 1), separate_documents=True)
