"""Where an implementer of these experiments goes wrong: signs, metrics, -1 ids, ties, what a fit
may see. Each case shows the wrong figure beside the right one, so that a slip cannot pass."""

from __future__ import annotations

import math

import pytest
import torch

from knnext.datastore import Datastore
from knnext.evaluation.perplexity import TextCounts
from knnext.evaluation.scores import StreamScores
from knnext.experiments.lab.contrast import fit_component
from knnext.experiments.lab.family import Setting
from knnext.experiments.lab.mixture import Split
from knnext.experiments.lab.recall import recall
from knnext.experiments.lab.searches import search, tokens_of
from knnext.index import FaissIndex

DIM, ROWS, K = 8, 2000, 32


def make_store(path, metric="l2", seed=0, rows=ROWS):
    generator = torch.Generator().manual_seed(seed)
    with Datastore.create(path, DIM, metric=metric, vocab_size=100) as made:
        made.append(
            torch.randn(rows, DIM, generator=generator),
            torch.randint(100, (rows,), generator=generator),
        )
    return Datastore.open(path)


def scores_of(distances, tokens, targets):
    zeros = torch.zeros(distances.shape[0], dtype=torch.int64)
    lm = torch.full((distances.shape[0],), -3.0)
    return StreamScores(lm, targets, zeros, zeros.bool(), distances.float(), tokens.int())


@pytest.fixture(scope="module")
def queries():
    return torch.randn(40, DIM, generator=torch.Generator().manual_seed(9))


@pytest.mark.parametrize("metric", ["l2", "ip"])
def test_every_search_says_nearer_is_smaller(tmp_path, queries, metric):
    """One convention for both metrics and all four pairs: smaller is nearer. Read with the sign
    turned, the best neighbor would get the least."""
    pytest.importorskip("faiss", reason="needs knnext[faiss]")
    store = make_store(tmp_path / "store", metric)
    index = FaissIndex.build(store, factory="IVF16,PQ8x4", train_size=ROWS)
    keys = store.keys[0:ROWS].float()
    for mask in ("exact", "faiss"):
        for score in ("real", "faiss"):
            setting = Setting(mask=mask, score=score, metric=metric)
            distances, rows = search(store, queries, K, setting, index, 16)
            assert (distances.diff(dim=1) >= 0).all()
            real = (
                torch.cdist(queries, keys).square() if metric == "l2" else -(queries @ keys.T)
            ).gather(1, rows)
            assert (real[:, 0] < real[:, -1]).float().mean() > 0.9
            assert (distances - real).abs().mean() < 0.25 * real.std()
            tokens = torch.arange(K).expand(40, K)
            first, last = (
                scores_of(distances, tokens, torch.full((40,), place)).log_p_knn(1.0)
                for place in (0, K - 1)
            )
            torch.testing.assert_close(
                first - last, (distances[:, -1] - distances[:, 0]).double(), atol=1e-3, rtol=1e-4
            )


def test_squared_distances_read_as_products_would_prefer_the_far(tmp_path, queries):
    """The run book's slip: an l2 index, evaluated as ip. Here the index says what it is."""
    pytest.importorskip("faiss", reason="needs knnext[faiss]")
    store = make_store(tmp_path / "store", "l2")
    index = FaissIndex.build(store, factory="IVF16,Flat", train_size=ROWS)
    for mask, score in (("faiss", "faiss"), ("faiss", "real"), ("exact", "faiss")):
        with pytest.raises(ValueError, match="built for metric 'l2'"):
            search(store, queries, K, Setting(mask=mask, score=score, metric="ip"), index, 4)


def test_minus_one_is_not_the_last_row(tmp_path, queries):
    """The last row's token takes part only where the last row was found."""
    pytest.importorskip("faiss", reason="needs knnext[faiss]")
    store = make_store(tmp_path / "store", rows=300)
    index = FaissIndex.build(store, factory="IVF64,Flat", train_size=300)
    distances, rows = search(store, queries, K, Setting(mask="faiss", score="faiss"), index, 1)
    missing = rows < 0
    assert 0.2 < missing.float().mean() < 1
    assert (distances.isinf() == missing).all()
    tokens = tokens_of(store, rows)
    assert (tokens[missing] == -1).all()
    targets = store.values[299:300].long().expand(40)
    found = scores_of(distances, tokens, targets)
    allowed = (rows >= 0) & (store.values[0:300][rows.clamp_min(0)] == targets[:, None])
    for t in (0.1, 1.0, 50.0):
        log_p = found.log_p_knn(t)
        assert not log_p.isnan().any()
        assert (log_p[~allowed.any(1)] == -math.inf).all()


def test_ties_may_come_in_any_order():
    """Rows at one distance are interchangeable: sums of probability and recall do not see their
    order, lists of ids do."""
    distances = torch.tensor([[1.0, 2, 2, 2, 2, 3]])
    tokens = torch.tensor([[0, 1, 2, 2, 3, 1]])
    turned = tokens[:, [0, 4, 3, 2, 1, 5]]
    for target in range(5):
        wanted = torch.tensor([target])
        a, b = (scores_of(distances, t, wanted) for t in (tokens, turned))
        torch.testing.assert_close(a.log_p_knn(0.7), b.log_p_knn(0.7))
        assert recall(a, b).item() == 1
    assert not torch.equal(tokens, turned)


def test_a_fixed_nprobe_is_another_approximation_in_a_smaller_store(tmp_path, queries):
    """The share of lists visited stays, the rows in them do not: places stay empty, and recall of
    the same k falls apart from what nprobe says."""
    pytest.importorskip("faiss", reason="needs knnext[faiss]")
    found, empty = {}, {}
    for rows in (200, ROWS):
        store = make_store(tmp_path / str(rows), rows=rows)
        index = FaissIndex.build(store, factory="IVF32,Flat", train_size=rows)
        setting = Setting(mask="faiss", score="real")
        pairs = [
            scores_of(d, tokens_of(store, r), torch.zeros(40, dtype=torch.int64))
            for d, r in (
                search(store, queries, K, setting, index, 4),
                search(store, queries, K, Setting(), None, 4),
            )
        ]
        found[rows] = float(recall(*pairs).mean())
        empty[rows] = float((pairs[0].tokens < 0).float().mean())
    assert empty[200] > 0 == empty[ROWS]
    assert abs(found[200] - found[ROWS]) > 0.1


@pytest.fixture(scope="module")
def splits():
    count = 1000
    made = []
    for seed, name in enumerate(("valid", "test")):
        log_p = -torch.rand(count, generator=torch.Generator().manual_seed(seed)).double() - 1
        documents = torch.arange(count) * 20 // count
        made.append(Split(name, log_p, documents, documents, TextCounts(count, 500, None, 20)))
    return made


def test_temperature_and_weight_are_fitted_where_nothing_is_reported(splits):
    """On valid t = 1 is best and the component good; on test t = 4 is, and the component bad.
    The paper's way looks at test, and promises what the clean way cannot keep."""
    good = {("valid", 1.0): 0.4, ("valid", 4.0): 0.1, ("test", 1.0): -0.5, ("test", 4.0): 0.2}

    def component(name, t):
        return {s.name: s.log_p_lm for s in splits}[name] + good[name, t]

    fitted = fit_component(*splits, component, (1.0, 4.0), resamples=50)
    assert fitted.mixture.temperature == 1.0
    assert fitted.mixture.lmbda == pytest.approx(1.0)
    assert fitted.mixture.gain == pytest.approx(-0.5)
    assert fitted.mixture.paper["temperature"] == 4.0
    assert fitted.mixture.paper["mixture"] < fitted.mixture.paper["base"]


def test_each_temperature_has_a_weight_of_its_own(splits):
    """With one weight for all, a component that is only sometimes good at t = 4 looks bad there."""
    half = torch.arange(1000) % 2 == 0
    shift = {1.0: torch.full((1000,), 0.3), 4.0: torch.where(half, 1.5, -3.0)}

    def component(name, t):
        return {s.name: s.log_p_lm for s in splits}[name] + shift[t]

    fitted = fit_component(*splits, component, (1.0, 4.0), resamples=50)
    base = fitted.mixture.base
    held = {t: math.exp(-float(component("test", t).mean())) for t in (1.0, 4.0)}
    assert held[4.0] > base > fitted.curve[4.0]  # weight 1, which is best at t = 1
    assert fitted.curve[1.0] == pytest.approx(held[1.0])
