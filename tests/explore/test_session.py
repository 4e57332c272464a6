"""What the page is told agrees with what the rest of knnext finds for the same text."""

from __future__ import annotations

import base64
import math
import re
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from knnext.explore.session import Limit, TooLong
from tests.explore.small import CONTEXT, LMBDA, TEMPERATURE, TEXT, K, open_session

LONG = Limit(600)


def array(text: str, kind: str) -> np.ndarray:
    return np.frombuffer(base64.b64decode(text), dtype=kind)


class Told:
    """What a browser is sent, mixed here as passages.js does it."""

    def __init__(self, raw: dict[str, Any]) -> None:
        self.raw, self.k = raw, raw["k"]
        self.distances = array(raw["distances"], "<f4").reshape(-1, self.k).astype(np.float64)
        self.places = array(raw["places"], "<u2").reshape(-1, self.k)
        self.starts, self.ids = array(raw["starts"], "<i4"), array(raw["ids"], "<i4")
        self.log_p, self.targets = array(raw["log_p"], "<f4"), array(raw["target_places"], "<u2")

    def mixture(self, i: int, temperature: float, lmbda: float, k: int) -> np.ndarray:
        """p of each candidate."""
        lm = np.exp(self.log_p[self.starts[i] : self.starts[i + 1]].astype(np.float64))
        knn = np.zeros(len(lm))
        kept = self.places[i, :k] != 0xFFFF
        near = self.distances[i, :k][kept]
        weights = np.exp((near[:1] - near) / temperature)
        np.add.at(knn, self.places[i, :k][kept], weights)
        return (1 - lmbda) * lm + lmbda * knn / weights.sum() if kept.any() else lm

    def perplexity(self, *setting: Any) -> float:
        p = [self.mixture(i, *setting)[self.targets[i]] for i in range(len(self.targets))]
        return float(np.exp(-np.log(p).mean()))


def scored(session: Any, text: str, k: int) -> Any:
    from knnext.corpus import Document, tokenize
    from knnext.evaluation import search_stream

    stream = tokenize([Document("t", text)], session.tokenizer)
    return search_stream(session.model, session.index, stream, k=k, allow_overlap=True)


@pytest.mark.parametrize("text", [TEXT, "fox", TEXT * 3])  # in one window, of one token, in several
@pytest.mark.parametrize("setting", [(0.05, 0.4, 16), (1.0, 0.9, 3), (0.001, 0.1, 1), (3.0, 0, 16)])
def test_reading_gives_the_perplexity_of_an_evaluation(
    session: Any, text: str, setting: tuple[float, float, int]
) -> None:
    from knnext.evaluation import evaluate

    raw = session.read(text, LONG)
    scores = scored(session, text, K)
    temperature, lmbda, k = setting
    wanted = evaluate(scores.truncate(k), temperature, lmbda)
    assert Told(raw).perplexity(*setting) == pytest.approx(wanted.mixture.token, rel=1e-5)
    assert "".join(raw["texts"]) == text
    assert [len(rows) for rows in raw["rows"]] == [K] * scores.num_tokens
    assert raw["rows"] == scores.indices.tolist()


def test_candidates_hold_the_likeliest_of_the_mixture(session: Any) -> None:
    from knnext.corpus import separator_token
    from knnext.lm.knnlm import KNNLM

    told = Told(session.read(TEXT[:60], LONG))
    ids = session.tokenizer(TEXT[:60], add_special_tokens=False)["input_ids"]
    read = torch.tensor([[separator_token(session.tokenizer), *ids[:-1]]])
    with torch.no_grad():
        mixed = KNNLM(session.model, session.index, K, TEMPERATURE, LMBDA)(read).logits[0]
    for i, line in enumerate(mixed.double().exp()):
        p = told.mixture(i, TEMPERATURE, LMBDA, K)
        best = int(np.argmax(p))
        assert p[best] == pytest.approx(float(line.max()), rel=1e-4)
        name = told.raw["vocab"][told.ids[told.starts[i] + best]]
        assert name == session.tokenizer.decode([int(line.argmax())])


def test_a_text_past_the_limit_is_cut_and_told(folder: Path) -> None:
    raw = open_session(folder, max_tokens=10).read(TEXT, LONG)
    assert len(raw["texts"]) == 10 and raw["cut"] == [False, True]
    assert "tokens more" in raw["note"]


def test_a_large_k_shortens_what_is_read(folder: Path) -> None:
    session = open_session(folder, k=10**9, max_tokens=10**9)
    assert session.k == session.store.num_entries  # no more than there are
    assert session.max_tokens * session.k <= 2 << 20


@pytest.mark.parametrize("text", ["", "\n", " "])
def test_a_text_of_nothing(session: Any, text: str) -> None:
    if session.tokenizer(text, add_special_tokens=False)["input_ids"]:
        assert len(session.read(text, LONG)["texts"]) >= 1
    else:
        with pytest.raises(ValueError, match="no tokens"):
            session.read(text, LONG)


def test_what_takes_too_long_is_given_up(session: Any) -> None:
    for work in (
        lambda limit: session.read(TEXT, limit),
        lambda limit: session.nearest(TEXT, 4, limit),
        lambda limit: session.occurrences(TEXT, 4, limit),
        lambda limit: session.write(TEXT, tokens=2, temperature=1, lmbda=0.5, k=4).step(limit),
    ):
        with pytest.raises(TooLong, match="given up"):
            work(Limit(0.0))
        cancelled = Limit(600)
        cancelled.cancelled = True
        with pytest.raises(TooLong):
            work(cancelled)


def continued(model: Any, ids: list[int], count: int) -> list[int]:
    given = torch.tensor([ids])
    options = {"do_sample": False, "num_beams": 1, "max_new_tokens": count}
    out = model.generate(given, attention_mask=torch.ones_like(given), **options)
    return out[0, len(ids) :].tolist()


@pytest.mark.parametrize("k", [K, 3])
def test_writing_is_what_generate_writes(session: Any, k: int) -> None:
    from knnext.evaluation.prompt import read_prompt
    from knnext.lm.knnlm import KNNLM

    writing = session.write(TEXT[:40], tokens=6, temperature=TEMPERATURE, lmbda=LMBDA, k=k)
    steps: list[dict[str, Any]] = []
    while not writing.done:
        steps += writing.step(LONG)
    ids = read_prompt(TEXT[:40], session.tokenizer, session.store, CONTEXT - 6).ids
    mixed = KNNLM(session.model, session.index, k, TEMPERATURE, LMBDA)
    for side, model in (("mixture", mixed), ("base", session.model)):
        own = [step for step in steps if step["side"] == side]
        wanted = continued(model, ids, 6)
        assert writing.writers[side].ids[len(ids) :] == wanted
        assert len(own) == len(wanted)
        for step in own:  # and each can be explained
            told = Told(step)
            kind = (TEMPERATURE, LMBDA if side == "mixture" else 0.0, k)
            assert int(np.argmax(told.mixture(0, *kind))) == told.targets[0]


def test_drawing_is_by_seed(session: Any) -> None:
    def drawn(seed: int) -> list[int]:
        options = {"tokens": 5, "temperature": 0.05, "lmbda": 0.4, "k": K, "draw": True}
        writing = session.write(TEXT[:20], **options, seed=seed)
        while not writing.done:
            writing.step(LONG)
        return writing.writers["mixture"].ids

    assert drawn(1) == drawn(1) != drawn(2)


def test_the_nearest_are_those_of_the_command(session: Any, folder: Path) -> None:
    from knnext.evaluation.prompt import read_prompt
    from knnext.lm.hidden_states import capture_hidden_states

    found = session.nearest(TEXT[:30], 5, LONG)["neighbors"]
    ids = read_prompt(TEXT[:30], session.tokenizer, session.store, CONTEXT).ids
    with torch.no_grad(), capture_hidden_states(session.model, "att") as captured:
        session.model(input_ids=torch.tensor([ids]))
    query = captured.states(1)[:, -1].to(session.store.dtype)
    distances, rows = session.index.search(query, K)
    assert [one["row"] for one in found] == rows[0, :5].tolist()
    shares = torch.softmax(-distances[0] / TEMPERATURE, 0)
    assert [one["share"] for one in found] == pytest.approx(shares[:5].tolist(), rel=1e-4)


def test_occurrences_are_all_there_are(session: Any) -> None:
    store, tokenizer = session.store, session.tokenizer
    values = store.values[0 : store.num_entries].tolist()
    words = tokenizer.decode(values[20:23])
    spellings = session._spellings(words)
    wanted = {
        row
        for ids in spellings
        for row in range(len(values))
        if values[row : row + len(ids)] == ids
    }
    found = session.occurrences(words, 32, LONG)
    assert found["total"] == len(wanted) > 0
    assert {one["row"] for one in found["occurrences"]} <= wanted
    assert session.occurrences("zzzz qqqq zzzz", 32, LONG)["total"] == 0


@pytest.mark.parametrize("form", ["fox ", " fox", "fox\n", "  fox\t "])
def test_spaces_around_a_text_do_not_count(session: Any, form: str) -> None:
    """And no place is counted twice, though one spelling begins as another does."""
    plain, found = (session.occurrences(text, 32, LONG) for text in ("fox", form))
    assert found["total"] == plain["total"] > 3
    rows = [one["row"] for one in found["occurrences"]]
    assert len(set(rows)) == len(rows)


def test_a_text_of_spaces_is_taken_as_it_is(session: Any) -> None:
    for text in (" ", "\n"):
        (ids,) = session._spellings(text)
        assert session.tokenizer.decode(ids) == text


def test_more_neighbors_than_a_browser_is_told_of(session: Any, folder: Path) -> None:
    from knnext.explore import session as module

    assert module._MOST_K < 0xFFFF - 21
    with pytest.MonkeyPatch.context() as patch, pytest.raises(ValueError, match="see --k"):
        patch.setattr(module, "_MOST_K", 3)
        open_session(folder, k=4)


@pytest.mark.parametrize(
    ("text", "tokens", "words"),
    [
        ("fox", 3, ""),
        ("fox", 40, "at most 16 are written"),
        (TEXT * 3, 3, "its end was read"),
        (TEXT * 3, 40, "its end was read.* at most 16 are written"),
    ],
)
def test_what_writing_leaves_out_is_told(session: Any, text: str, tokens: int, words: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        writing = session.write(text, tokens=tokens, temperature=1, lmbda=0.5, k=4)
    assert re.search(words, writing.note) and bool(writing.note) == bool(words)
    assert writing.left["mixture"] == min(tokens, CONTEXT // 2)


def test_occurrences_do_not_stop_at_the_parts_that_are_read(
    session: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from knnext.explore import session as module

    whole = session.occurrences("fox", 32, LONG)["total"]
    long = session.occurrences("fox jumps", 32, LONG)["total"]
    for rows in (1, 2, 7):
        monkeypatch.setattr(module, "_ROWS_AT_ONCE", rows)
        assert session.occurrences("fox", 32, LONG)["total"] == whole
        assert session.occurrences("fox jumps", 32, LONG)["total"] == long


@pytest.mark.parametrize("rows", [[-1], [10**9], list(range(65))])
def test_rows_that_are_not_there(session: Any, rows: list[int]) -> None:
    with pytest.raises(ValueError, match="rows must"):
        session.spans(rows)


def test_no_neighbor_has_a_place(session: Any) -> None:
    """Padding, as an index gives it where it finds too few."""
    from knnext.explore.figures import Figures

    one = Figures(
        torch.tensor([5]),
        torch.tensor([[math.inf, math.inf]]),
        torch.tensor([[-1, -1]], dtype=torch.int32),
        torch.tensor([[-1, -1]]),
        [torch.tensor([3, 5])],
        [torch.tensor([-0.5, -1.0])],
    )
    raw = one.plain(session.tokenizer, ["x"], torch.zeros(1, dtype=torch.int64))
    assert raw["rows"] == [[]] and array(raw["places"], "<u2").tolist() == [0xFFFF] * 2
    assert Told(raw).perplexity(1.0, 0.5, 2) == pytest.approx(math.e)
