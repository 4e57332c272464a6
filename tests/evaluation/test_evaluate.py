"""Perplexity by its definitions, the bootstrap, the stored scores, and the pass that makes them."""

from __future__ import annotations

import json
import math
import zipfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from knnext.corpus import TokenizedDocuments
from knnext.datastore import Datastore
from knnext.evaluation import LITERATURE_FLOOR, evaluate, search_stream, write_token_log
from knnext.evaluation.scores import StreamScores, mix_log_probs
from knnext.index import ExactIndex

INF = float("inf")


def hand_scores() -> StreamScores:
    """Six targets in two documents, p_knn by hand at temperature 1 / ln 2.

    There exp(-distance / temperature) is 2^-distance, so all probabilities are fractions.
    """
    distances = torch.tensor(
        [[0, 1, 1, 2], [1, 1, 1, 1], [0, 0, 3, INF], [0, 1, INF, INF], [2, 2, 2, 2], [INF] * 4]
    )
    tokens = torch.tensor(
        [[5, 5, 6, 7], [1, 2, 3, 4], [8, 9, 9, -1], [3, 2, -1, -1], [4, 4, 4, 4], [-1] * 4]
    )
    return StreamScores(
        log_p_lm=torch.tensor([0.5, 0.25, 0.125, 0.5, 0.1, 0.2]).log(),
        targets=torch.tensor([5, 2, 9, 7, 4, 3]),
        document_ids=torch.tensor([0, 0, 0, 1, 1, 1]),
        ends_document=torch.tensor([False, False, True, False, False, False]),
        distances=distances.float(),
        tokens=tokens.to(torch.int32),
        indices=torch.where(tokens < 0, -1, tokens + 100),
        document_names=["a.txt", "b.txt"],
        num_words=torch.tensor([2, 1]),
        num_bytes=torch.tensor([10, 14]),
        seconds={"lm": 2.0, "search": 1.0},
    )


TEMPERATURE = 1 / math.log(2)
P_LM = np.array([0.5, 0.25, 0.125, 0.5, 0.1, 0.2])
P_KNN = np.array([1.5 / 2.25, 0.25, 1.125 / 2.125, 0.0, 1.0, 0.0])


def mixture(lmbda: float) -> np.ndarray:
    mixed = (1 - lmbda) * P_LM + lmbda * P_KNN
    mixed[5] = P_LM[5]  # no neighbors: the model alone
    return mixed


def test_log_p_knn_by_hand() -> None:
    found = hand_scores().log_p_knn(TEMPERATURE).exp().numpy()
    np.testing.assert_allclose(found, P_KNN, rtol=1e-6)


@pytest.mark.parametrize("lmbda", [0.0, 0.25, 0.9])
def test_perplexities_by_their_definitions(lmbda: float) -> None:
    result = evaluate(hand_scores(), TEMPERATURE, lmbda, knn_floor=LITERATURE_FLOOR)
    for system, p in (
        (result.base, P_LM),
        (result.mixture, mixture(lmbda)),
        (result.oracle, np.maximum(P_LM, P_KNN)),
    ):
        total = -np.log(p).sum()
        assert system.nll == pytest.approx(total / 6, rel=1e-6)
        assert system.token == pytest.approx(math.exp(total / 6), rel=1e-6)
        # three words and one mark between documents
        assert system.word == pytest.approx(math.exp(total / 4), rel=1e-6)
        assert system.bits_per_byte == pytest.approx(-np.log2(p).sum() / 24, rel=1e-6)
    assert result.knn.token == result.knn.nll == INF
    assert result.knn_floored is not None
    floored = -(np.log(P_KNN[P_KNN > 0]).sum() + 2 * LITERATURE_FLOOR) / 6
    assert result.knn_floored.nll == pytest.approx(floored)
    assert result.log_ppl_difference == pytest.approx(result.mixture.nll - result.base.nll)
    assert result.target_found == pytest.approx(4 / 6)
    assert (result.num_tokens, result.num_words, result.num_bytes) == (6, 4, 24)
    assert result.num_documents == 2 and result.k == 4


def test_kept_out_of_the_figures_without_counts() -> None:
    scores = hand_scores()
    scores.num_words = scores.num_bytes = torch.zeros(0, dtype=torch.int64)
    result = evaluate(scores, 1.0, 0.5)
    assert result.base.word is None and result.base.bits_per_byte is None
    assert result.num_words is None and result.num_bytes is None
    assert result.knn_floored is None


def test_weights_zero_and_one_are_the_systems_themselves() -> None:
    scores = hand_scores()
    assert torch.equal(scores.log_p(TEMPERATURE, 0), scores.log_p_lm.double())
    one = scores.log_p(TEMPERATURE, 1)
    assert torch.equal(one[:5], scores.log_p_knn(TEMPERATURE)[:5])
    assert one[5] == scores.log_p_lm[5]  # a row without neighbors stays with the model


def test_mixing_stays_in_log_space() -> None:
    """Probabilities far below the smallest double still mix to the right logarithm."""
    lm, knn = torch.tensor([-2000.0]).double(), torch.tensor([-3000.0]).double()
    assert float(mix_log_probs(lm, knn, 0.25)) == pytest.approx(-2000 + math.log(0.75))
    assert float(mix_log_probs(knn, lm, 0.25)) == pytest.approx(-2000 + math.log(0.25))
    none = torch.tensor([-INF]).double()
    assert float(mix_log_probs(lm, none, 0.25)) == pytest.approx(-2000 + math.log(0.75))


def test_token_weights_not_document_weights() -> None:
    """A long easy document and a short hard one: the mean is over tokens."""
    n_easy, n_hard = 90, 10
    p = torch.cat([torch.full((n_easy,), 0.5), torch.full((n_hard,), 0.01)])
    scores = StreamScores(
        log_p_lm=p.log(),
        targets=torch.zeros(100, dtype=torch.int64),
        document_ids=torch.arange(100) // n_easy,
        ends_document=torch.zeros(100, dtype=torch.bool),
        distances=torch.zeros(100, 1),
        tokens=torch.zeros(100, 1, dtype=torch.int32),
    )
    want = math.exp(-(n_easy * math.log(0.5) + n_hard * math.log(0.01)) / 100)
    assert evaluate(scores, 1.0, 0.0).base.token == pytest.approx(want, rel=1e-6)


def test_bad_arguments() -> None:
    scores = hand_scores()
    for temperature, lmbda, word in ((0, 0.5, "temperature"), (INF, 0.5, "temperature"),
                                     (1, -0.1, "lmbda"), (1, 1.5, "lmbda")):  # fmt: skip
        with pytest.raises(ValueError, match=word):
            evaluate(scores, temperature, lmbda)
    with pytest.raises(ValueError, match="targets must have 6 rows"):
        StreamScores(**{**vars(scores), "targets": torch.zeros(5)})
    with pytest.raises(ValueError, match="one shape"):
        StreamScores(**{**vars(scores), "tokens": torch.zeros(6, 3)})


def test_truncating_k_is_searching_for_less() -> None:
    scores = hand_scores().truncate(2)
    assert scores.k == 2 and scores.distances.shape == (6, 2)
    found = scores.log_p_knn(TEMPERATURE).exp()
    assert float(found[0]) == pytest.approx(1.0) and float(found[2]) == pytest.approx(0.5)
    with pytest.raises(ValueError, match="from 1 to the 4"):
        hand_scores().truncate(5)


def test_as_json() -> None:
    result = evaluate(hand_scores(), TEMPERATURE, 0.25)
    text = json.dumps(result.to_dict(), allow_nan=False)
    assert json.loads(text)["knn"]["token"] is None
    assert json.loads(text)["mixture"]["token"] == result.mixture.token
    assert result.tokens_per_second["lm"] == 3.0
    total = sum(result.seconds.values())
    assert result.tokens_per_second["total"] == pytest.approx(6 / total)


def test_intervals_of_an_evaluation() -> None:
    """The interval of the difference is narrow where the gain is even, however hard the texts."""
    generator = torch.Generator().manual_seed(0)
    documents, length = 60, 40
    hardness = torch.rand(documents, generator=generator).repeat_interleave(length) * 8 + 0.5
    n = documents * length
    scores = StreamScores(
        log_p_lm=-hardness,
        targets=torch.zeros(n, dtype=torch.int64),
        document_ids=torch.arange(n) // length,
        ends_document=torch.zeros(n, dtype=torch.bool),
        distances=torch.zeros(n, 2),
        tokens=torch.ones(n, 2, dtype=torch.int32),  # never the target: a loss of log(1 - lmbda)
    )
    result = evaluate(scores, 1.0, 0.5)
    low, high = result.difference_interval.low, result.difference_interval.high
    assert low == pytest.approx(math.log(2)) and high == pytest.approx(math.log(2))
    base = result.base.interval
    assert base.low < result.base.token < base.high
    assert math.log(base.high / base.low) > 0.5
    assert math.isnan(result.knn.interval.low)  # infinite perplexity has no interval
    again = evaluate(scores, 1.0, 0.5)
    assert again.base.interval == base


def test_one_document_has_no_interval() -> None:
    scores = hand_scores()
    scores.document_ids = torch.zeros(6, dtype=torch.int64)
    result = evaluate(scores, 1.0, 0.5)
    assert math.isnan(result.difference_interval.low) and math.isnan(result.base.interval.high)
    assert result.to_dict()["difference_interval"]["low"] is None


# Files


def test_scores_survive_a_file(tmp_path: Path) -> None:
    scores = hand_scores()
    scores.save(tmp_path / "scores.npz")
    loaded = StreamScores.load(tmp_path / "scores.npz")
    for name, value in vars(scores).items():
        other = getattr(loaded, name)
        if isinstance(value, Tensor):
            assert value.dtype == other.dtype and torch.equal(value, other), name
        else:
            assert value == other, name
    assert [p.name for p in tmp_path.iterdir()] == ["scores.npz"]
    scores.indices = None
    scores.save(tmp_path / "scores.npz")
    assert StreamScores.load(tmp_path / "scores.npz").indices is None


def test_nothing_is_unpickled(tmp_path: Path) -> None:
    hand_scores().save(tmp_path / "good.npz")
    with zipfile.ZipFile(tmp_path / "good.npz") as archive:
        for name in archive.namelist():
            assert b"'|O'" not in archive.read(name)[:200], name
    np.savez(tmp_path / "evil.npz", header=np.array([{"a": 1}], dtype=object))
    np.savez(tmp_path / "other.npz", a=np.zeros(3))
    (tmp_path / "noise.npz").write_bytes(b"not a zip")
    for name in ("evil.npz", "other.npz", "noise.npz"):
        with pytest.raises(ValueError, match="does not hold scores"):
            StreamScores.load(tmp_path / name)
    with pytest.raises(FileNotFoundError):
        StreamScores.load(tmp_path / "none.npz")


def test_a_later_version_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr("knnext.evaluation.scores.FORMAT_VERSION", 2)
        hand_scores().save(tmp_path / "scores.npz")
    with pytest.raises(ValueError, match="format version 2"):
        StreamScores.load(tmp_path / "scores.npz")


@pytest.mark.parametrize("ending", [".jsonl", ".parquet"])
def test_token_log(tmp_path: Path, ending: str) -> None:
    path = write_token_log(hand_scores(), tmp_path / f"log{ending}", TEMPERATURE, 0.25)
    if ending == ".parquet":
        pq = pytest.importorskip("pyarrow.parquet")
        rows = pq.read_table(path).to_pylist()
    else:
        rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert [row["position"] for row in rows] == [1, 2, 3, 4, 5, 6]
    assert [row["document"] for row in rows] == ["a.txt"] * 3 + ["b.txt"] * 3
    assert [row["token"] for row in rows] == [5, 2, 9, 7, 4, 3]
    np.testing.assert_allclose([row["log_p_lm"] for row in rows], np.log(P_LM), rtol=1e-6)
    np.testing.assert_allclose([row["log_p"] for row in rows], np.log(mixture(0.25)), rtol=1e-6)
    for row, p in zip(rows, P_KNN, strict=True):
        if p > 0:
            assert row["log_p_knn"] == pytest.approx(math.log(p), rel=1e-5, abs=1e-6)
        else:
            assert row["log_p_knn"] == (None if ending == ".jsonl" else -INF)
    with pytest.raises(ValueError, match=r"\.parquet or \.jsonl"):
        write_token_log(hand_scores(), tmp_path / "log.csv", 1.0, 0.5)


@pytest.mark.parametrize("ending", [".jsonl", ".parquet"])
def test_token_log_joins_columns(tmp_path: Path, ending: str) -> None:
    path, novelty = tmp_path / f"log{ending}", torch.arange(6)
    write_token_log(hand_scores(), path, TEMPERATURE, 0.25, {"novelty": novelty})
    if ending == ".parquet":
        rows = pytest.importorskip("pyarrow.parquet").read_table(path).to_pylist()
    else:
        rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert [row["novelty"] for row in rows] == [0, 1, 2, 3, 4, 5]
    assert [row["token"] for row in rows] == [5, 2, 9, 7, 4, 3]
    with pytest.raises(ValueError, match="one value a target"):
        write_token_log(hand_scores(), path, TEMPERATURE, 0.25, {"novelty": novelty[:5]})
    with pytest.raises(ValueError, match="must not be named"):
        write_token_log(hand_scores(), path, TEMPERATURE, 0.25, {"log_p": novelty})


# One pass over a text


@dataclass
class Text:
    model: torch.nn.Module
    tokenized: TokenizedDocuments
    store: Datastore


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Text:
    """A random two-layer GPT-2, four documents (one of them empty), and a datastore of noise."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=40,
        n_positions=32,
        n_embd=16,
        n_layer=2,
        n_head=2,
        bos_token_id=0,
        eos_token_id=0,
    )
    tokens = np.random.default_rng(0).integers(1, 40, size=100).astype(np.int32)
    offsets = np.array([0, 30, 31, 70, 100])
    tokens[offsets[:-1]] = 0
    tokenized = TokenizedDocuments(
        tokens, offsets, ["a", "empty", "b", "c"], np.array([9, 0, 9, 9]), np.array([99, 0, 9, 9])
    )
    path = tmp_path_factory.mktemp("text") / "ds"
    with Datastore.create(path, 16, torch.float16, key_layer="att", vocab_size=40) as store:
        store.append(torch.randn(500, 16), torch.randint(0, 40, (500,)), [("x", 200), ("y", 300)])
    return Text(transformers.GPT2LMHeadModel(config).eval(), tokenized, Datastore.open(path))


def test_search_stream_is_the_model_and_the_search(text: Text) -> None:
    from knnext.lm.hidden_states import hidden_states

    index = ExactIndex(text.store)
    scores = search_stream(text.model, index, text.tokenized, k=20, query_batch=7)
    assert scores.num_tokens == 99 and scores.k == 20
    states = list(hidden_states(text.model, text.tokenized.tokens, with_log_p_lm=True))
    keys = torch.cat([batch.keys for batch in states])
    distances, indices = index.search(keys, 20)
    assert torch.equal(scores.indices, indices) and torch.equal(scores.distances, distances)
    assert torch.equal(scores.tokens, text.store.values[:][indices])
    assert torch.equal(scores.log_p_lm, torch.cat([b.log_p_lm for b in states]))
    assert scores.targets.tolist() == text.tokenized.tokens[1:].tolist()
    assert scores.document_ids.tolist() == [0] * 30 + [1] + [2] * 39 + [3] * 29
    # Targets 30, 31 and 70 are the marks that begin the next document.
    assert scores.ends_document.nonzero().ravel().tolist() == [29, 30, 69]
    assert scores.num_words.tolist() == [9, 0, 9, 9]
    assert set(scores.seconds) == {"lm", "search"} and min(scores.seconds.values()) > 0
    result = evaluate(scores, 1.0, 0.3)
    assert result.num_words == 27 + 3 and result.num_documents == 4


def test_several_indexes_share_one_pass(text: Text, monkeypatch: pytest.MonkeyPatch) -> None:
    import knnext.lm.hidden_states as module

    passes = []
    real = module.hidden_states
    monkeypatch.setattr(module, "hidden_states", lambda *a, **k: passes.append(1) or real(*a, **k))
    indexes = {"l2": ExactIndex(text.store), "ip": ExactIndex(text.store, metric="ip")}
    both = search_stream(text.model, indexes, text.tokenized, k=5, keep_indices=False)
    assert list(both) == ["l2", "ip"] and len(passes) == 1
    assert both["l2"].log_p_lm is both["ip"].log_p_lm
    assert both["l2"].indices is None
    assert not torch.equal(both["l2"].distances, both["ip"].distances)
    assert both["l2"].seconds["search"] != both["ip"].seconds["search"]


def test_documents_can_be_excluded(text: Text) -> None:
    index = ExactIndex(text.store)
    scores = search_stream(text.model, index, text.tokenized, k=9, exclude_documents=[1])
    assert int(scores.indices.max()) < 200
    banned = torch.arange(99) % 2
    scores = search_stream(
        text.model, index, text.tokenized, k=9, query_batch=10, exclude_documents=banned
    )
    assert (text.store.document_of(scores.indices) != banned[:, None]).all()


def test_wrong_layers_and_empty_texts(text: Text, tmp_path: Path) -> None:
    index = ExactIndex(text.store)
    with pytest.raises(ValueError, match="key_layer is 'ffn', but"):
        search_stream(text.model, index, text.tokenized, key_layer="ffn")
    with pytest.raises(ValueError, match="at least one index"):
        search_stream(text.model, {}, text.tokenized)
    with Datastore.create(tmp_path / "ffn", 16, torch.float16, key_layer="ffn") as store:
        store.append(torch.randn(5, 16), torch.zeros(5, dtype=torch.int64))
    other = ExactIndex(Datastore.open(tmp_path / "ffn"))
    with pytest.raises(ValueError, match="must share key_layer"):
        search_stream(text.model, {"a": index, "b": other}, text.tokenized)
    one = TokenizedDocuments(
        np.zeros(1, np.int32), np.array([0, 1]), ["a"], np.array([1]), np.array([1])
    )
    with pytest.raises(ValueError, match="fewer than two tokens"):
        search_stream(text.model, index, one)
