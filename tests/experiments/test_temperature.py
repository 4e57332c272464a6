"""Temperature: planted optima, lmbda held against fitted, and that nothing is searched twice."""

from __future__ import annotations

import math
from functools import cache

import pytest
import torch

from knnext.experiments import temperature
from knnext.experiments.lab import searches
from knnext.experiments.lab.mixture import fit_lmbda
from knnext.experiments.lab.sweep import orders_differ, refine, sweep
from knnext.experiments.run import run_experiment
from tests.experiments.planted_lab import PlantedLab, drawn_at, scores_of

SEEDS = {"valid": 0, "test": 1}


@cache
def planted(split, best):
    distances, tokens, targets = drawn_at(best, count=1500, seed=SEEDS[split])
    return distances, tokens, targets, torch.full((len(targets),), -5.0)


def splits_of(lab):
    return lab.split("valid"), lab.split("test")


@pytest.mark.parametrize("best", [0.7, 1.6, 2.4])
def test_the_temperature_that_drew_the_targets_is_found(tmp_path, best):
    lab = PlantedLab(tmp_path, lambda _setting, split: scores_of(*planted(split, best)))
    grid = [round(0.1 * n, 1) for n in range(1, 31)]
    found = sweep(*splits_of(lab), lab.component(temperature.Setting()), grid)
    assert grid[found.best] == pytest.approx(best, abs=0.1 + 1e-9)
    assert found.best_within(0.1, 3.0) == found.best
    gain = temperature.tuned(found)
    assert gain.value > 0
    assert gain.interval.low > 0
    assert found.perplexity[found.best] == pytest.approx(
        math.exp(-float(found.mixed(found.best).mean()))
    )


def test_the_best_temperature_has_the_scale_of_the_distances(tmp_path):
    def at(scale):
        def plant(_setting, split):
            distances, *rest = planted(split, 2.0)
            return scores_of(distances * scale, *rest)

        lab = PlantedLab(tmp_path, plant)
        grid = [2.0**n for n in range(-3, 6)]
        return sweep(*splits_of(lab), lab.component(temperature.Setting()), grid)

    one, eight = at(1), at(8)
    assert one.temperatures[one.best] == 2
    assert eight.temperatures[eight.best] == 16
    assert eight.perplexity[eight.best] == pytest.approx(one.perplexity[one.best], rel=1e-5)


def test_a_coarse_grid_is_refined_around_its_best(tmp_path):
    lab = PlantedLab(tmp_path, lambda _setting, split: scores_of(*planted(split, 1.6)))
    log_p = lab.component(temperature.Setting())
    grid = refine(lab.split("valid"), log_p, (0.5, 1.0, 2.0, 5.0))
    assert {0.5, 1.0, 2.0, 5.0} < set(grid)
    assert len(grid) == 4 + 7
    found = sweep(*splits_of(lab), log_p, grid)
    assert grid[found.best] == pytest.approx(1.6, rel=0.16)


def hits(share_at):
    """A component that gives 1 to a share of the targets, by temperature, and 0 to the others."""

    def log_p(_split, t):
        found = torch.arange(1500) < share_at[t] * 1500
        return torch.where(found, 0.0, -torch.inf).double()

    return log_p


def test_a_held_weight_changes_the_order(tmp_path):
    """Trap: A wants a weight of 0.9 at t = 1 and of 0.3 at t = 2. With 0.9 held, B is ahead at
    t = 2, though A, with a weight of its own, is better there."""
    lab = PlantedLab(tmp_path, lambda _setting, split: scores_of(*planted(split, 2.0)))
    valid, test = splits_of(lab)
    a = sweep(valid, test, hits({1.0: 0.9, 2.0: 0.3}), (1.0, 2.0))
    b = sweep(valid, test, hits({1.0: 0.1, 2.0: 0.2}), (1.0, 2.0))
    assert a.perplexity[1] < b.perplexity[1] < b.held[1] < a.held[1]
    assert a.perplexity[0] == a.held[0]
    assert orders_differ([a, b], 0.1, 3.0) == (1, 2)
    assert orders_differ([a, b], 0.1, 1.0) == (0, 1)


def test_a_fitted_weight_is_at_least_as_good_as_a_held_one_on_valid(tmp_path):
    lab = PlantedLab(tmp_path, lambda _setting, split: scores_of(*planted(split, 1.6)))
    found = sweep(*splits_of(lab), lab.component(temperature.Setting()), (0.2, 1.0, 5.0, 50.0))
    for fitted, held in zip(found.valid_nll, found.held_valid_nll, strict=True):
        assert fitted <= held + 1e-12
    assert found.valid_nll[found.one] == pytest.approx(found.held_valid_nll[found.one])
    lmbda, _ = fit_lmbda(lab.split("valid").log_p_lm, found.log_p("valid", 50.0))
    assert found.lmbdas[3] == lmbda


@pytest.mark.parametrize("grid", [(0.5, 2.0), (0.0, 1.0), (-1.0, 1.0)])
def test_a_grid_needs_positive_temperatures_and_one(tmp_path, grid):
    lab = PlantedLab(tmp_path, lambda _setting, split: scores_of(*planted(split, 1.6)))
    with pytest.raises(ValueError, match=r"temperatures must be positive and hold 1\.0"):
        sweep(*splits_of(lab), lab.component(temperature.Setting()), grid)


def test_each_pair_is_searched_once_and_judged_by_its_advantage(tmp_path):
    """FAISS is planted better than exact search by half of the targets' noise, at 5 % only."""

    def plant(setting, split):
        distances, tokens, targets, log_p_lm = planted(split, 2.0)
        if setting.mask == "exact" and setting.fraction < 1:
            tokens = torch.where(torch.arange(1500)[:, None] % 4 > 0, tokens, tokens.roll(1, 0))
        return scores_of(distances, tokens, targets, log_p_lm)

    lab = PlantedLab(tmp_path, plant, **{"temperature.wide": (4.0, 8.0)})
    findings = temperature.run(lab)
    assert len(lab.searched) == len(set(lab.searched)) == 2 * 4 * 2  # sizes, pairs, splits
    assert findings.details["parts"] == {
        "t = 1 is not optimal": "agrees",
        "FAISS mask beats exact": "agrees in part",  # at 5 %; at 100 % they are the same
        "whose score matters little": "agrees",
        "more so at the smallest size": "agrees",
    }
    assert [r["best t"] for r in findings.rows[4:]] == [findings.rows[4]["best t"]] * 4
    assert findings.rows[4]["best t"] == pytest.approx(2.0, abs=0.11)
    assert {r["best t lies"] for r in findings.rows} == {"in 0.1 to 3.0"}
    assert [r["paper's best t (its scale)"] for r in findings.rows] == [None] * 4 + [
        1.6,
        0.9,
        2.0,
        None,
    ]


@pytest.mark.slow
def test_less_harm_is_not_an_advantage(tmp_path):
    """FAISS is planted worse than exact search, and more so with all rows."""

    def plant(setting, split):
        distances, tokens, targets, log_p_lm = planted(split, 2.0)
        if setting.mask == "faiss":
            spoilt = torch.arange(1500)[:, None] % 10 < (1 if setting.fraction < 1 else 4)
            tokens = torch.where(spoilt, tokens.roll(1, 0), tokens)
        return scores_of(distances, tokens, targets, log_p_lm)

    findings = temperature.run(PlantedLab(tmp_path, plant, **{"temperature.wide": (4.0, 8.0)}))
    assert findings.details["smaller helps"]["low"] > 0
    assert findings.details["parts"]["FAISS mask beats exact"] == "disagrees"
    assert findings.details["parts"]["more so at the smallest size"] == "disagrees"


@pytest.mark.slow
def test_tiny_run(tiny_lab, tmp_path, monkeypatch):
    options = {"temperature.wide": (4.0, 10.0, 100.0)}
    monkeypatch.setattr(tiny_lab, "preset", tiny_lab.preset.with_options(options=options))
    searched, search = [], searches.search

    def count(store, queries, k, setting, *rest):
        searched.append((setting, len(queries)))
        return search(store, queries, k, setting, *rest)

    monkeypatch.setattr(searches, "search", count)
    arguments = {"lab": tiny_lab, "say": lambda _line: None}
    result = run_experiment("temperature", tiny_lab.preset, tmp_path, **arguments)
    assert len(searched) == len(set(searched)) <= 2 * 4 * 2
    assert len(result["rows"]) == 8
    for one in result["series"]["curves"]:
        assert len(one["temperatures"]) == len(one["perplexity"]) == len(one["held"]) >= 33
        place = one["temperatures"].index(1.0)
        assert one["perplexity"][place] == one["held"][place]
    for row in result["rows"]:
        assert row["mixture"] < result["series"]["base"]
        assert row["best t in 0.1 to 3.0"] <= 3
    assert (tmp_path / "temperature.png").stat().st_size > 10_000
    done = len(searched)
    again = run_experiment("temperature", tiny_lab.preset, tmp_path, fresh=True, **arguments)
    assert len(searched) == done
    assert again["rows"] == result["rows"]
