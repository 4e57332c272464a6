"""Zero rows among the neighbors: against a search that meets them, and where theory knows."""

from __future__ import annotations

import math

import pytest
import torch

from knnext.datastore import Datastore
from knnext.evaluation.scores import StreamScores
from knnext.experiments.lab.family import Setting
from knnext.experiments.lab.searches import copy_store, search, tokens_of
from knnext.experiments.lab.zero_rows import (
    Cloud,
    cloud_of,
    depths,
    insert_zero_rows,
    places_share,
    places_taken,
    probability_taken,
)

DIM, ROWS, K, TOKEN = 8, 400, 50, 30


def scores_of(distances, tokens, targets=None):
    count = distances.shape[0]
    zeros = torch.zeros(count, dtype=torch.int64)
    return StreamScores(
        torch.zeros(count),
        zeros if targets is None else targets,
        zeros,
        zeros.bool(),
        distances.float(),
        tokens.int(),
    )


def make_store(path, keys, tokens):
    with Datastore.create(path, DIM, dtype=torch.float32, vocab_size=TOKEN) as made:
        made.append(keys, tokens)
    return Datastore.open(path)


def searched(store, queries, k=K):
    distances, rows = search(store, queries, k, Setting(), None, 1)
    return scores_of(distances, tokens_of(store, rows))


@pytest.fixture(scope="module")
def cloud():
    """Keys and queries around a point that is as far from the origin as they are wide."""
    generator = torch.Generator().manual_seed(3)
    center = torch.full((DIM,), 0.7)
    keys = center + torch.randn(ROWS, DIM, generator=generator)
    queries = center + torch.randn(60, DIM, generator=generator)
    return keys, queries, torch.randint(TOKEN, (ROWS,), generator=generator)


def same_but_for_ties(found, wanted):
    """Distances equal, and equal probability for every token: ids at ties may differ."""
    torch.testing.assert_close(found.distances, wanted.distances, atol=1e-4, rtol=1e-5)
    for token in range(TOKEN + 1):
        targets = torch.full((found.num_tokens,), token)
        a, b = (
            StreamScores(
                s.log_p_lm, targets, s.document_ids, s.ends_document, s.distances, s.tokens
            )
            for s in (found, wanted)
        )
        p, q = a.log_p_knn(2.0).exp(), b.log_p_knn(2.0).exp()
        torch.testing.assert_close(p, q, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("share", [0.03, 0.264, 0.9])
def test_insertion_is_a_search_of_the_padded_store(tmp_path, cloud, share):
    keys, queries, tokens = cloud
    store = make_store(tmp_path / "store", keys, tokens)
    padded = copy_store(store, tmp_path / "padded", metric="l2", padding=share, padding_token=TOKEN)
    found = insert_zero_rows(
        searched(store, queries), queries.square().sum(1), len(padded) - ROWS, TOKEN
    )
    wanted = searched(padded, queries)
    assert 0 < places_taken(wanted, TOKEN).sum() < wanted.tokens.numel()
    torch.testing.assert_close(places_taken(found, TOKEN), places_taken(wanted, TOKEN))
    same_but_for_ties(found, wanted)


def test_moving_the_origin_is_moving_keys_and_queries(tmp_path, cloud):
    keys, queries, tokens = cloud
    store = make_store(tmp_path / "store", keys, tokens)
    origin = cloud_of(keys).origin(0.1)
    moved = make_store(tmp_path / "moved", keys - origin, tokens)
    padded = copy_store(moved, tmp_path / "padded", metric="l2", padding=0.2, padding_token=TOKEN)
    found = insert_zero_rows(
        searched(store, queries), (queries - origin).square().sum(1), 100, TOKEN
    )
    same_but_for_ties(found, searched(padded, queries - origin))


def test_places_follow_from_depths(cloud):
    keys, queries, _ = cloud
    depth = depths(queries, keys, torch.zeros(1, DIM))[:, 0]
    nearest = torch.cdist(queries, keys).square().topk(K, largest=False).values
    found = insert_zero_rows(
        scores_of(nearest, torch.zeros(60, K)), queries.square().sum(1), K, TOKEN
    )
    taken = places_taken(found, TOKEN).double()
    torch.testing.assert_close(taken, (K - depth * ROWS).round().clamp_min(0))
    assert places_share(depth, K / ROWS) == pytest.approx(float(taken.mean()) / K)


def test_few_rows_at_one_place():
    scores = scores_of(torch.tensor([[1.0, 2.0, 3.0, 4.0]]), torch.tensor([[0, 1, 2, 3]]))
    at = insert_zero_rows(scores, torch.tensor([2.0]), 1, 9)
    assert at.tokens.tolist() == [[0, 1, 9, 2]]  # a row of the store comes first at a tie
    assert at.distances.tolist() == [[1, 2, 2, 3]]
    assert insert_zero_rows(scores, torch.tensor([0.5]), 9, 9).tokens.tolist() == [[9] * 4]
    assert insert_zero_rows(scores, torch.tensor([4.5]), 9, 9).tokens.tolist() == [[0, 1, 2, 3]]


def test_padding_stays_padding():
    scores = scores_of(torch.tensor([[1.0, math.inf, math.inf]]), torch.tensor([[4, -1, -1]]))
    found = insert_zero_rows(scores, torch.tensor([2.0]), 1, 9)
    assert found.tokens.tolist() == [[4, 9, -1]]


def test_probability_of_zero_rows():
    distances = torch.tensor([[0.0, math.log(3.0)], [5.0, 5.0]])
    scores = scores_of(distances, torch.tensor([[0, 9], [9, 9]]))
    taken = probability_taken(scores, 9, (1.0, 1e6))
    assert taken[1.0] == pytest.approx((0.25 + 1) / 2)
    assert taken[1e6] == pytest.approx((0.5 + 1) / 2, abs=1e-5)


def test_zero_rows_never_raise_the_probability_of_a_target(cloud):
    keys, queries, tokens = cloud
    nearest = torch.cdist(queries, keys).square().topk(K, largest=False)
    clean = scores_of(nearest.values, tokens[nearest.indices], tokens[:60])
    dirty = insert_zero_rows(clean, queries.square().sum(1), 20, TOKEN)
    for t in (0.1, 1.0, 10.0):
        assert (dirty.log_p_knn(t) <= clean.log_p_knn(t) + 1e-6).all()


def test_origin_gives_the_mean_share():
    keys = torch.randn(500, 6, generator=torch.Generator().manual_seed(0)) + 2
    cloud = cloud_of(keys)
    for share in (0.0, 0.3, 0.8):
        assert cloud_of(keys - cloud.origin(share)).mean_share == pytest.approx(share, abs=1e-5)
    here = cloud.origin(cloud.mean_share)
    assert here.abs().max() < 1e-4
    assert Cloud(torch.zeros(3), 4.0).origin(0.5).norm() == pytest.approx(2.0)
    with pytest.raises(ValueError, match="mean_share"):
        cloud.origin(1.0)


@pytest.mark.parametrize(
    ("share", "low", "high"), [(0.02, 0, 0.02), (0.5, 0.4, 0.6), (0.95, 0.98, 1)]
)
def test_depth_in_a_round_cloud(share, low, high):
    """A random key w + mean lies nearer to z + mean than the origin where
    |w|^2 - 2 w z < |mean|^2 + 2 mean z: an even chance where |mean|^2 is the variance."""
    generator = torch.Generator().manual_seed(0)
    keys = torch.randn(2000, 256, generator=generator)
    queries = torch.randn(50, 256, generator=generator)
    origin = cloud_of(keys).origin(share)
    depth = depths(queries, keys, origin[None])
    assert low <= float(depth.mean()) <= high
