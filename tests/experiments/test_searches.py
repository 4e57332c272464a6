"""The four pairs of mask and score, the padded copies, and the traps around them."""

from __future__ import annotations

import pytest
import torch

from knnext.datastore import Datastore
from knnext.experiments.lab.family import Setting
from knnext.experiments.lab.searches import copy_store, faiss_scores, search, tokens_of
from knnext.index import FaissIndex

DIM, ROWS, K = 16, 3000, 20
MASKS = [("exact", "real"), ("exact", "faiss"), ("faiss", "real"), ("faiss", "faiss")]


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    generator = torch.Generator().manual_seed(0)
    path = tmp_path_factory.mktemp("searches") / "store"
    with Datastore.create(path, DIM, vocab_size=50) as made:
        made.append(
            torch.randn(ROWS, DIM, generator=generator),
            torch.randint(50, (ROWS,), generator=generator),
        )
    return Datastore.open(path)


@pytest.fixture(scope="module")
def index(store):
    pytest.importorskip("faiss", reason="needs knnext[faiss]")
    return FaissIndex.build(store, factory="IVF16,PQ4x4", train_size=ROWS)


@pytest.fixture(scope="module")
def queries():
    return torch.randn(30, DIM, generator=torch.Generator().manual_seed(1))


def squared(store, queries):
    keys = store.keys[0:ROWS].double()
    return torch.cdist(queries.half().double(), keys).square()


def test_exact_mask_real_score(store, queries):
    distances, rows = search(store, queries, K, Setting(), None, 1)
    wanted = squared(store, queries).topk(K, largest=False)
    torch.testing.assert_close(distances.double(), wanted.values, atol=1e-4, rtol=1e-5)
    assert (rows == wanted.indices).float().mean() > 0.99


def test_each_pair_keeps_its_mask_and_its_score(store, index, queries):
    found = {
        pair: search(store, queries, K, Setting(mask=pair[0], score=pair[1]), index, 4)
        for pair in MASKS
    }
    real = squared(store, queries)
    decoded = torch.cdist(
        queries.half().double(), index.decode(torch.arange(ROWS)).double()
    ).square()
    for (mask, score), (distances, rows) in found.items():
        other = found[(mask, "faiss" if score == "real" else "real")][1]
        assert all(set(a) == set(b) for a, b in zip(rows.tolist(), other.tolist(), strict=True))
        wanted = (real if score == "real" else decoded).gather(1, rows)
        torch.testing.assert_close(distances.double(), wanted, atol=2e-3, rtol=1e-3)
        assert (distances.diff(dim=1) >= 0).all()
    same = [
        set(a) == set(b)
        for a, b in zip(found[MASKS[0]][1].tolist(), found[MASKS[2]][1].tolist(), strict=True)
    ]
    assert not all(same)  # 4 of 16 lists: the masks do differ


def test_padding_of_a_search_that_finds_too_few(store, index, queries):
    distances, rows = search(store, queries, 1024, Setting(mask="faiss"), index, 1)
    empty = rows < 0
    assert empty.any()  # one list of 16 holds fewer than 1,024 rows
    assert distances[empty].isinf().all()
    tokens = tokens_of(store, rows)
    assert (tokens[empty] == -1).all()  # and not the value of the last row
    assert (tokens[~empty] >= 0).all()


def test_scores_of_missing_rows_stay_missing(index, queries):
    rows = torch.arange(30 * 4).reshape(30, 4)
    rows[:, 1] = -1
    distances, ordered = faiss_scores(index, queries, rows)
    assert (ordered[:, -1] == -1).all()
    assert distances[:, -1].isinf().all()
    assert distances[:, :-1].isfinite().all()


def test_an_index_of_another_metric_is_refused(store, index, queries):
    with pytest.raises(ValueError, match="built for metric 'l2', the setting wants 'ip'"):
        search(store, queries, K, Setting(metric="ip", mask="faiss"), index, 4)
    with pytest.raises(ValueError, match="pass the index"):
        search(store, queries, K, Setting(mask="faiss"), None, 4)


def test_zero_rows_are_the_share_asked_for(store, tmp_path):
    padded = copy_store(store, tmp_path / "padded", metric="l2", padding=0.264, padding_token=50)
    zeros = len(padded) - ROWS
    assert zeros / len(padded) == pytest.approx(0.264, abs=1e-3)
    assert (padded.keys[ROWS : len(padded)] == 0).all()
    assert (padded.values[ROWS : len(padded)] == 50).all()
    assert (padded.keys[0:ROWS] == store.keys[0:ROWS]).all()
    assert (padded.values[0:ROWS] == store.values[0:ROWS]).all()


def test_a_copy_goes_on_where_it_stopped(store, tmp_path, monkeypatch):
    monkeypatch.setattr("knnext.experiments.lab.searches._COPY_ROWS", 500)
    appended, append = [], Datastore.append

    def stop(self, keys, values, documents=None):
        appended.append(len(keys))
        if len(appended) == 4:
            self.commit()
            raise KeyboardInterrupt
        append(self, keys, values, documents)

    with monkeypatch.context() as patch:
        patch.setattr(Datastore, "append", stop)
        with pytest.raises(KeyboardInterrupt):
            copy_store(store, tmp_path / "copy", metric="ip", padding=0.5, padding_token=50)
    copy = copy_store(store, tmp_path / "copy", metric="ip", padding=0.5, padding_token=50)
    assert len(copy) == 2 * ROWS
    assert copy.metric == "ip"
    assert (copy.keys[0:ROWS] == store.keys[0:ROWS]).all()


def test_decode_refuses_rows_that_are_not_there(index):
    with pytest.raises(ValueError, match=r"rows must lie in \[0, 3000\)"):
        index.decode(torch.tensor([0, ROWS]))
