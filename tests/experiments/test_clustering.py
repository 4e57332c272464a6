"""Centroids: planted groups are found, M is a distribution, fast scores are the plain ones."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("faiss", reason="needs knnext[faiss]")

from knnext.evaluation.bootstrap import Interval
from knnext.experiments import clustering
from knnext.experiments.lab import Lab, clusters
from knnext.experiments.lab.contrast import Gain
from knnext.experiments.lab.family import row_log_p
from knnext.experiments.lab.soft_rows import (
    WEIGHTS,
    SoftRows,
    TrainedRows,
    floored_nll,
    one_hot_rows,
    tempered_log_p,
    voted_rows,
)
from knnext.experiments.run import run_experiment


def blobs(centres: Tensor, size: int, spread: float, seed: int = 0) -> Tensor:
    """(len(centres) * size, D) points, `size` around each centre."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(len(centres) * size, centres.shape[1], generator=generator)
    return centres.repeat_interleave(size, 0) + spread * noise


CORNERS = torch.eye(6) * 10


# Making centroids


def test_kmeans_finds_planted_centres_and_assigns_their_points() -> None:
    points = blobs(CORNERS, 50, 0.1)
    centroids = clusters.kmeans(points, 6, seed=3)
    nearest, squares = clusters.assign(points, centroids)
    torch.testing.assert_close(centroids[nearest[::50]], CORNERS, rtol=0, atol=0.1)
    assert all(len(set(part.tolist())) == 1 for part in nearest.split(50))
    expected = (points - centroids[nearest]).square().sum(1)
    torch.testing.assert_close(squares, expected, rtol=1e-3, atol=1e-3)


def test_spherical_centroids_have_length_one_and_forget_lengths() -> None:
    points = clusters.unit(blobs(CORNERS, 50, 0.1) * torch.rand(300, 1).add(0.5))
    centroids = clusters.kmeans(points, 6, seed=1, spherical=True)
    torch.testing.assert_close(centroids.norm(dim=1), torch.ones(6))
    assert clusters.assign(points, centroids)[1].max() < 0.1


def test_the_means_of_words_are_their_means_and_2_means_part_two_senses() -> None:
    keys = torch.cat([blobs(CORNERS[:2], 40, 0.1), blobs(CORNERS[2:3], 1, 0.0)])
    words = torch.tensor([4] * 80 + [9])
    rows, owners = clusters.word_means(keys, words)
    assert owners.tolist() == [4, 9]
    torch.testing.assert_close(rows[0], keys[:80].mean(0))
    rows, owners = clusters.word_kmeans(keys, words, 2, seed=0)
    assert owners.tolist() == [4, 4, 9]
    found = torch.cdist(rows[:2], CORNERS[:2]).argmin(1).sort().values
    assert found.tolist() == [0, 1] and torch.cdist(rows[:2], CORNERS[:2]).amin(1).max() < 0.1


def test_random_keys_are_keys_of_their_word_and_no_key_twice() -> None:
    keys, words = torch.randn(60, 3), torch.tensor([0, 1, 1, 5] * 15)
    rows, owners = clusters.random_keys(keys, words, 20, seed=0)
    assert owners.bincount().tolist() == [15, 20, 0, 0, 0, 15]
    place = torch.cdist(rows, keys).argmin(1)
    assert torch.equal(words[place], owners) and len(place.unique()) == 50


def test_a_mean_square_is_divided_by_the_points_that_it_is_of() -> None:
    """5,000 points, of which 256 are used: the mean is 2, not 256 / 5000 of it (trap 4.16)."""
    points = torch.randn(5000, 2, generator=torch.Generator().manual_seed(0))
    square, centroids = clusters.mean_square(points, 1, 0, 5)
    assert square == pytest.approx(2, rel=0.25) and centroids.shape == (1, 2)
    apart = blobs(CORNERS[:2], 2000, 0.1)
    assert clusters.mean_square(apart, 1, 0, 5)[0] == pytest.approx(50, rel=0.1)
    assert clusters.mean_square(apart, 2, 0, 5)[0] == pytest.approx(6 * 0.01, rel=0.2)


def test_a_frequent_word_of_many_senses_gets_its_centroids() -> None:
    """Word 0 is frequent and has four senses, word 1 is rare and has one, spread a little.

    Divided by all 6,000 keys, word 0's sum over 256 of them would count less than word 1's.
    """
    frequent, rare = blobs(CORNERS[:4], 1500, 0.1), blobs(CORNERS[4:5], 30, 1.0)
    square = clusters.mean_square(frequent, 1, 0, 8)[0]
    assert square * 256 / 6000 < clusters.mean_square(rare, 1, 0, 8)[0] < square
    keys, words = torch.cat([frequent, rare]), torch.tensor([0] * 6000 + [1] * 30)
    rows, owners = clusters.adaptive_word_kmeans(keys, words, 3, seed=0)
    assert owners.tolist() == [0, 0, 1] and len(rows) == 3


def test_adaptive_means_stop_where_every_key_has_its_own() -> None:
    keys = torch.arange(8.0).view(4, 2)
    rows, owners = clusters.adaptive_word_kmeans(keys, torch.tensor([0, 0, 1, 1]), 50, seed=0)
    assert sorted(rows.tolist()) == keys.tolist() and owners.tolist() == [0, 0, 1, 1]


# M and the scores


def test_votes_count_by_their_distance() -> None:
    """One cluster of words 0, 0, 2 at squared distances 0, 0.99 and 1.99."""
    cluster, squares = torch.zeros(3, dtype=torch.int64), torch.tensor([0.0, 0.99, 1.99])
    words = torch.tensor([0, 0, 2])

    def share(weights: str) -> Tensor:
        return voted_rows(cluster, squares, words, 4, weights).dense(1)[:, 0]

    third = torch.tensor([2 / 3, 0, 1 / 3, 0])
    torch.testing.assert_close(share("count"), third)
    votes = torch.tensor([100 + 1, 0, 0.5, 0])  # 1 / 0.01, 1 / 1.00 and 1 / 2.00
    torch.testing.assert_close(share("inverse distance"), votes / votes.sum())
    votes = torch.tensor([1 + 0.371577, 0, 0.136695, 0])
    torch.testing.assert_close(share("exponential"), votes / votes.sum())


def test_exponential_votes_survive_far_clusters() -> None:
    """exp(-d^2) alone is 0 for every key here; less the smallest d^2, the nearest has 1."""
    squares = torch.tensor([2000.0, 2001.0])
    m = voted_rows(torch.zeros(2, dtype=torch.int64), squares, torch.arange(2), 2, "exponential")
    expected = torch.tensor([[1.0], [0.367879]]) / 1.367879
    torch.testing.assert_close(m.dense(1), expected)


@pytest.fixture
def planted() -> tuple[Tensor, Tensor, Tensor, dict[str, SoftRows]]:
    """(states, rows, targets, M by name): word 6 of 7 has no row."""
    generator = torch.Generator().manual_seed(5)
    keys, words = torch.randn(200, 4, generator=generator), torch.arange(200) % 6
    rows = torch.randn(9, 4, generator=generator)
    nearest, squares = clusters.assign(keys, rows)
    m = {w: voted_rows(nearest, squares, words, 7, w) for w in WEIGHTS}
    return torch.randn(30, 4, generator=generator), rows, torch.arange(30) % 7, m


def test_each_row_shares_out_all_it_has(planted: Any) -> None:
    _, _, _, m = planted
    for one in m.values():
        torch.testing.assert_close(one.dense(9).sum(0), torch.ones(9))
    one_hot = one_hot_rows(torch.tensor([3, 0, 3]), 4).dense(3)
    assert one_hot.tolist() == [[0, 1, 0], [0, 0, 0], [0, 0, 0], [1, 0, 1]]


@pytest.mark.parametrize("metric", ["l2", "ip"])
def test_sparse_scores_are_those_of_the_dense_member_of_the_family(
    planted: Any, metric: str
) -> None:
    states, rows, targets, m = planted
    temperatures = (0.01, 1.0, 30.0)
    found = tempered_log_p(states, rows, targets, m, metric=metric, temperatures=temperatures)
    for name, one in m.items():
        dense = one.dense(len(rows))
        for number, temperature in enumerate(temperatures):
            expected = row_log_p(
                states,
                rows,
                targets,
                row_distribution=lambda t, d=dense: d[t],
                metric=metric,
                temperature=temperature,
            )
            torch.testing.assert_close(found[name][number], expected, rtol=1e-4, atol=1e-4)
            assert bool((found[name][number][targets == 6] == -torch.inf).all())


def test_trained_rows_start_at_the_centroids_and_have_the_gradient_of_the_dense_ones(
    planted: Any,
) -> None:
    states, rows, targets, m = planted
    one = m["count"]
    component = TrainedRows(rows, one, "l2", 2.0)
    log_p = component((states,), targets)
    table = tempered_log_p(states, rows, targets, {"m": one}, metric="l2", temperatures=[2.0])
    torch.testing.assert_close(log_p.detach().double(), table["m"][0])
    floored_nll(log_p, None).backward()
    dense_rows = rows.clone().requires_grad_()
    scores = -(states[:, None] - dense_rows).square().sum(2) / 2.0
    p = (one.dense(9)[targets] * scores.softmax(1)).sum(1)
    (-p.clamp_min(1e-9).log().mean()).backward()
    assert component.rows.grad is not None and dense_rows.grad is not None
    torch.testing.assert_close(component.rows.grad, dense_rows.grad, rtol=1e-3, atol=1e-5)


# The experiment


def gain(low: float, high: float) -> Gain:
    return Gain((low + high) / 2, Interval(low, high, 0.95))


def test_agreement_asks_whether_the_datastore_leads_by_half() -> None:
    assert clustering.agreement(gain(0.1, 0.2), 0.2) == "agrees"
    assert clustering.agreement(gain(0.1, 0.2), 0.8) == "agrees in part"
    assert clustering.agreement(gain(-0.1, 0.2), 0.9) == "undecided"
    assert clustering.agreement(gain(-0.2, -0.1), 1.2) == "disagrees"


@pytest.mark.slow
def test_the_experiment_tries_every_set_and_a_rerun_computes_nothing(tiny_lab: Lab) -> None:
    options = {"clustering.rows_per_word": 0.5, "clustering.sample": 0.2}
    lab = Lab(replace(tiny_lab.preset, options=options), tiny_lab.folder, tiny_lab.say)
    result = run_experiment("clustering", lab.preset, lab.folder, lab=lab)
    rows = result["rows"]
    assert [row["runs"] for row in rows] == [2] * 6 + [1] * 11 + [2, 1]
    base = float((-lab.split("test").log_p_lm.mean()).exp())
    for row in rows:
        assert 0 <= row["lmbda"] <= 1 and row["perplexity"] > 1
        assert row["lmbda"] > 0 or row["perplexity"] == pytest.approx(base)
    assert rows[-2]["state"] == "fine-tuned" and rows[-1]["rows from"] == "datastore"
    assert all((row["at t = 1"] is None) == (row["state"] == "fine-tuned") for row in rows)
    assert rows[0]["rows"] <= 256 < len(lab.store("att")) == rows[-1]["rows"]
    assert (lab.folder / "clustering.png").stat().st_size > 10_000
    again = Lab(lab.preset, lab.folder, lambda line: pytest.fail(f"computed again: {line}"))
    assert clustering.run(again).words == result["words"]
