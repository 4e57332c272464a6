"""From coarse to exact: recall where it is known, stops that can be had, and a tiny run."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from knnext.evaluation.scores import StreamScores
from knnext.experiments import approximation
from knnext.experiments.approximation import LISTS, LOT, NEAREST, codes, parse_factory
from knnext.experiments.lab.family import Setting
from knnext.experiments.lab.figures import new_figure
from knnext.experiments.lab.recall import recall, thin
from knnext.experiments.run import run_experiment

INF = torch.inf


def scores_of(distances, tokens=None):
    distances = torch.tensor(distances, dtype=torch.float32)
    count = distances.shape[0]
    zeros = torch.zeros(count, dtype=torch.int64)
    found = torch.ones_like(distances).int() if tokens is None else torch.tensor(tokens).int()
    found = found.masked_fill(distances.isinf(), -1)
    return StreamScores(torch.zeros(count), zeros, zeros, zeros.bool(), distances, found)


def test_recall_of_planted_neighbors():
    exact = scores_of([[1.0, 2, 3, 4], [1, 2, 3, 4], [-9, -8, -7, -6]])
    found = scores_of([[1.0, 3, 4, 9], [5, 6, 7, 8], [-9, -6, -5, INF]])
    assert recall(found, exact).tolist() == [0.75, 0, 0.5]
    assert recall(exact, exact).tolist() == [1, 1, 1]


def test_ties_at_the_last_distance_count_as_found():
    """Ids would call half of these wrong, though no search could say which are right."""
    exact = scores_of([[1.0, 2, 2, 2]])
    assert recall(scores_of([[1.0, 2, 2, 2]], [[5, 6, 7, 8]]), exact).item() == 1
    assert recall(scores_of([[2.0, 2, 2, 2]]), exact).item() == 1  # never above 1


def test_recall_of_a_store_with_fewer_rows_than_k():
    exact = scores_of([[1.0, 2, INF, INF]])
    assert recall(scores_of([[2.0, INF, INF, INF]]), exact).item() == 0.5
    with pytest.raises(ValueError, match="same queries and k"):
        recall(scores_of([[1.0]]), exact)


def test_thinning_keeps_its_share_and_leaves_no_token_behind():
    scores = scores_of([[float(j) for j in range(400)]] * 50)
    kept = thin(scores, 0.25)
    assert recall(kept, scores).mean() == pytest.approx(0.25, abs=0.02)
    assert ((kept.tokens < 0) == kept.distances.isinf()).all()
    assert recall(thin(scores, 1.0), scores).min() == 1


def test_empty_places_have_no_probability():
    """A place without a neighbor is no row: it neither votes nor waters down the others."""
    full = scores_of([[1.0, 2.0]], [[0, 1]])
    padded = scores_of([[1.0, 2.0, INF, INF]], [[0, 1, 7, 7]])
    for t in (0.01, 1.0, 100.0):
        torch.testing.assert_close(full.log_p_knn(t), padded.log_p_knn(t))
    nothing = scores_of([[INF, INF]])
    assert nothing.log_p_knn(0.5).item() == -INF
    assert nothing.log_p(0.5, 0.3).item() == nothing.log_p_lm.item()


def test_factories():
    assert parse_factory("IVF1024,PQ16") == (1024, "PQ16")
    assert parse_factory("IVF64,PQ4x4") == (64, "PQ4x4")
    with pytest.raises(ValueError, match="'Flat'"):
        parse_factory("Flat")
    assert codes("PQ16", 128, (0.25, 0.5, 2.0, 0.0)) == ["PQ4", "PQ8", "PQ32", "Flat"]
    assert codes("PQ16", 24, (0.25, 0.5, 1.5)) == ["PQ4", "PQ8", "PQ24"]
    assert codes("PQ16", 24, (1.0, 0.03, 2.0)) == []  # itself, none at all, no divisor
    assert codes("Flat", 128, (0.0,)) == []


@pytest.fixture(scope="module")
def result(tiny_lab):
    options = {"temperatures": (0.5, 2.0, 8.0), "nprobes": (1, 16), "codes": (0.5, 0.0)}
    options |= {"parts": (0.5,), "fractions": (1.0,)}
    preset = replace(
        tiny_lab.preset, options={f"approximation.{n}": value for n, value in options.items()}
    )
    tiny_lab.preset = preset
    try:
        yield run_experiment(
            "approximation", preset, tiny_lab.folder, lab=tiny_lab, say=lambda _line: None
        )
    finally:
        tiny_lab.preset = replace(preset, options={})


def test_more_lists_find_more(result):
    points = [p for p in result["series"]["points"] if p["road"] == LISTS and p["score"] == "real"]
    by = {p["nprobe"]: p["recall"] for p in points}
    assert sorted(by) == [1, 4, 16, 64]
    assert 0 < by[1] < by[4] < by[16] <= by[64] + 0.01
    shown = {p["road"] for p in result["series"]["points"]}
    assert {NEAREST, LOT} < shown


def test_best_is_chosen_without_the_test_split(result, tiny_lab):
    (best,) = result["details"]["best"].values()
    assert best["road"] not in (NEAREST, LOT)
    assert best["recall"] < 1


def test_keys_as_codes_score_as_the_keys_do(result):
    rows = [r for r in result["rows"] if r["code"] == "Flat"]
    assert len(rows) == 2
    assert rows[0]["perplexity"] == pytest.approx(rows[1]["perplexity"], rel=1e-3)


def test_recall_by_distance_is_recall_by_id(tiny_lab):
    """Where hardly anything ties, both count the same neighbors."""
    exact = tiny_lab.neighbors(Setting(), "valid", keep_indices=True)
    setting = Setting(mask="faiss", score="real")
    found = tiny_lab.neighbors(setting, "valid", keep_indices=True, nprobe=4)
    pairs = zip(exact.indices.tolist(), found.indices.tolist(), strict=True)
    by_id = [len(set(a) & set(b)) / exact.k for a, b in pairs]
    by_distance = recall(found, exact)
    assert (by_distance - torch.tensor(by_id).double()).abs().max() <= 0.1
    assert float(by_distance.mean()) == pytest.approx(sum(by_id) / len(by_id), abs=0.005)


def test_all_lists_of_keys_are_exact_search(tiny_lab):
    setting = Setting(mask="faiss", score="faiss")
    found = tiny_lab.neighbors(setting, "valid", factory="IVF64,Flat", nprobe=64)
    exact = tiny_lab.neighbors(Setting(), "valid")
    assert recall(found, exact).min() > 0.98
    torch.testing.assert_close(found.distances, exact.distances, atol=1e-3, rtol=1e-4)
    torch.testing.assert_close(found.log_p(2.0, 0.3), exact.log_p(2.0, 0.3), atol=1e-2, rtol=1e-2)


def test_the_figure_draws(result):
    figure, axes = new_figure()
    approximation.plot(result, axes)
    assert len(figure.axes) == 1
